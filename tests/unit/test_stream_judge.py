"""The decision table of streams, row by row in its order, and which row decides where several fit."""

from __future__ import annotations

from typing import Any

import pytest

from worker.contract.entry_id import MAX_PART, EntryId
from worker.db.positions import Move, Position
from worker.pipelines.sources.stream.evidence import Evidence, NoStream
from worker.pipelines.sources.stream.judge import Carry, CaughtUp, Hold, Skip, Subject, Unmarked, Verdict, Wait, judge

SUBJECT = Subject("requests", "CHUNKLOG")
HUGE = 2**64 - 1


def at(number: int) -> EntryId:
    return EntryId(number, 0)


def row(last: int = 5, **changes: Any) -> Position:
    values: dict[str, Any] = {"last": at(last), "entries_read": last, "incarnation": "ours", "candidate": "b"}
    return Position(**values | changes)


NEW = Position(candidate="b")


def seen(*entries: int, last: int = 9, **changes: Any) -> Evidence:
    """A stream to which 1-0, 2-0, … `last` were added, and in which `entries` are left; read after 5-0."""
    values: dict[str, Any] = {
        "last_id": at(last),
        "added": last,
        "length": len(entries),
        "first_entry": at(entries[0]) if entries else None,
        "next_entry": next((at(entry) for entry in entries if entry > 5), None),
        "last_entry": at(entries[-1]) if entries else None,
        "mark": "ours",
        "delivered": at(5),
        "consumers": 1,
    }
    return Evidence(**values | changes)


def decide(position: Position, evidence: Evidence | NoStream, owner: str | None = None, *read: EntryId) -> Verdict:
    following = isinstance(evidence, Evidence) and evidence.next_entry
    return judge(position, evidence, read or ((following,) if following else ()), owner, SUBJECT)


NO_GROUP: dict[str, Any] = {"mark": None, "delivered": None, "consumers": 0}
ALL = range(1, 10)


@pytest.mark.parametrize("position", [NEW, row(), row(high=at(8), entries_read=None)])
@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("none", Wait("there is no stream yet")),
        ("hash", Hold("the key requests holds a hash, not a stream", "Rename the stream.")),
    ],
)
def test_nothing_is_carried_where_there_is_no_stream(position: Position, kind: str, verdict: Verdict) -> None:
    assert decide(position, NoStream(kind)) == verdict


@pytest.mark.parametrize(
    ("evidence", "read"),
    [
        (seen(*ALL, last=MAX_PART + 1), []),
        (seen(*ALL, last=MAX_PART + 1, mark="other", delivered=at(8)), []),
        (seen(6, 9), [EntryId(6, MAX_PART + 1), at(9)]),
        (seen(6, 9), [at(6), EntryId(7, HUGE), at(9)]),
        (seen(6, 9), [at(6), at(9), EntryId(HUGE, HUGE)]),
    ],
    ids=["last", "last, of another database", "first to carry", "between others", "added meanwhile"],
)
def test_id_that_does_not_fit_is_a_hold_and_never_skipped(evidence: Evidence, read: list[EntryId]) -> None:
    verdict = decide(row(), evidence, "b/requests", *read)
    assert isinstance(verdict, Hold)
    assert "does not fit into a bigint" in verdict.cause


def test_largest_ids_that_fit_are_carried() -> None:
    largest = EntryId(MAX_PART, MAX_PART)
    assert decide(row(), seen(9, last=MAX_PART, next_entry=largest), None, largest) == Carry("ours")


# In the order of the table. The last column is a verdict, the type of one, or words of a hold's cause.
TABLE: list[tuple[str, Position, Evidence, str | None, Any]] = [
    ("several consumers", row(), seen(*ALL, mark=None, consumers=2), None, "several consumers"),
    ("mark of another row", row(), seen(*ALL, mark="b"), "b/requests", "b/requests carries this stream"),
    ("foreign mark ahead", row(), seen(*ALL, mark="b", delivered=at(6)), None, "another database carries"),
    ("foreign mark ahead, first start", NEW, seen(*ALL, mark="b", next_entry=at(1)), None, "another database carries"),
    ("foreign mark ahead, trimmed", row(), seen(8, 9, mark="b", delivered=at(7)), None, "another database carries"),
    ("foreign mark behind", row(), seen(*ALL, mark="b"), None, "not the stream that was carried to 5-0"),
    ("no group", row(), seen(*ALL, **NO_GROUP), None, "not the stream that was carried to 5-0"),
    (
        "no group, nothing above",
        row(9),
        seen(*ALL, next_entry=None, **NO_GROUP),
        None,
        "not the stream that was carried",
    ),
    ("no group, entry at the position", row(), seen(5, 6, **NO_GROUP), None, "not the stream that was carried"),
    ("not ours, empty and behind", row(), seen(last=4, mark="b", delivered=at(0)), None, Wait),
    ("no group, empty and behind", row(), seen(last=4, **NO_GROUP), None, Wait),
    ("group destroyed after the script ran", row(), seen(6, 9, **NO_GROUP), None, Unmarked()),
    ("mark that this row did not offer", row(), seen(6, 9, mark="c"), None, "another database or source"),
    ("mark of another first start", NEW, seen(*ALL, mark="c", delivered=at(0)), None, "another database or source"),
    ("ours, went back", row(), seen(1, 2, last=2), None, Skip),
    ("ours, went back to nothing", row(), seen(last=4), None, Skip),
    ("entry below high", row(high=at(8)), seen(*ALL), None, "Redis went back, and the entry 6-0 may be carried"),
    ("entry at high", row(high=at(6)), seen(*ALL), None, "Redis went back, and the entry 6-0 may be carried"),
    ("entry below high, new mark", row(high=at(8)), seen(6, 9, mark="b"), None, "Redis went back"),
    ("first start", NEW, seen(*ALL, next_entry=at(1), mark="b", delivered=at(0)), None, Carry("b", takes_mark=True)),
    ("made anew", row(), seen(6, 9, mark="b"), None, Carry("b", takes_mark=True)),
    ("made anew and emptied", row(), seen(mark="b"), None, Skip),
    ("made anew, nothing added", row(9), seen(mark="b"), None, CaughtUp()),
    ("deleted unread", row(), seen(), None, Skip),
    ("deleted unread behind what was read", row(), seen(4, 5), None, Skip),
    ("idle", row(9), seen(*ALL, next_entry=None), None, CaughtUp()),
    ("idle below high", row(9, high=at(20)), seen(*ALL, next_entry=None), None, CaughtUp()),
    ("carry", row(), seen(*ALL), None, Carry("ours")),
    ("carry above high", row(high=at(5)), seen(*ALL), None, Carry("ours")),
    ("carry what is left", row(), seen(8, 9), None, Carry("ours")),
]
EXPECTED = [pytest.param(*rest, id=name) for name, *rest in TABLE]


@pytest.mark.parametrize(("position", "evidence", "owner", "expected"), EXPECTED)
def test_table_decides(position: Position, evidence: Evidence, owner: str | None, expected: Any) -> None:
    verdict = decide(position, evidence, owner)
    if isinstance(expected, str):
        assert isinstance(verdict, Hold)
        assert expected in verdict.cause
    elif isinstance(expected, type):
        assert isinstance(verdict, expected)
    else:
        assert verdict == expected


# Several rows of the table fit; the first of them decides.
PRECEDENCE = [
    ("several consumers, then owner", row(), seen(*ALL, mark=None, consumers=2), "b/s", "several consumers"),
    ("owner, then ahead", row(), seen(*ALL, mark="b", delivered=at(9)), "b/s", "carries this stream already"),
    ("owner, then empty and behind", row(), seen(last=4, mark="b"), "b/s", "carries this stream already"),
    ("ahead, then entry at or below", row(), seen(*ALL, mark="b", delivered=at(9)), None, "another database"),
    ("ahead, then below high", row(high=at(8)), seen(6, mark="b", delivered=at(9)), None, "another database"),
    ("entry at or below, then below high", row(high=at(8)), seen(*ALL, mark="b"), None, "not the stream"),
    ("below high, then adopt", row(high=at(8)), seen(6, 9, mark="b"), None, "may be carried already"),
]
FIRST = [pytest.param(*rest, id=name) for name, *rest in PRECEDENCE]


@pytest.mark.parametrize(("position", "evidence", "owner", "cause"), FIRST)
def test_first_row_that_fits_decides(position: Position, evidence: Evidence, owner: str | None, cause: str) -> None:
    verdict = decide(position, evidence, owner)
    assert isinstance(verdict, Hold)
    assert cause in verdict.cause


@pytest.mark.parametrize(
    ("position", "high"), [(row(), 5), (row(high=at(8)), 8), (row(high=at(3)), 5)], ids=["first", "lower", "higher"]
)
def test_position_follows_redis_back_and_remembers_the_highest(position: Position, high: int) -> None:
    verdict = decide(position, seen(1, 2, 3, last=4, next_entry=None))
    assert verdict == Skip(Move(at(5), at(4), 4, at(high), "ours"), went_back=True)


@pytest.mark.parametrize(
    ("position", "move"),
    [
        (row(), Move(at(5), at(9), 9, None, "ours", lost=4)),
        (row(entries_read=None), Move(at(5), at(9), 9, None, "ours", gap=True)),
        (row(high=at(8)), Move(at(5), at(9), 9, None, "ours", lost=4)),
        (row(high=at(9)), Move(at(5), at(9), 9, at(9), "ours", lost=4)),
        (row(incarnation="gone", candidate="ours"), Move(at(5), at(9), 9, None, "ours", gap=True)),
    ],
    ids=["counted", "not known", "above high", "at high", "new mark"],
)
def test_position_moves_over_what_was_deleted_unread(position: Position, move: Move) -> None:
    assert decide(position, seen()) == Skip(move)


@pytest.mark.parametrize(
    ("entries_read", "read", "same"),
    [(5, [6, 7, 8, 9], True), (6, [6, 7, 8], False), (4, [6, 7, 8, 9], False), (None, [6, 7, 8, 9], False)],
    ids=["all that was not read", "not complete", "other number", "not known"],
)
def test_hold_says_when_it_looks_like_the_same_stream(entries_read: int | None, read: list[int], same: bool) -> None:
    verdict = decide(row(entries_read=entries_read), seen(*ALL, **NO_GROUP), None, *map(at, read))
    assert isinstance(verdict, Hold)
    assert ("looks like the same stream: --set requests 5-0" in verdict.cause) is same


def test_hold_on_a_foreign_mark_names_the_setting_and_the_command() -> None:
    verdict = decide(row(), seen(*ALL, mark="b", delivered=at(6)))
    assert isinstance(verdict, Hold)
    assert "CHUNKLOG_STREAM_GROUP" in verdict.remedy
    assert "viewer-worker streams --set requests" in verdict.remedy
