"""Holds accepted documents until they are written. Bounded in records and bytes; any thread may add."""

from __future__ import annotations

from threading import RLock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from worker.pipelines.batcher import Batcher, Closed

# What a waiting document takes besides its own bytes.
OVERHEAD_BYTES = 120
# A document that replaces one may exceed the limit by so much: else a full buffer would keep the older one.
MAX_GROWTH_BYTES = 1024


class ByteBudget:
    """Bytes that all buffers of a process may hold together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        # Also that of the buffers: an addition takes one lock. Re-entrant: a signal handler or a finalizer may add
        # while its thread is adding.
        self.lock = RLock()

    def forked(self) -> None:
        """In the child of a fork, another thread may have held the lock."""
        self.held = 0
        self.lock = RLock()


class Buffer:
    """Capacity is held until `release`, so it bounds what waits and what is being written together.

    `held` is how many records that is; `accepted`, `coalesced`, `taken` and `refused` how many there ever were.
    `capacity` is in records. `on_due` is called, by the thread that adds, when the reader may have something to do.
    """

    def __init__(
        self,
        batcher: Batcher[bytes],
        *,
        batch_size: int,
        capacity: int,
        budget: ByteBudget,
        monotonic: Callable[[], float],
        on_due: Callable[[], None],
        on_coalesced: Callable[[], None] = lambda: None,
    ) -> None:
        self._batcher = batcher
        self._batch_size = batch_size
        self.capacity = capacity
        self._budget = budget
        self._lock = budget.lock
        self._monotonic = monotonic
        self._on_due = on_due
        self._on_coalesced = on_coalesced
        self._bytes = 0
        self.held = 0
        self.accepted = 0
        self.coalesced = 0
        self.taken = 0
        self.refused = 0
        self.is_closed = False

    @property
    def added(self) -> int:
        """How many records there ever were that did not replace one that waited."""
        with self._lock:
            return self.accepted - self.coalesced

    def add(self, document: bytes, key: Hashable = None, at: float | None = None) -> bool:
        """Never waits. False: full or closed. A full buffer still takes a document whose key waits already.

        `at` is when it arrived, by the buffer's clock; None: now.
        """
        size = len(document) + OVERHEAD_BYTES
        budget = self._budget
        with self._lock:
            if key is not None and self._replace(key, document):
                return True
            if self.is_closed or self.held >= self.capacity or budget.held + size > budget.limit:
                return False
            self.held += 1
            self.accepted += 1
            self._bytes += size
            budget.held += size
            waiting = self._batcher.add(document, self._monotonic() if at is None else at, key)
        if waiting == 1 or waiting == self._batch_size:
            self._on_due()
        return True

    def _replace(self, key: Hashable, document: bytes) -> bool:
        """Put the document in the place of one that waits. False: none does, or there is no room in bytes."""
        older = self._batcher.find(key)
        if older is None or self.is_closed:
            return False
        growth = len(document) - len(older)
        if growth > MAX_GROWTH_BYTES and self._budget.held + growth > self._budget.limit:
            return False
        self._batcher.replace(key, document, self._monotonic())
        self.accepted += 1
        self.coalesced += 1
        self._bytes += growth
        self._budget.held += growth
        self._on_coalesced()
        return True

    @property
    def has_room(self) -> bool:
        """Whether a small document would be accepted now."""
        budget = self._budget
        return not self.is_closed and self.held < self.capacity and budget.held + OVERHEAD_BYTES < budget.limit

    def refuse(self) -> None:
        """Count a record that was not added."""
        with self._lock:
            self.refused += 1

    def take(self, *, flush_to: int = 0) -> Closed[bytes] | None:
        """The next batch if one is closed; as it is, where it has one of the first `flush_to` records accepted."""
        with self._lock:
            closed = self._batcher.take(self._monotonic(), flush=self.taken < flush_to)
            if closed is not None:
                self.taken += len(closed.items)
            return closed

    def due(self) -> float:
        """Seconds until the next batch closes: 0 when one is closed, `inf` when nothing waits."""
        with self._lock:
            return max(0.0, self._batcher.due() - self._monotonic())

    def release(self, records: int, size: int) -> None:
        """Give back the capacity of records that were taken; `size` is the bytes of their documents."""
        with self._lock:
            self._release(records, size + records * OVERHEAD_BYTES)

    def clear(self) -> None:
        """Forget everything that is held."""
        with self._lock:
            self._batcher.clear()
            self._release(self.held, self._bytes)

    def forked(self) -> None:
        """In the child of a fork, after its budget: empty, as in the beginning. It stays closed if it was."""
        self._lock = self._budget.lock
        self._batcher.clear()
        self._bytes = self.held = self.accepted = self.coalesced = self.taken = self.refused = 0

    def _release(self, records: int, size: int) -> None:
        self.held -= records
        self._bytes -= size
        self._budget.held -= size

    def close(self) -> None:
        """Accept nothing from now on."""
        with self._lock:
            self.is_closed = True
        self._on_due()

    def __len__(self) -> int:
        """Records that wait."""
        return len(self._batcher)
