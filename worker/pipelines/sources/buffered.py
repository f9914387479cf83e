"""A process's memory as a source: what an application sends, in batches that each have a ticket."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar
from uuid import uuid4

from worker.contract.entry_id import EntryId
from worker.db.tickets import Ticket
from worker.pipelines.batcher import ClosedBy
from worker.pipelines.model import Batch, Idle, InvalidRecord, Item, Letter
from worker.pipelines.sources.stream.entries import KEPT_BYTES, MAX_ENTRY_BYTES, TOO_LARGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from worker.pipelines.buffer import Buffer
    from worker.pipelines.model import ReadOutcome, RecordType, Window, WriteOutcome
    from worker.runtime.clock import Clock

R = TypeVar("R")

# Documents that are parsed at a stretch: less than a millisecond.
SLICE = 100


@dataclass(frozen=True, slots=True)
class BufferedBatch(Batch[R]):
    """`number`: how many records were accepted before its first one. It holds `records` of `size` bytes together."""

    number: int = 0
    records: int = 0
    size: int = 0


class BufferedSource(Generic[R]):
    """Implements Source. `next` lets several readers compete for batches.

    A record arrives when it is accepted. It is validated when its batch is read, as an entry of a stream is. One that
    is not valid becomes a dead letter; with `drop_invalid` that is called instead, with the error and the document.
    """

    def __init__(
        self,
        record: RecordType[R],
        window: Window,
        buffer: Buffer,
        clock: Clock,
        new_id: Callable[[], UUID] = uuid4,
        drop_invalid: Callable[[InvalidRecord, bytes], None] | None = None,
    ) -> None:
        self._record = record
        self._window = window
        self._buffer = buffer
        self._clock = clock
        self._new_id = new_id
        self._drop_invalid = drop_invalid
        self._turn = asyncio.Lock()
        self._flush_to = 0
        # Number → the batch, from when it is taken until it is done. None while it is being parsed.
        self._in_flight: dict[int, BufferedBatch[R] | None] = {}
        # What the wall clock is ahead of the clock that never jumps: it never decreases.
        self._ahead = -math.inf
        self._again: deque[BufferedBatch[R]] = deque()
        self._due = asyncio.Event()
        self._done = asyncio.Event()
        self._is_abandoned = False

    @property
    def in_flight(self) -> list[BufferedBatch[R]]:
        """The batches that are being written. From any thread."""
        return [batch for batch in list(self._in_flight.values()) if batch is not None]

    def wake(self) -> None:
        """A batch may be due. Call it on the event loop."""
        self._due.set()

    async def next(self) -> BufferedBatch[R] | None:
        """Wait for the next batch. None when the buffer is closed and empty."""
        async with self._turn:
            while True:
                self._due.clear()
                read = await self.read()
                if isinstance(read, BufferedBatch):
                    return read
                if self._buffer.is_closed:
                    return None
                await self.wait(math.inf)

    async def read(self) -> ReadOutcome[R]:
        if self._again:
            return self._again.popleft()
        number = self._buffer.taken
        closed = self._buffer.take(flush_to=self._buffer.added if self._buffer.is_closed else self._flush_to)
        if closed is None:
            return Idle()
        self._in_flight[number] = None
        batch = await self._make(closed.items, number, full=closed.by is ClosedBy.SIZE)
        self._in_flight[number] = batch
        return batch

    async def read_ahead(self, batch: Batch[R]) -> Batch[R] | None:
        """None: another reader may take it."""

    def done(self, batch: Batch[R], outcome: WriteOutcome) -> None:
        assert isinstance(batch, BufferedBatch)  # noqa: S101
        del self._in_flight[batch.number]
        self._buffer.release(batch.records, batch.size)
        self._report_progress()

    def reset(self, *, smaller: bool = False) -> None:
        """Every batch that is not done is read again, with its ticket."""
        self._again = deque(self.in_flight)

    async def wait(self, seconds: float) -> None:
        timeout = min(seconds, self._buffer.due())
        # Not `wait_for`: that of Python 3.11 may lose a cancellation.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if timeout == math.inf else timeout):
                await self._due.wait()

    async def wait_for_room(self) -> None:
        """Until a batch is done, or the buffer is closed."""
        await self._done.wait()

    async def flush(self) -> bool:
        """Until every record that is accepted so far is done: True; False where nobody reads any more.

        Batches that are not full do not wait for more.
        """
        target = self._flush_to = self._buffer.added
        self._due.set()
        while min(self._in_flight, default=self._buffer.taken) < target:
            if self._is_abandoned:
                return False
            await self._done.wait()
        return True

    def abandon(self) -> None:
        """What is not done never will be: wait for it no longer."""
        self._is_abandoned = True
        self._report_progress()

    async def close(self) -> None:
        """Accept nothing more. What was accepted can still be read."""
        self._buffer.close()
        self._due.set()
        self._report_progress()

    def _report_progress(self) -> None:
        done, self._done = self._done, asyncio.Event()
        done.set()

    def halve(self, batch: Batch[R]) -> tuple[Batch[R], Batch[R]]:
        """Two batches with tickets of their own, for one of several records that was certainly not written."""
        middle = len(batch.items) // 2
        first, second = self._new_ticket(), self._new_ticket()
        return (
            Batch(first, str(first.id), batch.items[:middle], batch.letters, oldest=batch.oldest),
            Batch(second, str(second.id), batch.items[middle:], oldest=batch.oldest),
        )

    def _new_ticket(self) -> Ticket:
        return Ticket(self._new_id(), self._record.name)

    async def _make(self, documents: Sequence[tuple[float, bytes]], number: int, *, full: bool) -> BufferedBatch[R]:
        ticket = self._new_ticket()
        items: list[Item[R]] = []
        letters: list[Letter] = []
        # Arrivals were taken from a clock that never jumps. A position is above those that were accepted before, also
        # where the wall clock was set back; where records are coalesced, an earlier batch may have later arrivals.
        now = self._clock.now().timestamp() - self._clock.monotonic()
        self._ahead = max(self._ahead, now)
        has_position = bool(self._record.rule.position)
        for index, (at, document) in enumerate(documents):
            arrived = EntryId(int((self._ahead + at) * 1000), number + index)
            # A replay needs the position of a dead letter where the table does.
            key: object = arrived if has_position else index
            try:
                if len(document) > MAX_ENTRY_BYTES:
                    raise InvalidRecord(TOO_LARGE, f"the record has {len(document)} bytes; 1 MiB is the limit")
                items.append(Item(key, document, self._record.parse(document, arrived, self._window)))
            except InvalidRecord as error:
                if self._drop_invalid is None:
                    kept = document if len(document) <= MAX_ENTRY_BYTES else document[:KEPT_BYTES]
                    letters.append(Letter(f"{ticket.id}/{key}", error.error_class, str(error), kept))
                else:
                    self._drop_invalid(error, document)
            # Coalesced records can be asked for by their key, at any moment.
            if index % SLICE == SLICE - 1 and self._record.coalesce_by is None:
                await asyncio.sleep(0)
        return BufferedBatch(
            claim=ticket,
            origin=str(ticket.id),
            items=items,
            letters=letters,
            full=full,
            oldest=now + min(at for at, _ in documents),
            number=number,
            records=len(documents),
            size=sum(len(document) for _, document in documents),
        )
