"""Compares the marker in Redis with the source row in Postgres. docs/protocol.md has the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.counters.flush.marker import Marker
from worker.observability.printable import excerpt

if TYPE_CHECKING:
    from worker.db.counters.source_row import PastLineage, SourceRow, SourceState
    from worker.db.session import Transaction

REMEDY = "Run `viewer-worker adopt`: it shows both sides and the ways out. Nothing is lost: views wait in Redis."


@dataclass(frozen=True, slots=True)
class Agreed:
    """Redis and Postgres name the same last flush: the next one may follow."""

    marker: Marker


@dataclass(frozen=True, slots=True)
class Missing:
    """There is no marker. Whether one may be created depends on evidence."""


@dataclass(frozen=True, slots=True)
class Behind:
    """Postgres has flushes, up to `last_flush_id`, that Redis has not settled yet: settle them from the ledger."""

    marker: Marker
    last_flush_id: int


@dataclass(frozen=True, slots=True)
class Returned:
    """A data set that the source used before, with all its flushes settled. Its pending views are not counted yet.

    `successor` is the marker to replace this one; None: there is none yet.
    """

    marker: Marker
    successor: Marker | None


@dataclass(frozen=True, slots=True)
class Hold:
    """It is not certain what happened: stop flushing, stay up, report why.

    `refused` is a marker that the source row has to remember.
    """

    cause: str
    remedy: str = REMEDY
    refused: str | None = None


Verdict = Agreed | Missing | Behind | Returned | Hold


async def compare(tx: Transaction, source_row: SourceRow, raw: bytes | None, row: SourceState) -> Verdict:
    """`judge`, with what Postgres remembers of the marker's lineage. Runs in the caller's transaction."""
    marker = None if raw is None else Marker.parse(raw)
    past = None
    if marker is not None and marker.lineage != row.lineage:
        past = await source_row.past_lineage(tx, marker.lineage)
    return judge(raw, row, past)


def judge(raw: bytes | None, row: SourceState, past: PastLineage | None = None) -> Verdict:
    """Compare the marker, read under the row lock, with the source row.

    `past`: the marker's lineage, if it is not the row's, but was before.
    """
    if raw is None:
        if row.refused is not None:
            return Hold(f"this database refused a marker before ({row.refused}); now there is none")
        return Missing()
    marker = Marker.parse(raw)
    if marker is None:
        return Hold("the marker in Redis cannot be read", refused=excerpt(raw) or "(empty)")
    if marker.lineage != row.lineage and past is None:
        return Hold(
            "the marker in Redis belongs to another database, or this database was recreated", refused=excerpt(raw)
        )
    last = past or row
    ahead = marker.flush_id - last.last_flush_id
    if ahead > 0:
        return Hold(f"Postgres lacks {ahead} flushes that Redis has settled (restored, failed over or cloned)")
    if ahead < 0:
        return Behind(marker, last.last_flush_id)
    if marker.nonce != last.last_nonce:
        return Hold(f"Redis settled another flush {marker.flush_id} than the one in Postgres")
    if past is None:
        return Agreed(marker)
    return Returned(marker, None if past.successor is None else Marker.parse(past.successor.encode()))
