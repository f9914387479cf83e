"""Moves the views that applications count in Redis to Postgres, each view exactly once."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.inprocess.bar_store import BarStore, SyncBarStore
    from worker.inprocess.metric_store import MetricStore, SyncMetricStore
    from worker.inprocess.session_store import EventTracker, SessionManager, SessionStore
    from worker.inprocess.stats import WriterStats
    from worker.inprocess.sync_writer import SyncWriter
    from worker.inprocess.writer import Writer
    from worker.pipelines.model import CommitUnanswered
    from worker.pipelines.records.bars_1m import Bar
    from worker.pipelines.records.chunk_requests import ChunkEvent
    from worker.pipelines.records.metrics import Metric
    from worker.producer.client import Outcome, SyncViewProducer, ViewProducer

__all__ = [
    "Bar",
    "BarStore",
    "ChunkEvent",
    "CommitUnanswered",
    "EventTracker",
    "Metric",
    "MetricStore",
    "Outcome",
    "SessionManager",
    "SessionStore",
    "SyncBarStore",
    "SyncMetricStore",
    "SyncViewProducer",
    "SyncWriter",
    "ViewProducer",
    "Writer",
    "WriterStats",
]
__version__ = "0.1.0"


_MODULES = {
    "Bar": "worker.pipelines.records.bars_1m",
    "BarStore": "worker.inprocess.bar_store",
    "ChunkEvent": "worker.pipelines.records.chunk_requests",
    "CommitUnanswered": "worker.pipelines.model",
    "EventTracker": "worker.inprocess.session_store",
    "Metric": "worker.pipelines.records.metrics",
    "MetricStore": "worker.inprocess.metric_store",
    "Outcome": "worker.producer.client",
    "SessionManager": "worker.inprocess.session_store",
    "SessionStore": "worker.inprocess.session_store",
    "SyncBarStore": "worker.inprocess.bar_store",
    "SyncMetricStore": "worker.inprocess.metric_store",
    "SyncViewProducer": "worker.producer.client",
    "SyncWriter": "worker.inprocess.sync_writer",
    "ViewProducer": "worker.producer.client",
    "Writer": "worker.inprocess.writer",
    "WriterStats": "worker.inprocess.stats",
}


def __getattr__(name: str) -> object:
    """Load the client library on first use, because every command imports this package."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
