"""The records that this version carries, one file each.

A new record also needs an entry in `RECORD_TYPES` and a migration that creates its table, such as
alembic/versions/0004_chunk_requests.py.
"""

from __future__ import annotations

from typing import Any

from worker.pipelines.model import RecordType
from worker.pipelines.records.bars_1m import BARS_1M
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS
from worker.pipelines.records.metrics import METRICS
from worker.pipelines.records.session_events import SESSION_EVENTS
from worker.pipelines.records.view_events import VIEW_EVENTS

RECORD_TYPES: dict[str, RecordType[Any]] = {
    record.name: record for record in (VIEW_EVENTS, CHUNK_REQUESTS, BARS_1M, METRICS, SESSION_EVENTS)
}
