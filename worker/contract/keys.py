"""The names of keys in Redis, and what may stand in them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from worker.contract.ids import decode_id

MAX_COUNT = 2**63 - 1
_CANONICAL = re.compile(rb"0|[1-9][0-9]{0,18}")
_GLOB = re.compile(rb"([*?\[\]\\^-])")


@dataclass(frozen=True, slots=True)
class Keys:
    """All keys of one prefix, in one of Redis's numbered databases.

    The marker's name follows from the prefix: two workers on one prefix cannot miss each other.
    """

    prefix: bytes
    database: int = 0

    @property
    def marker(self) -> bytes:
        return b"viewer-worker:settled:" + self.prefix

    @property
    def probe(self) -> bytes:
        return b"viewer-worker:probe:" + self.prefix

    @property
    def pattern(self) -> bytes:
        """For SCAN: every counter, whatever special characters the prefix has."""
        return _GLOB.sub(rb"\\\1", self.prefix) + b"*"

    def identity(self, replid: str | None) -> str | None:
        """What a data set is recognised by: its history, and which of its keys are meant. None if Redis hides it."""
        if replid is None:
            return None
        history = f"{replid}/{self.database}" if self.database else replid
        return f"{history} {self.prefix.decode(errors='backslashreplace')}"

    def counter(self, vod_id: str) -> bytes:
        return self.prefix + vod_id.encode()

    def vod_id(self, key: bytes) -> str:
        """The id that a counter's key names. Raises InvalidId."""
        return decode_id(key[len(self.prefix) :])


def parse_count(value: bytes) -> int | None:
    """A counter's value as a number; None unless it is 0 … 2^63-1, written as Redis writes it."""
    if _CANONICAL.fullmatch(value) is None:
        return None
    count = int(value)
    return count if count <= MAX_COUNT else None
