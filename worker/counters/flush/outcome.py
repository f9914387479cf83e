"""What a flush ends with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from worker.counters.flush.verdict import Hold


@dataclass(frozen=True, slots=True)
class Flushed:
    """All pending views of the given ids are in Postgres. `flush_id` is None when there were none."""

    flush_id: int | None = None
    keys: int = 0
    views: int = 0

    def __add__(self, other: Flushed) -> Flushed:
        return Flushed(other.flush_id or self.flush_id, self.keys + other.keys, self.views + other.views)


@dataclass(frozen=True, slots=True)
class Busy:
    """Another worker has the lease or the lock, or keeps moving the marker. Try again in about a second."""


FlushOutcome: TypeAlias = Flushed | Busy | Hold
