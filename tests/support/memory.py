"""A source and a sink in memory, which behave as the real ones: tests/integration/test_conformance.py checks that."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from worker.errors import TableRefused, UnknownFailure
from worker.pipelines.model import Batch, Idle, Item, Letter, NotClaimed, ReadOutcome, WriteOutcome, Written


@dataclass
class MemoryTransaction:
    """What a transaction sees and changes; its changes count when it is committed."""

    claimed: set[object]


@dataclass(frozen=True)
class MemoryClaim:
    """A number is taken once."""

    number: object

    async def take(self, tx: Any) -> bool:
        assert isinstance(tx, MemoryTransaction)
        is_free = self.number not in tx.claimed
        tx.claimed.add(self.number)
        return is_free


@dataclass
class MemorySource:
    """Reads `documents` in batches of `size`. A document that starts with `!` is not valid."""

    size: int = 2
    documents: list[bytes] = field(default_factory=list)
    _position: int = 0
    _added: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, *documents: bytes) -> None:
        self.documents += documents
        self._added.set()

    async def read(self) -> ReadOutcome[str]:
        return self._after(self._position)

    async def read_ahead(self, batch: Batch[str]) -> Batch[str] | None:
        following = self._after(self._end(batch))
        return following if isinstance(following, Batch) else None

    def done(self, batch: Batch[str], outcome: WriteOutcome) -> None:
        self._position = self._end(batch)

    def reset(self, *, smaller: bool = False) -> None:
        """Nothing that was read is kept."""

    async def wait(self, seconds: float) -> None:
        self._added.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._added.wait(), seconds)

    async def close(self) -> None: ...

    def _after(self, position: int) -> Batch[str] | Idle:
        some = list(enumerate(self.documents))[position : position + self.size]
        if not some:
            return Idle()
        items = [Item(key, text, text.decode()) for key, text in some if not text.startswith(b"!")]
        letters = [Letter(f"m/{key}", "not_json", "no", text) for key, text in some if text.startswith(b"!")]
        return Batch(MemoryClaim(position), "m", items, letters, full=len(some) == self.size)

    @staticmethod
    def _end(batch: Batch[str]) -> int:
        assert isinstance(batch.claim, MemoryClaim)
        assert isinstance(batch.claim.number, int)
        return batch.claim.number + len(batch)


@dataclass
class MemorySink:
    """Keeps rows and letters.

    A document that contains `refused` does not fit; one that contains `strange` fails for an unknown reason.
    """

    rows: list[Any] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)
    claimed: set[object] = field(default_factory=set)
    refuses_all: bool = False

    async def write(
        self, batch: Batch[Any], *, isolate: bool = False, before_commit: Callable[[], None] = lambda: None
    ) -> WriteOutcome:
        tx = MemoryTransaction(set(self.claimed))
        if not await batch.claim.take(tx):
            return NotClaimed()
        if self.refuses_all:
            raise TableRefused("no such table", "")
        bad = self._find(batch.items, isolate=isolate)
        before_commit()
        letters = [*batch.letters, *(Letter(f"{batch.origin}/{item.key}", "refused", "", item.payload) for item in bad)]
        self.claimed = tx.claimed
        self.rows += [item.record for item in batch.items if item not in bad]
        self.letters += letters
        return Written(len(batch.items) - len(bad), len(letters))

    @staticmethod
    def _find(items: Sequence[Item[Any]], *, isolate: bool) -> list[Item[Any]]:
        strange = [item for item in items if b"strange" in item.payload]
        if strange and not isolate:
            raise UnknownFailure("strange")
        return [item for item in items if b"refused" in item.payload or item in strange]
