"""The marker: the key in Redis that names the last settled flush. `verdict.py` and `recovery.py` act on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from worker.db.counters.ledger import Flush


@dataclass(frozen=True, slots=True)
class Marker:
    """Written `lineage:id:nonce`. The nonce keeps a flush id unique even where the database lost a commit."""

    lineage: UUID
    flush_id: int
    nonce: UUID

    def after(self, flush: Flush) -> Marker:
        """The marker once `flush`, the next one of this lineage, is settled."""
        return Marker(self.lineage, flush.flush_id, flush.nonce)

    def encode(self) -> bytes:
        return f"{self.lineage}:{self.flush_id}:{self.nonce}".encode()

    @classmethod
    def parse(cls, raw: bytes) -> Marker | None:
        """None for anything that `encode` did not write."""
        parts = raw.split(b":")
        if len(parts) != 3 or not parts[1].isdigit():
            return None
        try:
            marker = cls(UUID(parts[0].decode()), int(parts[1]), UUID(parts[2].decode()))
        except ValueError:
            return None
        return marker if marker.encode() == raw else None
