"""Writes what is in a buffer of the worker, until the buffer is closed and empty."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from worker.errors import cause_of
from worker.observability.logs import get_logger
from worker.observability.printable import excerpt
from worker.observability.throttle import Throttle
from worker.pipelines.drain import Drain, Tally
from worker.pipelines.sources.buffered import BufferedSource

if TYPE_CHECKING:
    from worker.errors import ViewerWorkerError
    from worker.observability.status import Status
    from worker.pipelines.buffer import Buffer
    from worker.pipelines.delivery import Delivery
    from worker.pipelines.metrics import BufferMetrics
    from worker.pipelines.model import InvalidRecord, RecordType, Window
    from worker.runtime.clock import Clock

log = get_logger(__name__)

LOG_PERIOD_S = 60.0
# After an error that no drain expects.
PAUSE_S = 1.0
UNEXPECTED = "The log has the details. Records wait in the buffer; when it is full, more are dropped and counted."


class BufferWriter:
    """A loop. `name` is that of the loop and of its check.

    Records that are not valid are dropped, counted and logged once a minute: their source may send any number of them.
    """

    def __init__(
        self,
        *,
        name: str,
        record: RecordType[Any],
        window: Window,
        buffer: Buffer,
        delivery: Delivery[Any],
        metrics: BufferMetrics,
        status: Status,
        clock: Clock,
    ) -> None:
        self._name = name
        self._record = record
        self._buffer = buffer
        self._delivery = delivery
        self._metrics = metrics
        self._status = status
        self._clock = clock
        self._warnings = Throttle(LOG_PERIOD_S, clock.monotonic, max_topics=100)
        self._tally = Tally()
        self._drain: Drain[Any] | None = None
        self.source: BufferedSource[Any] = BufferedSource(
            record, window, buffer, clock, drop_invalid=self._drop_invalid
        )
        metrics.add(self)

    @property
    def held(self) -> int:
        """Records that are accepted and not written."""
        return self._buffer.held

    @property
    def capacity(self) -> int:
        """How many records it may hold."""
        return self._buffer.capacity

    @property
    def pausing(self) -> int:
        """Those of them that wait for their next try."""
        return 0 if self._drain is None else self._drain.pausing

    async def run(self, stop: asyncio.Event) -> None:
        self._status.ok(self._name)
        self._drain = Drain(
            self.source, self._delivery, self._tally, self._clock, stop, self._warnings, report=self._report
        )
        try:
            while not await self._write(self._drain):
                pass
        finally:
            self._count_left()

    async def _write(self, drain: Drain[Any]) -> bool:
        """Until there is nothing more. False: an error that concerns one batch must not end the process."""
        try:
            await drain.run()
        except Exception as error:
            log.error("writer failed", pipeline=self._record.name, exc_info=error)
            self._status.failing(self._name, cause_of(error), UNEXPECTED)
            await asyncio.sleep(PAUSE_S)
            return False
        return True

    def _report(self, error: ViewerWorkerError | None) -> None:
        if error is None:
            self._status.ok(self._name)
        else:
            self._status.failing(self._name, str(error), error.remedy or UNEXPECTED)

    def _drop_invalid(self, error: InvalidRecord, document: bytes) -> None:
        self._tally.dropped += 1
        self._metrics.refused()
        if self._warnings.allows(error.error_class):
            log.warning(
                "record dropped",
                pipeline=self._record.name,
                kind=error.error_class,
                cause=str(error),
                record=excerpt(document),
            )

    def _count_left(self) -> None:
        """At the end. Records are left where the deadline of the shutdown has passed."""
        unknown = self._tally.unknown
        unwritten = self._buffer.accepted - self._tally.total
        if unwritten or unknown:
            log.error("records left at shutdown", pipeline=self._record.name, unwritten=unwritten, unknown=unknown)
        self._metrics.left(unwritten, unknown)
        self._buffer.clear()
