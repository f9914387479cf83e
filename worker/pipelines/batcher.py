"""Groups items into batches. It is passive: no clock, no timer, no lock."""

from __future__ import annotations

import math
from collections import deque
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

    def add(self, item: T, at: float) -> int:
        """Returns how many items wait now."""
        self._times.append(at)
        self._items.append(item)
        return len(self._items)

    def clear(self) -> None:
        self._times.clear()
        self._items.clear()

    def due(self) -> float:
        """When the next batch closes: `-inf` when it is full, `inf` when there is none."""
        if not self._items:
            return math.inf
        return -math.inf if len(self._items) >= self._size else self._times[0] + self._age

    def take(self, now: float, *, flush: bool = False) -> Closed[T] | None:
        """The next batch if it is closed; with `flush`, as it is. None where there is nothing to take."""
        if not self._items:
            return None
        if len(self._items) >= self._size:
            by = ClosedBy.SIZE
        elif now >= self._times[0] + self._age:
            by = ClosedBy.AGE
        elif flush:
            by = ClosedBy.FLUSH
        else:
            return None
        count = min(self._size, len(self._items))
        return Closed([(self._times.popleft(), self._items.popleft()) for _ in range(count)], by)
