"""What the pages describe and a worker may not have yet. Each condition is one question to the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import worker.web
from worker.settings import Settings


def _has_command(name: str) -> bool:
    asked = subprocess.run([sys.executable, "-m", "worker", name, "--help"], capture_output=True, check=False)
    return asked.returncode == 0


def _acts_on(setting: str) -> bool:
    extra = Settings.model_fields[setting].json_schema_extra
    return not (isinstance(extra, dict) and extra.get("in_effect") is False)


def _serves(route: str) -> bool:
    return any(route in module.read_text() for module in Path(worker.web.__path__[0]).glob("*.py"))


needs_view_producer = pytest.mark.skipif(not hasattr(worker, "ViewProducer"), reason="worker has no ViewProducer")
needs_totals_channel = pytest.mark.skipif(not _acts_on("view_totals_channel"), reason="no totals are published")
needs_view_queries = pytest.mark.skipif(not _serves("/v1/views"), reason="the worker does not answer /v1/views")
needs_import = pytest.mark.skipif(not _has_command("import"), reason="there is no `viewer-worker import`")
