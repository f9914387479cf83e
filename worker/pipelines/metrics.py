"""The metrics of a pipeline, written at one point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.db.positions import Move, Position
    from worker.observability.metrics import Metrics, RecordMetrics
    from worker.pipelines.model import Written
    from worker.pipelines.sources.stream.evidence import Evidence
    from worker.runtime.clock import Clock

WRITE_FAILED = "write_failed"
QUEUE_FULL = "queue_full"


class WriteMetrics:
    """Implements WriteObserver."""

    def __init__(self, metrics: RecordMetrics, pipeline: str) -> None:
        self._in_flight = metrics.records_in_flight.labels(pipeline)
        self._queue = metrics.write_queue_depth.labels(pipeline)
        self._batches = (metrics.record_batches.labels(pipeline), metrics.write_batches.labels(pipeline, "write"))
        self._written = metrics.records_written.labels(pipeline)
        self._failed = metrics.records_failed.labels(pipeline)
        self._retried = metrics.records_retried.labels(pipeline)
        self._exhausted = metrics.records_exhausted.labels(pipeline)
        self._repeated = metrics.records_repeated.labels(pipeline)
        self._letters = metrics.dead_letters.labels(pipeline)
        self._dropped = metrics.records_dropped.labels(pipeline)
        self._latency = metrics.record_latency.labels(pipeline)
        self._succeeded = metrics.writes.labels(pipeline, "success")
        self._errors = metrics.writes.labels(pipeline, "error")
        self._error_types = metrics.write_errors.labels(pipeline, WRITE_FAILED)
        self._seconds = metrics.write_seconds.labels(pipeline, "write")
        self._writing = 0
        # What only a buffer, or the gRPC intake, counts: the series exist from the start for every pipeline.
        buffered = (metrics.queue_full, metrics.records_coalesced, metrics.workers_stopped, metrics.records_unknown)
        for counter in buffered:
            counter.labels(pipeline)
        metrics.records_pausing.labels(pipeline)
        metrics.write_errors.labels(pipeline, QUEUE_FULL)

    def writing(self, records: int, *, again: bool) -> None:
        # Streams of one pipeline share these.
        self._in_flight.inc(records)
        self._queue.inc(records)
        self._writing = records
        if again:
            self._retried.inc(records)

    def written(self, written: Written, seconds: float, latency: float | None) -> None:
        self._idle()
        for batches in self._batches:
            batches.observe(written.rows + written.repeated + written.letters)
        self._written.inc(written.rows)
        self._succeeded.inc(written.rows)
        self._repeated.inc(written.repeated)
        self._letters.inc(written.letters)
        self._dropped.inc(written.dropped)
        self._seconds.observe(seconds)
        if latency is not None:
            self._latency.observe(latency)

    def failed(self, records: int) -> None:
        self._idle()
        self._failed.inc(records)
        self._errors.inc(records)
        self._error_types.inc(records)

    def exhausted(self, records: int) -> None:
        self._exhausted.inc(records)

    def not_claimed(self) -> None:
        self._idle()

    def _idle(self) -> None:
        self._in_flight.dec(self._writing)
        self._queue.dec(self._writing)
        self._writing = 0


class Holder(Protocol):
    """`held`: records accepted and not written; `pausing`: those of them that wait for their next try.

    `capacity`: how many records it may hold; 0 if another holder's capacity includes them.
    """

    @property
    def held(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def pausing(self) -> int: ...


class BufferMetrics:
    """The metrics of the buffers of one pipeline in one registry, which several Writers may share."""

    def __init__(self, records: RecordMetrics, pipeline: str) -> None:
        self._records = records
        self._pipeline = pipeline
        WriteMetrics(records, pipeline)  # makes all series
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
        records.record_capacity.labels(pipeline).set_function(lambda: sum(each.capacity for each in self._holders))
        records.records_pausing.labels(pipeline).set_function(lambda: sum(each.pausing for each in self._holders))

    def add(self, holder: Holder) -> None:
        self._holders.add(holder)

    def make_write_metrics(self) -> WriteMetrics:
        """Of one writer: each counts what it is writing."""
        return WriteMetrics(self._records, self._pipeline)

    def refused(self, records: int = 1, *, full: bool = False, closed: bool = False) -> None:
        """`full`: for want of room. `closed`: after the shutdown."""
        if closed:
            self._stopped.inc(records)
        self._dropped.inc(records)
        if full:
            self._queue_full.inc(records)
            self._errors.inc(records)
            self._error_types.inc(records)

    def coalesced(self) -> None:
        self._coalesced.inc()

    def stopped(self) -> None:
        self._stopped.inc()

    def left(self, unwritten: int, unknown: int) -> None:
        """Records that are left at the end."""
        self._dropped.inc(unwritten)
        self._unknown.inc(unknown)


class StreamMetrics:
    """Implements StreamObserver.

    `reads`: whether this worker reads the stream. While it does not, backlog and age are 0: another replica knows them.
    """

    def __init__(self, metrics: Metrics, clock: Clock, pipeline: str, stream: str, reads: Callable[[], bool]) -> None:
        labels = (pipeline, stream)
        self._clock = clock
        self._reads = reads
        self._carried = metrics.entries_carried.labels(*labels)
        self._lost = metrics.entries_lost.labels(*labels)
        self._gaps = metrics.stream_gaps.labels(*labels)
        self._backlog = 0
        self._oldest: float | None = None
        metrics.backlog.labels(*labels).set_function(lambda: self._backlog if self._reads() else 0)
        metrics.oldest_unread.labels(*labels).set_function(self._oldest_seconds)

    def looked(self, row: Position, evidence: Evidence) -> None:
        self._backlog = count_backlog(row, evidence)
        self._oldest = None if evidence.next_entry is None else evidence.next_entry.ms / 1000

    def moved(self, move: Move, entries: int, backlog: int) -> None:
        self._carried.inc(entries)
        self._lost.inc(move.lost)
        self._gaps.inc(move.gap)
        self._backlog = backlog
        if not backlog:
            self._oldest = None

    def _oldest_seconds(self) -> float:
        if self._oldest is None or not self._reads():
            return 0.0
        return max(0.0, self._clock.now().timestamp() - self._oldest)


def count_backlog(row: Position, evidence: Evidence) -> int:
    """Entries above the position. Where it is not known how many were read, all that are present."""
    if row.entries_read is None or (evidence.first_entry is not None and evidence.first_entry > row.last):
        return evidence.length
    return max(0, evidence.added - row.entries_read)
