"""Groups items into batches. It is passive: no clock, no timer, no lock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

T = TypeVar("T")


class ClosedBy(Enum):
    """Why a batch ends where it does."""

    SIZE = "size"
    AGE = "age"
    FLUSH = "flush"


@dataclass(frozen=True, slots=True)
class Closed(Generic[T]):
    """A batch: when each item was added, and the items, in their order."""

    items: list[tuple[float, T]]
    by: ClosedBy


class Batcher(Generic[T]):
    """A batch closes at `size` items, or when its first item is `age` old. Times are of one clock, in its unit."""

    def __init__(self, size: int, age: float) -> None:
        self._size = size
        self._age = age
        self._items: deque[T] = deque()
        # Beside the items: pairs would be many objects for the garbage collector to look at.
        self._times: deque[float] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: T, at: float, key: Hashable = None) -> int:
        """Returns how many items wait now."""
        self._times.append(at)
        self._items.append(item)
        return len(self._items)

    def find(self, key: Hashable) -> T | None:
        """The item of this key that waits."""
        return None

    def replace(self, key: Hashable, item: T, at: float) -> None:
        """Put the item in the place of the one with this key, which waits."""
        raise KeyError(key)

    def clear(self) -> None:
        self._times.clear()
        self._items.clear()

    def due(self) -> float:
        """When the next batch closes: `-inf` when it is full, `inf` when there is none."""
        if not len(self):
            return math.inf
        return -math.inf if len(self) >= self._size else self._since() + self._age

    def take(self, now: float, *, flush: bool = False) -> Closed[T] | None:
        """The next batch if it is closed; with `flush`, as it is. None where there is nothing to take."""
        if not len(self):
            return None
        if len(self) >= self._size:
            by = ClosedBy.SIZE
        elif now >= self._since() + self._age:
            by = ClosedBy.AGE
        elif flush:
            by = ClosedBy.FLUSH
        else:
            return None
        return Closed([self._pop() for _ in range(min(self._size, len(self)))], by)

    def _since(self) -> float:
        """When the first item was added."""
        return self._times[0]

    def _pop(self) -> tuple[float, T]:
        return self._times.popleft(), self._items.popleft()


@dataclass(slots=True)
class _Slot(Generic[T]):
    since: float
    at: float
    item: T


class CoalescingBatcher(Batcher[T]):
    """Keeps the newest item of each key, in the place of the first one that waits. The age is that of the first."""

    def __init__(self, size: int, age: float) -> None:
        super().__init__(size, age)
        self._slots: dict[Hashable, _Slot[T]] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, item: T, at: float, key: Hashable = None) -> int:
        self._slots[key] = _Slot(at, at, item)
        return len(self._slots)

    def replace(self, key: Hashable, item: T, at: float) -> None:
        slot = self._slots[key]
        slot.item, slot.at = item, at

    def find(self, key: Hashable) -> T | None:
        slot = self._slots.get(key)
        return None if slot is None else slot.item

    def clear(self) -> None:
        self._slots.clear()

    def _since(self) -> float:
        return next(iter(self._slots.values())).since

    def _pop(self) -> tuple[float, T]:
        slot = self._slots.pop(next(iter(self._slots)))
        return slot.at, slot.item
