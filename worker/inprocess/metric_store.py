"""`MetricStore`: batches of metrics, each written in one transaction from inside an application (seed 003)."""

from __future__ import annotations

import asyncio
from math import isfinite
from typing import TYPE_CHECKING, Any, Self

import msgspec

from worker.contract.entry_id import EntryId
from worker.db.transaction_settings import APPLY_SETTINGS
from worker.db.upsert import RecordTable
from worker.errors import DatabaseUnavailable, InvalidMetric
from worker.inprocess.connections import Connections, raise_closed
from worker.inprocess.options import WriterOptions
from worker.inprocess.thread import InThread
from worker.pipelines.model import CommitUnanswered, InvalidRecord, Written
from worker.pipelines.records import fields
from worker.pipelines.records.metrics import METRICS, Metric
from worker.runtime.clock import SystemClock

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from types import TracebackType

# In a statement: some milliseconds of this process's time.
ROWS_AT_ONCE = 5000
# Records that are checked at a stretch: about a millisecond.
SLICE = 100
# For the errors of connections that were cut.
CUT_S = 1.0

_encode = msgspec.json.Encoder().encode


class MetricStore:
    """Inserts batches of metrics, each in one transaction. It has no buffer, and never tries again: the caller does.

    What is not given comes from the environment: `DATABASE_URL` or `DB_*`. Raises InvalidSettings.
    """

    def __init__(self, database_url: str | None = None) -> None:
        self._open(WriterOptions.read(METRICS, database_url=database_url))

    def _open(self, options: WriterOptions) -> None:
        self._options = options
        self._connections = Connections(options)
        self._table = RecordTable(METRICS)
        self._clock = SystemClock()
        self._is_closed = False
        self._running = 0
        self._idle = asyncio.Event()

    async def bulk_insert_metrics(self, batch: Iterable[Metric]) -> int:
        """Insert all metrics of a batch, or none. Returns the number of new rows: a `time` and `event_id` that the
        table already has make none.

        Raises InvalidMetric before anything is sent. After DatabaseUnavailable and DatabaseRefused nothing was
        written, except for CommitUnanswered, a DatabaseUnavailable: the batch was written, or nothing was.
        """
        if self._is_closed:
            raise_closed()
        self._running += 1
        try:
            rows = await self._read(tuple(batch))
            return await self._write(rows) if rows else 0
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _read(self, batch: tuple[Metric, ...]) -> list[tuple[Any, ...]]:
        """The rows. Each metric is checked as an entry of the stream that arrives now."""
        now = self._clock.now()
        arrived = EntryId(int(now.timestamp() * 1000), 0)
        rows = []
        for index, metric in enumerate(batch):
            try:
                checked = METRICS.parse(_encode_metric(metric, now), arrived, self._options.window)
            except InvalidRecord as error:
                raise InvalidMetric(index, str(error)) from None
            rows.append(METRICS.row(checked))
            if index % SLICE == SLICE - 1:
                await asyncio.sleep(0)
        return rows

    async def _write(self, rows: list[tuple[Any, ...]]) -> int:
        inserted: int | None = None
        try:
            async with self._connections.transaction() as tx:
                if self._connections.is_closed:  # while this call waited for a connection
                    raise_closed()
                await tx.execute(APPLY_SETTINGS)
                inserted = await self._table.insert_all(tx, rows, ROWS_AT_ONCE)
        except DatabaseUnavailable as error:
            if inserted is None:
                raise
            cause = f"the commit had no answer, so the batch may be written or not: {error}"
            raise CommitUnanswered(cause, Written(inserted, repeated=len(rows) - inserted)) from error
        return inserted

    async def close(self, timeout: float | None = None) -> bool:
        """Accept nothing more, and wait up to `timeout` seconds (default: `SHUTDOWN_TIMEOUT`) for running calls.

        False: some were cut, and raise DatabaseUnavailable.
        """
        self.refuse_more()
        try:
            return await self._wait(self._options.shutdown_timeout if timeout is None else timeout) or await self._cut()
        finally:
            await self._connections.close()

    async def _cut(self) -> bool:
        self._connections.cut()
        await self._wait(CUT_S)
        return False

    async def _wait(self, seconds: float) -> bool:
        """Until no call is running. False after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while self._running:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return not self._running
        return True

    async def start(self) -> None:
        """Does nothing: a connection is opened by the first call."""

    async def shutdown(self, timeout: float | None = None) -> bool:
        """As `close`."""
        return await self.close(timeout)

    @property
    def is_enabled(self) -> bool:
        return True

    @property
    def is_complete(self) -> bool:
        """No call is running."""
        return not self._running

    def refuse_more(self) -> None:
        """Accept nothing from now on. From any thread."""
        self._is_closed = True

    def again(self) -> Self:
        """Another one with the same options."""
        other = type(self).__new__(type(self))
        other._open(self._options)
        return other

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class SyncMetricStore(InThread[MetricStore]):
    """As `MetricStore`, for any thread; on an event loop in a thread of its own, which starts with the first call."""

    def __init__(self, database_url: str | None = None) -> None:
        super().__init__(MetricStore(database_url))

    def bulk_insert_metrics(self, batch: Iterable[Metric]) -> int:
        """As `MetricStore.bulk_insert_metrics`."""
        taken = tuple(batch)  # by the caller's thread, however long that takes
        self._start()
        return self._call(self._service.bulk_insert_metrics(taken), otherwise=raise_closed)

    def close(self, timeout: float | None = None) -> bool:
        """As `MetricStore.close`. Returns when the thread has ended."""
        return self.shutdown(timeout)


def _encode_metric(metric: object, now: datetime) -> bytes:
    """The document of an entry. Raises InvalidRecord for what JSON does not have, or has as another type."""
    if not isinstance(metric, Metric):
        raise InvalidRecord("invalid_field", f"expected a Metric, got `{type(metric).__name__}`")
    stamped = fields.stamp(metric, lambda: now)
    try:
        typed = msgspec.convert(msgspec.structs.asdict(stamped), Metric)
        if not isfinite(typed.value):
            raise InvalidRecord("invalid_field", "`value` is not a finite number")
        return _encode(typed)
    except UnicodeEncodeError:
        valid = fields.replace_surrogates(metric)
        name = next(name for name in metric.__struct_fields__ if getattr(valid, name) != getattr(metric, name))
        raise InvalidRecord("invalid_field", f"`{name}` is not Unicode") from None
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise InvalidRecord("invalid_field", str(error)) from None
