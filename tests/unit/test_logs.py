"""Logs have the format that LOG_FORMAT names, and JSON is UTF-8."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.world import clean_environment

PROGRAM = """
from worker.cli.options import read_settings
from worker.observability.logs import get_logger
read_settings(None, None)
get_logger("worker.demo").warning("views were lost …", id="vöd", raw="\\udc80")
"""


def to_pipe(folder: Path, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True).stderr.decode()


def to_terminal(folder: Path, environment: dict[str, str]) -> str:
    ours, its = os.openpty()
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, env=environment, stderr=its, check=True)
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # raised at the end
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    return shown.decode()


@pytest.mark.parametrize(
    ("log_format", "write", "is_json"),
    [
        ("auto", to_pipe, True),
        ("auto", to_terminal, False),
        ("JSON", to_terminal, True),
        ("console", to_pipe, False),
    ],
)
def test_format_is_that_of_the_setting_and_auto_depends_on_the_terminal(
    tmp_path: Path, log_format: str, write: Callable[[Path, dict[str, str]], str], is_json: bool
) -> None:
    text = write(tmp_path, clean_environment() | {"LOG_FORMAT": log_format, "PYTHONIOENCODING": "utf-8"})
    if is_json:
        line = json.loads(text)
        assert list(line)[:3] == ["timestamp", "level", "event"]
        assert (line["event"], line["logger"]) == ("views were lost …", "worker.demo")
    else:
        assert "views were lost …" in text
        assert "{" not in text
    # Colours are for terminals only.
    assert ("\x1b[" in text) is (write is to_terminal and not is_json)


def test_json_is_utf_8_in_any_locale_and_valid_with_any_text(tmp_path: Path) -> None:
    text = to_pipe(tmp_path, clean_environment() | {"PYTHONIOENCODING": "ascii"})
    assert '"views were lost …"' in text
    assert '"vöd"' in text
    assert json.loads(text)["raw"] == "\udc80"
