"""Counters that cannot be counted: reported, left as they are, in nobody's way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachetools import TTLCache

from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from worker.runtime.clock import Clock

log = get_logger(__name__)

# Beyond this many, keys are only counted: a mistake can fill Redis with a million of them, but not this process.
REMEMBERED_KEYS = 10_000
REMEMBERED_BYTES = 512
REPORTED_KEYS = 100
LOGGED_KEYS = 100
LOG_AGAIN_S = 3600.0
REST_S = 600.0


def printable(key: bytes) -> str:
    """At most 64 characters of a key, everything unusual escaped."""
    return key[:64].decode("utf-8", "backslashreplace").encode("unicode_escape").decode()[:64]


class Quarantine:
    """The keys found bad by the current and the last sweep. A key that is mended or deleted is gone with the next."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._current: dict[bytes, str] = {}
        self._previous: dict[bytes, str] = {}
        self._beyond = 0
        self._logged: dict[bytes, float] = {}
        self._resting: TTLCache[bytes, str] = TTLCache(REMEMBERED_KEYS, REST_S, clock.monotonic)

    def __len__(self) -> int:
        return len(self._previous.keys() | self._current.keys()) + self._beyond

    def report(self, key: bytes, reason: str, *, rest: bool = False) -> None:
        """Remember that `key` was left alone; logged once an hour, for the first hundred.

        With `rest`, it is costly to look at and not tried again for ten minutes.
        """
        key = key[:REMEMBERED_BYTES]
        if rest:
            self._resting[key] = reason
        if key not in self._current and len(self._current) >= REMEMBERED_KEYS:
            self._beyond += 1
            return
        self._current[key] = reason
        now = self._clock.monotonic()
        seen = self._logged.get(key)
        if (seen is None and len(self._logged) < LOGGED_KEYS) or (seen is not None and now - seen >= LOG_AGAIN_S):
            self._logged[key] = now
            log.warning("counter quarantined", key=printable(key), reason=reason)

    def is_resting(self, key: bytes) -> bool:
        """True when `key` is not to be tried now; it is reported anew."""
        reason = self._resting.get(key[:REMEMBERED_BYTES])
        if reason is None:
            return False
        self.report(key, reason)
        return True

    def next_sweep(self) -> None:
        """A sweep was finished: what it did not report again is no longer bad."""
        self._previous, self._current, self._beyond = self._current, {}, 0
        self._logged = {key: at for key, at in self._logged.items() if key in self._previous}

    def listed(self) -> dict[str, str]:
        """The first hundred: key → reason, printable."""
        merged = self._previous | self._current
        return {printable(key): merged[key] for key in list(merged)[:REPORTED_KEYS]}
