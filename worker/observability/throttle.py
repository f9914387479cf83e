"""Limits how often a log line is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Hashable


class Throttle:
    """Allows one line per topic and `period` (seconds), for the first `max_topics` topics only (None: for all)."""

    def __init__(self, period: float, monotonic: Callable[[], float], max_topics: int | None = None) -> None:
        self._period = period
        self._monotonic = monotonic
        self._max_topics = max_topics
        self._quiet_until: dict[Hashable, float] = {}

    def allows(self, topic: Hashable) -> bool:
        """True when a line about `topic` may be written now; the next one has to wait."""
        now = self._monotonic()
        if topic not in self._quiet_until and len(self._quiet_until) == self._max_topics:
            return False
        if now < self._quiet_until.get(topic, now):
            return False
        self._quiet_until[topic] = now + self._period
        return True

    def keep(self, topics: Container[Hashable]) -> None:
        """Forget all other topics."""
        self._quiet_until = {topic: until for topic, until in self._quiet_until.items() if topic in topics}
