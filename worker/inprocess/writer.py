"""`Writer`: records of an application, written from inside its process. It needs no Redis."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar
from uuid import UUID
from weakref import WeakSet

import msgspec

from worker.inprocess.metrics import metrics_in
from worker.inprocess.options import WriterOptions
from worker.inprocess.running import Running
from worker.inprocess.stats import WriterStats
from worker.observability.logs import get_logger
from worker.observability.throttle import Throttle
from worker.pipelines.batcher import Batcher, CoalescingBatcher
from worker.pipelines.buffer import Buffer, ByteBudget
from worker.pipelines.drain import Tally
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS, ChunkEvent
from worker.pipelines.records.fields import replace_surrogates
from worker.runtime.clock import SystemClock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from prometheus_client import CollectorRegistry

    from worker.pipelines.model import Batch, RecordType

log = get_logger("worker.writer")

R = TypeVar("R")

LOG_PERIOD_S = 60.0
PUT_TIMEOUT_S = 0.1
FLUSH_TIMEOUT_S = 5.0
LOOK_AGAIN_S = 0.1
FULL = "buffer full"
CLOSED = "shut down"
# They would be encoded as text, and stored as such: bytes in base64.
_FOREIGN = frozenset({bytes, bytearray, memoryview, UUID, Decimal})

# Shared by all Writers of the process.
_budget = ByteBudget(0)


class Writer(Generic[R]):
    """Accepts records without waiting, and writes them in batches on the event loop on which it was started.

    `async with` starts it and shuts it down. What it accepted is written exactly once while the process lives.
    """

    def __init__(
        self, record: RecordType[Any], options: WriterOptions, registry: CollectorRegistry | None = None
    ) -> None:
        clock = SystemClock()
        _budget.limit = options.buffer_bytes
        self._record = record
        self.is_enabled = options.enabled
        self._stamp = record.stamp
        self._coalesce_by = record.coalesce_by
        self._options = options
        self._clock = clock
        self._registry = registry
        self._metrics = metrics_in(registry, record.name)
        self._metrics.add(self)
        self._throttle = Throttle(LOG_PERIOD_S, clock.monotonic, max_topics=100)
        self._encoder = msgspec.json.Encoder().encode
        kind = Batcher[bytes] if record.coalesce_by is None else CoalescingBatcher[bytes]
        # A full buffer must not wait for a batch that is not.
        batch_size = min(options.batch_size, options.capacity)
        self._batcher = kind(batch_size, options.batch_timeout)
        self._buffer = Buffer(
            self._batcher,
            batch_size=batch_size,
            capacity=options.capacity,
            budget=_budget,
            monotonic=time.monotonic,
            on_due=self._wake,
            on_coalesced=self._metrics.coalesced,
        )
        self._tally = Tally()
        self._running: Running | None = None
        self._ending: asyncio.Task[None] | None = None
        self._has_ended = False
        _writers.add(self)

    @staticmethod
    def chunk_requests(
        database_url: str | None = None,
        *,
        capacity: int | None = None,
        writers: int | None = None,
        batch_size: int | None = None,
        batch_timeout: float | None = None,
        max_retries: int | None = None,
        retry_delay: float | None = None,
        enabled: bool | None = None,
        registry: CollectorRegistry | None = None,
    ) -> Writer[ChunkEvent]:
        """A Writer for the table `chunk_requests`.

        What is not given comes from the environment: `DATABASE_URL` or `DB_*`, `CHUNKLOG_CHANNEL_CAP` (`capacity`, in
        records), `CHUNKLOG_WORKERS`, `CHUNKLOG_BATCH_SIZE`, `CHUNKLOG_BATCH_TIMEOUT` and `CHUNKLOG_RETRY_DELAY` (here
        in seconds), `CHUNKLOG_MAX_RETRIES`, `CHUNKLOG_ENABLED`. With `enabled=False` it accepts everything and does
        nothing. Its metrics are added to `registry`. Raises InvalidSettings.
        """
        options = WriterOptions.read(
            CHUNK_REQUESTS,
            database_url=database_url,
            capacity=capacity,
            writers=writers,
            batch_size=batch_size,
            batch_timeout=batch_timeout,
            max_retries=max_retries,
            retry_delay=retry_delay,
            enabled=enabled,
        )
        return Writer(CHUNK_REQUESTS, options, registry)

    def send(self, record: R) -> bool:
        """Accept a record, from any thread; it never waits and never raises.

        False: the buffer is full, this Writer is shut down, or the record cannot be encoded. It is counted and logged.
        """
        if not self.is_enabled:
            return True
        document = self._encode(record)
        if document is None:
            return False
        return self._add(document, record) or self.refuse()

    async def put(self, record: R, timeout: float = PUT_TIMEOUT_S) -> bool:
        """As `send`, but wait up to `timeout` seconds for room."""
        if not self.is_enabled:
            return True
        document = self._encode(record)
        if document is None:
            return False
        try:
            async with asyncio.timeout(timeout):
                while not self._add(document, record):
                    if self._buffer.is_closed or self._running is None:
                        return self.refuse()
                    with contextlib.suppress(TimeoutError):
                        # Another Writer of the process may also make room, in the bytes that they share.
                        async with asyncio.timeout(LOOK_AGAIN_S):
                            await self._running.source.wait_for_room()
        except TimeoutError:
            # Another Writer of the process may have made room in the bytes that they share.
            return self._add(document, record) or self.refuse()
        return True

    async def flush(self, timeout: float = FLUSH_TIMEOUT_S) -> bool:
        """Wait until everything that is accepted so far is in the database. False after `timeout` seconds, or at the
        end of a shutdown that left records.
        """
        if self._running is None:
            return self.is_complete
        try:
            async with asyncio.timeout(timeout):
                return await self._running.source.flush()
        except TimeoutError:
            return False

    @property
    def stats(self) -> WriterStats:
        # Read once, and before what is accepted: other threads go on meanwhile.
        tally = replace(self._tally)
        accepted, coalesced = self._buffer.accepted, self._buffer.coalesced
        left = accepted - coalesced - tally.total
        return WriterStats(
            accepted=accepted,
            refused=self._buffer.refused,
            coalesced=coalesced,
            written=tally.written,
            repeated=tally.repeated,
            dead=tally.dead,
            dropped=tally.dropped,
            unknown=tally.unknown,
            unwritten=left if self._has_ended else 0,
            queued=0 if self._has_ended else left,
        )

    @property
    def accepts(self) -> bool:
        """Whether there is room for a small record."""
        return self._buffer.has_room

    @property
    def is_complete(self) -> bool:
        """Everything that was accepted is written, as far as it is known."""
        return not self._buffer.held and not self.stats.unwritten and not self._tally.unknown

    def find_waiting(self, key: str) -> bytes | None:
        """The document of a record that waits, by its key."""
        return self._batcher.find(key)

    @property
    def in_flight(self) -> Sequence[Batch[Any]]:
        """The batches that are being written."""
        return [] if self._running is None else self._running.source.in_flight

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
        return 0 if self._running is None else self._running.pausing

    async def start(self) -> None:
        """Start writing, also what was sent before. The database need not be reachable."""
        if self.is_enabled and self._running is None and self._ending is None and not self._has_ended:
            self._running = Running(
                self._record, self._options, self._buffer, self._tally, self._metrics, self._clock, self._throttle
            )

    async def shutdown(self, timeout: float | None = None) -> bool:
        """Accept nothing more, and write what is left for up to `timeout` seconds (default: `SHUTDOWN_TIMEOUT`).

        False when records are left: they are counted and logged. It goes on when it is cancelled, and may be called
        again.
        """
        if self._ending is None:
            self.refuse_more()
            limit = self._options.shutdown_timeout if timeout is None else timeout
            self._ending = asyncio.create_task(self._end(limit), name=f"{self._record.name} writer shutdown")
        await asyncio.shield(self._ending)
        return self.is_complete

    def again(self) -> Writer[R]:
        """Another one with the same options, empty and not started."""
        return Writer(self._record, self._options, self._registry)

    def refuse_more(self) -> None:
        """Accept nothing from now on. From any thread."""
        self._buffer.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    def _add(self, document: bytes, record: R) -> bool:
        if self._coalesce_by is None:
            return self._buffer.add(document)
        key = self._coalesce_by(record)
        # What is not a key becomes a dead letter, and must not replace another record.
        return self._buffer.add(document, key if isinstance(key, str) else object())

    def _encode(self, record: R) -> bytes | None:
        """The record as a document: changes to it later change nothing, and its size is known. None: impossible."""
        try:
            if not _FOREIGN.isdisjoint(map(type, msgspec.structs.astuple(record))):  # type: ignore[arg-type]
                raise TypeError("a field has bytes or another type that JSON does not have")
            if self._stamp is not None:
                record = self._stamp(record, self._clock.now)
            try:
                return self._encoder(record)
            except UnicodeEncodeError:
                return self._encoder(replace_surrogates(record))  # type: ignore[type-var]
        except Exception as error:
            # The application must not fail because of a record.
            if self._throttle.allows("encode"):
                log.error("record cannot be encoded", pipeline=self._record.name, exc_info=error)
            self._buffer.refuse()
            self._metrics.refused()
            return None

    def refuse(self, cause: str = "") -> bool:
        """Count and log a record that is not accepted, by default since there is no room. Returns False."""
        self._buffer.refuse()
        cause = cause or (CLOSED if self._buffer.is_closed else FULL)
        self._metrics.refused(full=cause == FULL, closed=cause == CLOSED)
        if self._throttle.allows(cause):
            log.warning("record refused", pipeline=self._record.name, cause=cause, refused=self._buffer.refused)
        return False

    def _wake(self) -> None:
        """Called by the thread that sends."""
        if self._running is not None and not self._has_ended:
            self._running.wake()

    async def _end(self, timeout: float) -> None:
        try:
            if self._running is not None:
                await self._running.finish(timeout)
        finally:
            self._has_ended = True
            stats = self.stats
            if stats.unwritten or stats.unknown:
                log.error(
                    "records left at shutdown",
                    pipeline=self._record.name,
                    unwritten=stats.unwritten,
                    unknown=stats.unknown,
                )
            self._metrics.left(stats.unwritten, stats.unknown)
            self._buffer.clear()
            if self._running is not None:
                await self._running.close()

    def _forked(self) -> None:
        """In the child of a fork: what is held belongs to the parent, and a Writer that was started runs there only."""
        self._tally = Tally()
        self._buffer.forked()
        if self._running is not None or self._ending is not None:
            _of_parent.append((self._running, self._ending))
            self._running = self._ending = None
            self._buffer.close()
            self._has_ended = True


_writers: WeakSet[Writer[Any]] = WeakSet()
# What a child must not destroy: the sockets and the event loop's descriptors are the parent's, too.
_of_parent: list[object] = []


def _after_fork() -> None:
    _budget.forked()
    for writer in list(_writers):
        writer._forked()


os.register_at_fork(after_in_child=_after_fork)
