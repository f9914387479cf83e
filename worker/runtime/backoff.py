"""How long to wait before the next try."""

from __future__ import annotations

import random


class Backoff:
    """Capped exponential backoff with jitter, so that replicas do not retry at the same moment.

    `first` and `cap` are seconds. A delay lies between half and the whole of the exponential step.
    """

    def __init__(self, first: float, cap: float, rng: random.Random | None = None) -> None:
        self._first = first
        self._cap = cap
        self._rng = rng or random.Random()
        self._tries = 0

    def next(self) -> float:
        """Seconds to wait before the next try."""
        # 2 ** 30 is above every cap in use; without the bound the power would grow for days of outage.
        step = min(self._cap, self._first * 2.0 ** min(self._tries, 30))
        self._tries += 1
        return step * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._tries = 0
