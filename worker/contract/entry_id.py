"""Ids of stream entries: `milliseconds-sequence`."""

from __future__ import annotations

from typing import NamedTuple

MAX_PART = 2**63 - 1


class EntryId(NamedTuple):
    """Ordered as Redis orders them. Each part fits a bigint."""

    ms: int
    seq: int

    def __str__(self) -> str:
        return f"{self.ms}-{self.seq}"

    @property
    def fits(self) -> bool:
        """Whether Postgres can hold it."""
        return self.ms <= MAX_PART and self.seq <= MAX_PART

    @classmethod
    def parse(cls, raw: bytes) -> EntryId:
        """Raises ValueError for anything that is not `digits-digits`."""
        ms, dash, seq = raw.partition(b"-")
        if not (dash and ms.isdigit() and seq.isdigit()):
            raise ValueError("not the id of an entry")
        return cls(int(ms), int(seq))


BEGINNING = EntryId(0, 0)
