"""The reference is that of the code."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import Metric

from worker.db.tables import metadata
from worker.observability.metrics import Metrics

DOCS = Path(__file__).parents[2] / "docs"


def test_reference_lists_every_metric() -> None:
    own = Metrics().registry
    exported = {full_name(metric) for metric in own.collect() if not metric.name.startswith(("process_", "python_"))}
    text = (DOCS / "reference" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `([a-z_]+)`", text, re.MULTILINE)) == exported


def full_name(metric: Metric) -> str:
    return metric.name + ("_total" if metric.type == "counter" else "")


def test_reference_lists_every_table_with_its_columns() -> None:
    text = (DOCS / "reference" / "tables.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\| (.*?) \|", text, re.MULTILINE))
    assert set(rows) == set(metadata.tables)
    for name, table in metadata.tables.items():
        assert set(re.findall(r"`(\w+)`", rows[name])) == {column.name for column in table.columns}, name


def test_links_between_documents_lead_somewhere() -> None:
    root = DOCS.parent
    documents = [root / "README.md", root / "CONTRIBUTING.md", root / "deploy" / "README.md", *DOCS.rglob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} → {target}"
