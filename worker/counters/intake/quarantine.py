"""Counters that cannot be counted: reported, left as they are, without blocking other ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachetools import TTLCache

from worker.observability.logs import get_logger
from worker.observability.printable import excerpt
from worker.observability.throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.runtime.clock import Clock

log = get_logger(__name__)

# Further keys are only counted: a mistake can fill Redis with a million of them, but not this process.
REMEMBERED_KEYS = 10_000
REMEMBERED_BYTES = 512
REPORTED_KEYS = 100
LOGGED_KEYS = 100
LOG_PERIOD_S = 3600.0
REST_S = 600.0


class Quarantine:
    """The bad keys of the current and the last sweep. A key that is fixed or deleted disappears with the next sweep.

    `logs`: whether each is logged.
    """

    def __init__(self, clock: Clock, *, logs: bool = True) -> None:
        self._logs = logs
        self._current: dict[bytes, str] = {}
        self._previous: dict[bytes, str] = {}
        self._beyond = 0
        self._throttle = Throttle(LOG_PERIOD_S, clock.monotonic, max_topics=LOGGED_KEYS)
        self._resting: TTLCache[bytes, str] = TTLCache(REMEMBERED_KEYS, REST_S, clock.monotonic)

    def __len__(self) -> int:
        return len(self._previous.keys() | self._current.keys()) + self._beyond

    def report(self, key: bytes, reason: str, *, rest: bool = False) -> None:
        """Remember that `key` was left as it is; logged once an hour, for the first hundred keys.

        With `rest`, the key is costly to look at: it rests for ten minutes.
        """
        key = key[:REMEMBERED_BYTES]
        if rest:
            self._resting[key] = reason
        if key not in self._current and len(self._current) >= REMEMBERED_KEYS:
            self._beyond += 1
            return
        self._current[key] = reason
        if self._logs and self._throttle.allows(key):
            log.warning("counter quarantined", key=excerpt(key), reason=reason)

    def without_resting(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """The keys that do not rest. Those that do are reported again."""
        if not self._resting:  # this is cheaper than a look-up for each
            return keys
        return [key for key in keys if not self._skip(key)]

    def _skip(self, key: bytes) -> bool:
        reason = self._resting.get(key[:REMEMBERED_BYTES])
        if reason is None:
            return False
        self.report(key, reason)
        return True

    def next_sweep(self) -> None:
        """A sweep was finished: keys that it did not report are no longer bad."""
        self._previous, self._current, self._beyond = self._current, {}, 0
        self._throttle.keep(self._previous)

    def listed(self) -> dict[str, str]:
        """The first hundred: printable key → reason."""
        merged = self._previous | self._current
        return {excerpt(key): merged[key] for key in list(merged)[:REPORTED_KEYS]}
