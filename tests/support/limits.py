"""Shorter limits, so that tests of timeouts are quick."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from worker.db.counters import source_row


def limit_statements(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Set a shorter statement timeout for the transactions that lock the source row."""
    settings = [func.set_config("statement_timeout", limit, True)]
    lock = select(*source_row._COLUMNS, *settings).where(source_row._this).with_for_update(skip_locked=True)
    monkeypatch.setattr(source_row, "_LOCK", lock)
