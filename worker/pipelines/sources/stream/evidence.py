"""What `look.lua` says about a stream."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from worker.contract.entry_id import EntryId

# What workers call their consumer. Any other name is another program's, which may use it on several servers.
_MARK = re.compile(rb"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Evidence:
    """A stream at one instant.

    `mark`: the name of the single consumer of our group, which a worker made; else None. `consumers`: how many it has.
    `delivered`: the group's last delivered id. `last_id`: the stream's last id. `added`: the entries ever added.
    `length`: those present; `first_entry` and `last_entry` are their ends. `next_entry`: the first one above the
    position that was asked about.
    """

    last_id: EntryId
    added: int
    length: int
    first_entry: EntryId | None = None
    next_entry: EntryId | None = None
    last_entry: EntryId | None = None
    mark: str | None = None
    delivered: EntryId | None = None
    consumers: int = 0

    @property
    def removed(self) -> int:
        """Entries that were added and are not present any more."""
        return self.added - self.length

    def confirms(self, earlier: Evidence) -> bool:
        """Whether entries that were read between the two looks belong to the stream that `earlier` describes."""
        return (
            self.mark == earlier.mark
            and self.first_entry == earlier.first_entry
            and self.removed == earlier.removed
            and self.last_id >= earlier.last_id
            and self.added >= earlier.added
        )


@dataclass(frozen=True, slots=True)
class NoStream:
    """The key has no stream. `kind` is its type; `none` when it does not exist."""

    kind: str


def parse_evidence(reply: list[Any]) -> tuple[str, Evidence | NoStream]:
    """The server's role, and the evidence. Raises ValueError for an id that no server sends."""
    role, kind = reply[0].decode(), reply[1].decode()
    if kind != "stream":
        return role, NoStream(kind)
    consumers, mark, delivered, last, added, length, first, above, present = reply[2:]
    return role, Evidence(
        last_id=EntryId.parse(last),
        added=added,
        length=length,
        first_entry=_id(first),
        next_entry=_id(above),
        last_entry=_id(present),
        mark=mark.decode() if consumers == 1 and _MARK.fullmatch(mark) else None,
        delivered=_id(delivered),
        consumers=max(0, consumers),
    )


def _id(raw: bytes) -> EntryId | None:
    return EntryId.parse(raw) if raw else None
