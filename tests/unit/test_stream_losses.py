"""How many entries were deleted unread: the formula case by case, and against streams of which everything is known."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.entry_id import BEGINNING, EntryId
from worker.db.positions import Move, Position
from worker.pipelines.sources.stream.evidence import Evidence
from worker.pipelines.sources.stream.judge import Carry, CaughtUp, Skip, Subject, judge, make_move

SUBJECT = Subject("requests", "CHUNKLOG")


def at(number: int) -> EntryId:
    return EntryId(number, 0)


def seen(last: int, added: int, length: int, first: int | None) -> Evidence:
    return Evidence(at(last), added, length, None if first is None else at(first))


# From position 10-0 with 10 entries read: entries read, first look, second look, end and number of the batch; then
# entries read, lost, gap.
LOOK = seen(20, 20, 20, 1)
TRIMMED = seen(20, 20, 5, 16)
FORMULA = [
    ("ends at G", 10, LOOK, LOOK, 20, 10, (20, 0, False)),
    ("ends at G, deleted in between", 10, seen(20, 20, 17, 1), seen(20, 20, 17, 1), 20, 7, (20, 3, False)),
    ("ends at the second G", 10, LOOK, seen(23, 23, 23, 1), 23, 13, (23, 0, False)),
    ("ends at the second G, deleted in between", 10, seen(20, 20, 17, 1), seen(23, 23, 20, 1), 23, 10, (23, 3, False)),
    ("ends at the second G, trimmed", 10, TRIMMED, seen(23, 23, 8, 16), 23, 8, (23, 5, False)),
    ("ends at the first G, more came", 10, LOOK, seen(23, 23, 23, 1), 20, 10, (20, 0, False)),
    ("ends between the two G, trimmed", 10, TRIMMED, seen(23, 23, 8, 16), 22, 7, (22, 5, False)),
    ("F after the position", 10, TRIMMED, TRIMMED, 17, 2, (17, 5, False)),
    ("F at the position", 10, seen(20, 20, 11, 10), seen(20, 20, 11, 10), 12, 2, (12, 0, False)),
    ("F before the position: not visible", 10, seen(20, 20, 17, 1), seen(20, 20, 17, 1), 15, 2, (12, 0, False)),
    ("negative, ends at G", 15, LOOK, LOOK, 20, 10, (20, 0, True)),
    ("negative, F after the position", 17, TRIMMED, TRIMMED, 17, 2, (17, 0, True)),
    ("R not known, ends at G", None, LOOK, LOOK, 20, 10, (20, 0, True)),
    ("R not known, F after the position", None, TRIMMED, TRIMMED, 17, 2, (17, 0, True)),
    ("R not known, and still not", None, LOOK, LOOK, 15, 5, (None, 0, False)),
    ("nothing read, all deleted", 10, seen(20, 20, 0, None), seen(20, 20, 0, None), 20, 0, (20, 10, False)),
]
CASES = [pytest.param(*rest, id=name) for name, *rest in FORMULA]


@pytest.mark.parametrize(("read", "first", "second", "after", "count", "expected"), CASES)
def test_formula(
    read: int | None, first: Evidence, second: Evidence, after: int, count: int, expected: tuple[int | None, int, bool]
) -> None:
    position = Position(at(10), read, None, "ours")
    move = make_move(position, first, second, at(10), at(after), count, Carry("ours"))
    assert (move.entries_read, move.lost, move.gap) == expected
    assert (move.before, move.after, move.incarnation, move.high) == (at(10), at(after), "ours", None)


@pytest.mark.parametrize(
    ("last", "read", "after", "count", "expected"),
    [
        (0, 0, 20, 5, (20, 0, False)),
        (0, 0, 17, 2, (17, 0, False)),
        (10, 10, 20, 5, (20, 0, True)),
        (10, None, 17, 2, (17, 0, True)),
    ],
    ids=["first start", "first start, not to the end", "made anew", "made anew, R not known"],
)
def test_adopted_stream_starts_without_its_history(
    last: int, read: int | None, after: int, count: int, expected: tuple[int, int, bool]
) -> None:
    move = make_move(
        Position(at(last), read), TRIMMED, TRIMMED, at(last), at(after), count, Carry("new", takes_mark=True)
    )
    assert (move.entries_read, move.lost, move.gap) == expected
    assert move.incarnation == "new"


@pytest.mark.parametrize(("high", "kept"), [(None, None), (19, None), (20, 20), (21, 21)])
def test_high_is_cleared_by_the_first_commit_above_it(high: int | None, kept: int | None) -> None:
    position = Position(at(10), 10, None if high is None else at(high), "ours")
    move = make_move(position, LOOK, LOOK, at(10), at(20), 10, Carry("ours"))
    assert move.high == (None if kept is None else at(kept))


@dataclass
class Simulation:
    """A stream, and a reader that decides with `judge` and commits each move."""

    added: int = 0
    present: list[EntryId] = field(default_factory=list)
    deleted: set[EntryId] = field(default_factory=set)
    carried: list[EntryId] = field(default_factory=list)
    row: Position = field(default_factory=lambda: Position(candidate="ours"))
    # Entries deleted before the first commit belong to nobody's reading.
    history: frozenset[EntryId] = frozenset()

    @property
    def last(self) -> EntryId:
        return at(self.added)

    @property
    def lost(self) -> int:
        """The entries that were really deleted unread."""
        return len(self.deleted - set(self.carried) - self.history)

    def add(self, count: int) -> None:
        self.present += [at(self.added + number) for number in range(1, count + 1)]
        self.added += count

    def delete(self, place: int) -> None:
        if self.present:
            self.deleted.add(self.present.pop(place % len(self.present)))

    def trim(self, count: int) -> None:
        self.deleted.update(self.present[:count])
        del self.present[:count]

    def look(self) -> Evidence:
        return Evidence(
            last_id=self.last,
            added=self.added,
            length=len(self.present),
            first_entry=self.present[0] if self.present else None,
            next_entry=next((entry for entry in self.present if entry > self.row.last), None),
            last_entry=self.present[-1] if self.present else None,
            mark="ours",
            delivered=self.row.last,
            consumers=1,
        )

    def read(self, count: int, before: int = 0, behind: int = 0) -> None:
        """One batch of at most `count`, with entries added before and behind XRANGE, between the looks.

        Afterwards no loss is counted that did not happen; every loss is counted after a batch to the end of the stream,
        and where the first entry lay after the position.
        """
        first = self.look()
        self.add(before)
        batch = [entry for entry in self.present if entry > self.row.last][:count]
        self.add(behind)
        second = self.look()
        if not second.confirms(first):
            return
        exact = first.first_entry is not None and first.first_entry > self.row.last
        match judge(self.row, first, batch, None, SUBJECT):
            case Carry() as carry:
                self.commit(make_move(self.row, first, second, self.row.last, batch[-1], len(batch), carry), batch)
                exact = exact or self.row.last in (first.last_id, second.last_id)
            case Skip(move, went_back):
                assert not went_back
                self.commit(move, [])
                exact = True
            case verdict:
                assert verdict == CaughtUp()
                return
        assert self.row.lost <= self.lost
        if exact:
            assert self.row.lost == self.lost

    def commit(self, move: Move, batch: list[EntryId]) -> None:
        if self.row.last == BEGINNING:
            self.history = frozenset(self.deleted)
        self.carried += batch
        self.row = replace(
            self.row,
            last=move.after,
            entries_read=move.entries_read,
            high=move.high,
            incarnation=move.incarnation,
            lost=self.row.lost + move.lost,
            gaps=self.row.gaps + move.gap,
        )


few = st.integers(0, 4)
steps = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 6)),
    st.tuples(st.just("trim"), st.integers(1, 6)),
    st.tuples(st.just("delete"), st.integers(0, 20)),
    st.tuples(st.just("read"), st.integers(1, 6), few, few),
)


@given(st.lists(steps, max_size=40))
def test_losses_are_never_overcounted_and_exact_at_the_end(plan: list[tuple[str, *tuple[int, ...]]]) -> None:
    simulation = Simulation()
    for step, *numbers in plan:
        getattr(simulation, step)(*numbers)
    while simulation.row.last < simulation.last:
        simulation.read(5)
    assert simulation.carried == sorted(set(simulation.carried))
    assert set(simulation.carried) | simulation.deleted == {at(number + 1) for number in range(simulation.added)}
    assert simulation.row.lost == simulation.lost
    assert simulation.row.gaps == 0
