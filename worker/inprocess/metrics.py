"""The metrics of an application's Writers, in the application's own registry."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

from prometheus_client import CollectorRegistry

from worker.observability.metrics import RecordMetrics
from worker.pipelines.metrics import WriteMetrics

QUEUE_FULL = "queue_full"


class Holder(Protocol):
    """`held`: records accepted and not written; `pausing`: those of them that wait for their next try."""

    @property
    def held(self) -> int: ...
    @property
    def pausing(self) -> int: ...


class BufferMetrics:
    """The metrics of one pipeline in one registry, which several Writers may share."""

    def __init__(self, records: RecordMetrics, pipeline: str) -> None:
        self._records = records
        self._pipeline = pipeline
        WriteMetrics(records, pipeline)  # the series exist from the start
        self._holders: WeakSet[Holder] = WeakSet()
        self._queue_full = records.queue_full.labels(pipeline)
        self._dropped = records.records_dropped.labels(pipeline)
        self._coalesced = records.records_coalesced.labels(pipeline)
        self._stopped = records.workers_stopped.labels(pipeline)
        self._unknown = records.records_unknown.labels(pipeline)
        self._errors = records.writes.labels(pipeline, "error")
        self._error_types = records.write_errors.labels(pipeline, QUEUE_FULL)
        # The function replaces what WriteMetrics counts: records that are being written are held, too.
        for depth in (records.records_in_flight, records.write_queue_depth):
            depth.labels(pipeline).set_function(lambda: sum(each.held for each in self._holders))
        records.records_pausing.labels(pipeline).set_function(lambda: sum(each.pausing for each in self._holders))

    def add(self, holder: Holder) -> None:
        self._holders.add(holder)

    def make_write_metrics(self) -> WriteMetrics:
        """Of one writer: each counts what it is writing."""
        return WriteMetrics(self._records, self._pipeline)

    def refused(self, *, full: bool = False, closed: bool = False) -> None:
        """`full`: for want of room. `closed`: after the shutdown."""
        if closed:
            self._stopped.inc()
        self._dropped.inc()
        if full:
            self._queue_full.inc()
            self._errors.inc()
            self._error_types.inc()

    def coalesced(self) -> None:
        self._coalesced.inc()

    def stopped(self) -> None:
        self._stopped.inc()

    def left(self, unwritten: int, unknown: int) -> None:
        """Records that are left at the end."""
        self._dropped.inc(unwritten)
        self._unknown.inc(unknown)


_unread = CollectorRegistry()
_of_registry: dict[CollectorRegistry, tuple[RecordMetrics, dict[str, BufferMetrics]]] = {}


def metrics_in(registry: CollectorRegistry | None, pipeline: str) -> BufferMetrics:
    """The metrics of a pipeline in this registry; they are made once. None: in one that nobody reads."""
    registry = registry or _unread
    if registry not in _of_registry:
        _of_registry[registry] = RecordMetrics(registry), {}
    records, pipelines = _of_registry[registry]
    if pipeline not in pipelines:
        pipelines[pipeline] = BufferMetrics(records, pipeline)
    return pipelines[pipeline]
