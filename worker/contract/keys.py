"""Names of the keys in Redis, and the values that counters hold."""

from __future__ import annotations

import re
from dataclasses import dataclass

from worker.contract.ids import decode_id

DEFAULT_PREFIX = "vod:views:"
# Every key of the worker that is not a counter begins with this.
OWN_KEYS = "viewer-worker:"
MAX_COUNTER = 2**63 - 1
NOT_A_COUNT = "the value is not a whole number from 0 to 2^63-1"
_MARKERS = f"{OWN_KEYS}settled:".encode()
# The SCAN pattern that matches the markers of all prefixes.
MARKER_PATTERN = _MARKERS + b"*"
_CANONICAL = re.compile(rb"0|[1-9][0-9]{0,18}")
_GLOB = re.compile(rb"([*?\[\]\\^-])")


@dataclass(frozen=True, slots=True)
class Keys:
    """All keys of one prefix, in one of Redis's numbered databases.

    The marker's name is derived from the prefix, so two workers on one prefix share one marker.
    """

    prefix: bytes
    database: int = 0

    @property
    def marker(self) -> bytes:
        return _MARKERS + self.prefix

    @property
    def probe(self) -> bytes:
        return f"{OWN_KEYS}probe:".encode() + self.prefix

    @property
    def pattern(self) -> bytes:
        """The SCAN pattern that matches every counter; special characters in the prefix are escaped."""
        return _GLOB.sub(rb"\\\1", self.prefix) + b"*"

    def nested_prefix(self, marker: bytes) -> bytes | None:
        """The prefix of `marker`, if it begins with this prefix and goes on, or this one with it; else None.

        The counters of the longer prefix are then counters of both.
        """
        other = marker.removeprefix(_MARKERS)
        nested = other != self.prefix and (other.startswith(self.prefix) or self.prefix.startswith(other))
        return other if nested else None

    def data_set_id(self, replid: str | None) -> str | None:
        """The id of a data set: its replication history, its database number and the prefix. None if Redis hides it."""
        if replid is None:
            return None
        history = f"{replid}/{self.database}" if self.database else replid
        return f"{history} {self.prefix.decode(errors='backslashreplace')}"

    @property
    def missing_counter(self) -> bytes:
        """The name of a counter that nobody has: no id contains NUL."""
        return self.prefix + b"\x00"

    def counter(self, vod_id: str) -> bytes:
        return self.prefix + vod_id.encode()

    def vod_id(self, key: bytes) -> str:
        """The id in a counter's key. Raises InvalidId."""
        return decode_id(key[len(self.prefix) :])


def parse_count(value: bytes) -> int | None:
    """A counter's value as a number; None unless it is 0 … 2^63-1 in the form that Redis writes."""
    if _CANONICAL.fullmatch(value) is None:
        return None
    count = int(value)
    return count if count <= MAX_COUNTER else None
