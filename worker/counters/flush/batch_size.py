"""The number of keys in one flush."""

from __future__ import annotations

VERY_QUICK_S = 0.05
QUICK_S = 0.5
SLOW_S = 2.0


class BatchSize:
    """Between `smallest` and `largest` keys: more while there is a backlog and flushes are quick, fewer when slow.

    A small transaction holds its locks briefly and repeats little work when it fails; a large one carries a backlog
    faster. Below `smallest` only after a timeout: where the time does not depend on the number of keys, fewer keys
    would only slow the backlog down.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        self._smallest = smallest
        self._largest = largest
        self.keys = smallest

    def flushed(self, seconds: float, left: int) -> None:
        """A flush took `seconds`, and `left` keys are still pending."""
        if seconds > SLOW_S:
            self._reduce(max(self._smallest, self.keys // 2))
        elif left > self.keys and seconds < QUICK_S:
            self.keys = min(self._largest, self.keys * (2 if seconds > VERY_QUICK_S else 8))
        elif left <= self._smallest:
            self._reduce(self._smallest)

    def timed_out(self, keys: int) -> None:
        """A flush of so many keys took longer than a statement may."""
        self._reduce(max(1, keys // 2))

    def failed(self) -> None:
        """A flush failed, perhaps because of its size: start small again."""
        self._reduce(self._smallest)

    def _reduce(self, keys: int) -> None:
        self.keys = min(self.keys, keys)
