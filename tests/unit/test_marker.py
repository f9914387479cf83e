"""The marker: its format, and every case of comparing it with the source row."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.keys import MAX_COUNTER
from worker.counters.flush.agreement import Agreement
from worker.counters.flush.marker import Marker
from worker.counters.flush.verdict import Agreed, Behind, Hold, Missing, Returned, judge
from worker.db.counters.source_row import PastLineage, SourceState


@given(st.uuids(), st.integers(0, MAX_COUNTER), st.uuids())
def test_marker_survives_encoding_and_parsing(lineage: UUID, flush_id: int, nonce: UUID) -> None:
    marker = Marker(lineage, flush_id, nonce)
    assert Marker.parse(marker.encode()) == marker


@given(st.binary())
def test_other_bytes_are_not_a_marker(raw: bytes) -> None:
    marker = Marker.parse(raw)
    assert marker is None or marker.encode() == raw


@pytest.mark.parametrize(
    "text",
    ["{u}:1", "{u}:-1:{u}", "{u}:01:{u}", "{u}:1:{u} ", "{u}:1:{u}:", "{u}:x:{u}", "x:1:{u}", "{U}:1:{u}", "{u}:²:{u}"],
)
def test_almost_valid_markers_are_refused(text: str) -> None:
    assert Marker.parse(text.format(u=uuid4(), U=str(uuid4()).upper().replace("0", "A")).encode()) is None


LINEAGE, NONCE, OTHER = UUID(int=1), UUID(int=2), UUID(int=3)


def row(last: int = 7, **changes: Any) -> SourceState:
    values: dict[str, Any] = {
        "lineage": LINEAGE,
        "last_flush_id": last,
        "last_nonce": NONCE,
        "settled_id": last - 1,
        "data_set_id": "r",
        "refused": None,
        "announced_nonce": None,
        "lease_holder": "me",
        "lease_epoch": 1,
        "agreed_minutes_ago": 0,
    }
    return SourceState(**values | changes)


@pytest.mark.parametrize(
    ("raw", "state", "verdict"),
    [
        (None, row(0, lineage=None, last_nonce=None), Missing),
        (None, row(0), Missing),
        (None, row(0, refused="someone else's marker"), Hold),
        (None, row(7), Missing),
        (None, row(7, refused="someone else's marker"), Hold),
        (b"garbage", row(), Hold),
        (b"", row(), Hold),
        (Marker(LINEAGE, 7, NONCE).encode(), row(), Agreed),
        (Marker(LINEAGE, 7, OTHER).encode(), row(), Hold),
        (Marker(LINEAGE, 6, OTHER).encode(), row(), Behind),
        (Marker(LINEAGE, 0, OTHER).encode(), row(), Behind),
        (Marker(LINEAGE, 8, NONCE).encode(), row(), Hold),
        (Marker(OTHER, 7, NONCE).encode(), row(), Hold),
        (Marker(OTHER, 0, NONCE).encode(), row(0, lineage=None, last_nonce=None), Hold),
    ],
)
def test_marker_is_judged_against_the_source_row(raw: bytes | None, state: SourceState, verdict: type) -> None:
    assert isinstance(judge(raw, state), verdict)


SUCCESSOR = Marker(LINEAGE, 7, UUID(int=4))


@pytest.mark.parametrize(
    ("flush_id", "nonce", "successor", "verdict"),
    [
        (2, NONCE, None, Behind(Marker(OTHER, 2, NONCE), 3)),
        (3, NONCE, None, Returned(Marker(OTHER, 3, NONCE), None)),
        (3, NONCE, SUCCESSOR, Returned(Marker(OTHER, 3, NONCE), SUCCESSOR)),
        (2, NONCE, SUCCESSOR, Behind(Marker(OTHER, 2, NONCE), 3)),
    ],
)
def test_marker_of_a_past_lineage_is_judged_against_the_last_flush_of_that_lineage(
    flush_id: int, nonce: UUID, successor: Marker | None, verdict: object
) -> None:
    past = PastLineage(3, NONCE, None if successor is None else successor.encode().decode())
    assert judge(Marker(OTHER, flush_id, nonce).encode(), row(7), past) == verdict


@pytest.mark.parametrize(("flush_id", "nonce"), [(4, NONCE), (3, OTHER)])
def test_marker_that_a_past_lineage_never_had_is_a_hold(flush_id: int, nonce: UUID) -> None:
    assert isinstance(judge(Marker(OTHER, flush_id, nonce).encode(), row(7), PastLineage(3, NONCE, None)), Hold)


@pytest.mark.parametrize(
    ("known", "minutes", "forbidden"),
    [
        (None, 0, True),
        (OTHER, 4, True),
        (LINEAGE, 0, False),
        (None, 5, False),
        (None, None, False),  # nothing ever agreed
        (None, -1, False),  # the clock was set back
    ],
)
def test_only_a_worker_without_part_in_the_lineage_waits_and_only_for_five_minutes(
    known: UUID | None, minutes: int | None, forbidden: bool
) -> None:
    assert Agreement(known).forbids_another_redis(row(agreed_minutes_ago=minutes)) is forbidden
