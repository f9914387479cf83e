"""The tasks of a Writer that was started."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from worker.db.session import Database
from worker.db.upsert import RecordTable
from worker.inprocess.ticket_pruning import prune_tickets_hourly
from worker.observability.logs import get_logger
from worker.pipelines.delivery import Delivery
from worker.pipelines.drain import Drain, Tally
from worker.pipelines.sink import PostgresSink
from worker.pipelines.sources.buffered import BufferedSource

if TYPE_CHECKING:
    from worker.inprocess.options import WriterOptions
    from worker.observability.throttle import Throttle
    from worker.pipelines.buffer import Buffer
    from worker.pipelines.metrics import BufferMetrics
    from worker.pipelines.model import RecordType
    from worker.runtime.clock import Clock

log = get_logger("worker.writer")


class Running:
    """Writes what is in the buffer, from now on and on this event loop. `closing`: its end is near, hurry."""

    def __init__(
        self,
        record: RecordType[Any],
        options: WriterOptions,
        buffer: Buffer,
        tally: Tally,
        metrics: BufferMetrics,
        clock: Clock,
        warnings: Throttle,
    ) -> None:
        self._record = record
        self._options = options
        self._metrics = metrics
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self._database = Database(options.database, options.writers, overflow=1, recycle=options.recycle)
        self.source: BufferedSource[Any] = BufferedSource(record, options.window, buffer, clock)
        self._drains = [
            Drain(self.source, self._make_delivery(), tally, clock, self._closing, warnings)
            for _ in range(options.writers)
        ]
        name = f"{record.name} writer"
        self._writing = [
            asyncio.create_task(drain.run(), name=f"{name} {number}") for number, drain in enumerate(self._drains)
        ]
        for task in self._writing:
            task.add_done_callback(self._report_end)
        self._pruning = asyncio.create_task(prune_tickets_hourly(self._database), name=f"{name} tickets")

    @property
    def pausing(self) -> int:
        """Records that wait for their next try."""
        return sum(drain.pausing for drain in self._drains)

    def wake(self) -> None:
        """A batch may be due. From any thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self.source.wake)

    async def finish(self, timeout: float) -> None:
        """Write what is left, for up to `timeout` seconds; then no task runs any more."""
        self._closing.set()
        await self.source.close()
        try:
            await asyncio.wait(self._writing, timeout=timeout)
        finally:
            if not all(task.done() for task in self._writing):
                self._database.abort()
            tasks = [*self._writing, self._pruning]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """After `finish`."""
        self.source.abandon()
        await self._database.close()

    def _make_delivery(self) -> Delivery[Any]:
        table = RecordTable(self._record, future=self._options.window.future)
        return Delivery(
            PostgresSink(self._database, self._record, table),
            self._metrics.make_write_metrics(),
            self._clock,
            max_retries=self._options.max_retries,
            retry_delay=self._options.retry_delay,
        )

    def _report_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("writer stopped", pipeline=self._record.name, exc_info=error)
            self._metrics.stopped()
