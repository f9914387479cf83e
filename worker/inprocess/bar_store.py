"""`BarStore`: bars of one minute, written from inside an application and read again (seed 002)."""

from __future__ import annotations

import asyncio
from datetime import UTC
from typing import TYPE_CHECKING, Self

from worker.db.record_reads import read_bars, read_latest_bars
from worker.errors import DatabaseRefused, DatabaseUnavailable
from worker.inprocess.connections import Connections, raise_closed
from worker.inprocess.options import WriterOptions
from worker.inprocess.thread import InThread
from worker.inprocess.writer import FLUSH_TIMEOUT_S, PUT_TIMEOUT_S, Writer
from worker.pipelines.records.bars_1m import BARS_1M, Bar

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from types import TracebackType

    from prometheus_client import CollectorRegistry

    from worker.inprocess.stats import WriterStats

MAX_BARS = 100_000
HEALTH_TIMEOUT_S = 5.0
# Bars that are accepted at a stretch: less than a millisecond.
SLICE = 100


class BarStore:
    """Writes bars in batches behind the caller, and reads what is written.

    A later bar of the same symbol and minute replaces all six values. What is not given comes from the environment:
    `DATABASE_URL` or `DB_*`, `BARS_DB_WRITE_QUEUE_SIZE` (`capacity`, in bars), `BARS_DB_WRITE_BATCH_SIZE`,
    `BARS_DB_WRITE_INTERVAL` and `BARS_DB_RETRY_DELAY` (here in seconds), `BARS_DB_MAX_RETRIES`. Its metrics go to
    `registry`. Raises InvalidSettings.
    """

    def __init__(
        self,
        database_url: str | None = None,
        *,
        capacity: int | None = None,
        batch_size: int | None = None,
        batch_timeout: float | None = None,
        max_retries: int | None = None,
        retry_delay: float | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        options = WriterOptions.read(
            BARS_1M,
            database_url=database_url,
            capacity=capacity,
            batch_size=batch_size,
            batch_timeout=batch_timeout,
            max_retries=max_retries,
            retry_delay=retry_delay,
        )
        self._open(Writer(BARS_1M, options, registry), options)

    def _open(self, writer: Writer[Bar], options: WriterOptions) -> None:
        self._writer = writer
        self._options = options
        self._reader = Connections(options)

    async def write_bars(self, bars: Iterable[Bar], timeout: float = PUT_TIMEOUT_S) -> int:
        """Accept bars, in their order, waiting up to `timeout` seconds in all for room; 0 never waits.

        Returns how many were accepted.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + timeout
        accepted = 0
        for number, bar in enumerate(bars):
            accepted += await self._accept(bar, deadline - now())
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
        return accepted

    async def _accept(self, bar: Bar, timeout: float) -> bool:
        return await self._writer.put(bar, timeout) if timeout > 0 else self._writer.send(bar)

    async def get_bars(self, symbol: str, start: datetime, end: datetime) -> list[Bar]:
        """The bars from `start` to `end`, both included, the oldest first; at most 100,000.

        Raises DatabaseUnavailable, DatabaseRefused. Times without a zone are UTC.
        """
        async with self._reader.transaction() as tx:
            found = await read_bars(tx, symbol, _utc(start), _utc(end), MAX_BARS)
        return [Bar(**row) for row in found]

    async def get_latest_bars(self, symbol: str, limit: int) -> list[Bar]:
        """The newest `limit` bars (at most 100,000), the oldest of them first. Raises as `get_bars`."""
        async with self._reader.transaction() as tx:
            found = await read_latest_bars(tx, symbol, max(0, min(limit, MAX_BARS)))
        return [Bar(**row) for row in found]

    async def health(self) -> bool:
        """Whether the database answers within five seconds, and bars are accepted."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S), self._reader.transaction() as tx:
                await read_latest_bars(tx, "", 0)
        except (TimeoutError, DatabaseUnavailable, DatabaseRefused):
            return False
        return self._writer.accepts

    async def flush(self, timeout: float = FLUSH_TIMEOUT_S) -> bool:
        """As `Writer.flush`."""
        return await self._writer.flush(timeout)

    async def close(self, timeout: float | None = None) -> bool:
        """Accept nothing more, and write what is left, as `Writer.shutdown`."""
        try:
            return await self._writer.shutdown(timeout)
        finally:
            await self._reader.close()

    @property
    def stats(self) -> WriterStats:
        return self._writer.stats

    async def start(self) -> None:
        """Start writing. The database need not be reachable."""
        await self._writer.start()

    async def shutdown(self, timeout: float | None = None) -> bool:
        """As `close`."""
        return await self.close(timeout)

    @property
    def is_enabled(self) -> bool:
        return self._writer.is_enabled

    @property
    def is_complete(self) -> bool:
        """As `Writer.is_complete`."""
        return self._writer.is_complete

    def refuse_more(self) -> None:
        """Accept nothing from now on. From any thread."""
        self._writer.refuse_more()

    def again(self) -> Self:
        """Another one with the same options, empty and not started."""
        other = type(self).__new__(type(self))
        other._open(self._writer.again(), self._options)
        return other

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class SyncBarStore(InThread[BarStore]):
    """As `BarStore`, for any thread; on an event loop in a thread of its own, which starts with the first call."""

    def __init__(
        self,
        database_url: str | None = None,
        *,
        capacity: int | None = None,
        batch_size: int | None = None,
        batch_timeout: float | None = None,
        max_retries: int | None = None,
        retry_delay: float | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        super().__init__(
            BarStore(
                database_url,
                capacity=capacity,
                batch_size=batch_size,
                batch_timeout=batch_timeout,
                max_retries=max_retries,
                retry_delay=retry_delay,
                registry=registry,
            )
        )

    def write_bars(self, bars: Iterable[Bar], timeout: float = PUT_TIMEOUT_S) -> int:
        """As `BarStore.write_bars`."""
        taken = list(bars)  # by the caller's thread, however long that takes
        self._start()
        return self._call(self._service.write_bars(taken, timeout), otherwise=lambda: 0)

    def get_bars(self, symbol: str, start: datetime, end: datetime) -> list[Bar]:
        """As `BarStore.get_bars`."""
        self._start()
        return self._call(self._service.get_bars(symbol, start, end), otherwise=raise_closed)

    def get_latest_bars(self, symbol: str, limit: int) -> list[Bar]:
        """As `BarStore.get_latest_bars`."""
        self._start()
        return self._call(self._service.get_latest_bars(symbol, limit), otherwise=raise_closed)

    def health(self) -> bool:
        """As `BarStore.health`."""
        self._start()
        return self._call(self._service.health(), otherwise=lambda: False)

    def flush(self, timeout: float = FLUSH_TIMEOUT_S) -> bool:
        """As `BarStore.flush`."""
        self._start()
        return self._call(self._service.flush(timeout), otherwise=lambda: self._service.is_complete)

    def close(self, timeout: float | None = None) -> bool:
        """As `BarStore.close`. Returns when the thread has ended."""
        return self.shutdown(timeout)

    @property
    def stats(self) -> WriterStats:
        return self._service.stats


def _utc(time: datetime) -> datetime:
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
