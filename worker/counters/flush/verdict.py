"""Compares the marker in Redis with the source row in Postgres. docs/protocol.md has the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.counters.flush.marker import Marker
from worker.observability.printable import excerpt

if TYPE_CHECKING:
    from worker.db.counters.source_row import SourceState

REMEDY = "Nothing is lost: views accumulate in Redis. `viewer-worker adopt` shows both sides and the ways out."


@dataclass(frozen=True, slots=True)
class Agreed:
    """Redis and Postgres name the same last flush: the next one may follow."""

    marker: Marker


@dataclass(frozen=True, slots=True)
class Missing:
    """There is no marker. Whether one may be created depends on evidence."""


@dataclass(frozen=True, slots=True)
class Behind:
    """Postgres has flushes that Redis has not settled yet: settle them from the ledger."""

    marker: Marker


@dataclass(frozen=True, slots=True)
class Hold:
    """It is not certain what happened: stop flushing, stay up, report why.

    `refused` is a marker that the source row has to remember.
    """

    cause: str
    remedy: str = REMEDY
    refused: str | None = None


Verdict = Agreed | Missing | Behind | Hold


def judge(raw: bytes | None, row: SourceState) -> Verdict:
    """Compare the marker, read under the row lock, with the source row."""
    if raw is None:
        if row.refused is not None:
            return Hold(f"this database refused a marker before ({row.refused}); now there is none")
        return Missing()
    marker = Marker.parse(raw)
    if marker is None:
        return Hold("the marker in Redis cannot be read", refused=excerpt(raw) or "(empty)")
    if marker.lineage != row.lineage:
        return Hold(
            "the marker in Redis belongs to another database, or this database was recreated", refused=excerpt(raw)
        )
    ahead = marker.flush_id - row.last_flush_id
    if ahead > 0:
        return Hold(f"Postgres lacks {ahead} flushes that Redis has settled (restored, failed over or cloned)")
    if ahead < 0:
        return Behind(marker)
    if marker.nonce != row.last_nonce:
        return Hold(f"Redis settled another flush {marker.flush_id} than the one in Postgres")
    return Agreed(marker)
