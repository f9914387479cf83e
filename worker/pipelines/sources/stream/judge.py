"""Decides what to do with a stream, from its row and the evidence. docs/pipelines.md has the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from worker.db.positions import Move, Position
from worker.pipelines.sources.stream.evidence import Evidence, NoStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.contract.entry_id import EntryId


@dataclass(frozen=True, slots=True)
class Carry:
    """Carry the entries that were read. The row then gets `mark`; with `takes_mark` the mark is new to it."""

    mark: str
    takes_mark: bool = False


@dataclass(frozen=True, slots=True)
class Skip:
    """Commit without rows: the entries up to `move.after` were deleted unread, or Redis went back."""

    move: Move
    went_back: bool = False


@dataclass(frozen=True, slots=True)
class Unmarked:
    """Nobody carries the stream: a mark has to be created on it."""


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """Everything is carried."""


@dataclass(frozen=True, slots=True)
class Wait:
    """There is nothing that could be carried from here; another replica may see more."""

    cause: str


@dataclass(frozen=True, slots=True)
class Hold:
    """It is not certain what may be carried."""

    cause: str
    remedy: str


Verdict: TypeAlias = Carry | Skip | CaughtUp | Unmarked | Wait | Hold

SHARED_GROUP = "Another program reads with this group. Give it its own group, and delete its consumer from this one."
OTHER_DATABASE = "Give each database a group of its own ({prefix}_STREAM_GROUP). For another Redis: {set_hint}"
SET_HINT = "`viewer-worker streams --set {stream} ID|0|$` sets the position to continue from."


@dataclass(frozen=True, slots=True)
class Subject:
    """Names for the texts: the stream, and the prefix of its pipeline's settings."""

    stream: str
    prefix: str

    @property
    def set_hint(self) -> str:
        return SET_HINT.format(stream=self.stream)


def judge(
    row: Position, evidence: Evidence | NoStream, read: Sequence[EntryId], owner: str | None, subject: Subject
) -> Verdict:
    """The first rule that fits, from the top.

    `read`: the ids that XRANGE returned after the position. `owner`: another row of this database that expects the
    mark, if there is one.
    """
    if isinstance(evidence, NoStream):
        if evidence.kind != "none":
            return Hold(f"the key {subject.stream} holds a {evidence.kind}, not a stream", "Rename the stream.")
        return Wait("there is no stream yet")
    # The last id may fit where an earlier one does not: 6-0 after 5-18446744073709551615.
    if unfit := next((entry for entry in (evidence.last_id, *read) if not entry.fits), None):
        return Hold(f"the id {unfit} does not fit into a bigint", f"Delete the stream. {subject.set_hint}")
    if evidence.consumers > 1:
        return Hold("the group of this worker has several consumers", SHARED_GROUP)
    if evidence.consumers == 1 and evidence.mark is None:
        return Hold("the group of this worker has another program's consumer", SHARED_GROUP)
    if owner is not None:
        return Hold(f"{owner} carries this stream already", "Let only one source carry a stream.")
    if evidence.mark is not None and evidence.mark == row.incarnation:
        return _judge_ours(row, evidence, subject)
    return _judge_foreign(row, evidence, read, subject) or _judge_entries(row, evidence, subject, takes_mark=True)


def _judge_ours(row: Position, evidence: Evidence, subject: Subject) -> Verdict:
    if evidence.last_id < row.last:
        high = row.last if row.high is None else max(row.high, row.last)
        return Skip(Move(row.last, evidence.last_id, evidence.added, high, str(row.incarnation)), went_back=True)
    return _judge_entries(row, evidence, subject, takes_mark=False)


def _judge_foreign(
    row: Position, evidence: Evidence, read: Sequence[EntryId], subject: Subject
) -> Hold | Wait | Unmarked | None:
    """The mark is missing or another one. None: the stream is new, or was deleted and created again."""
    if evidence.mark is not None and evidence.delivered is not None and evidence.delivered > row.last:
        return Hold(
            "another database carries this stream, or it is another Redis",
            OTHER_DATABASE.format(prefix=subject.prefix, set_hint=subject.set_hint),
        )
    if evidence.first_entry is not None and evidence.first_entry <= row.last:
        complete = read[-1] == evidence.last_entry if read else evidence.next_entry is None
        same = complete and row.entries_read is not None and len(read) == evidence.added - row.entries_read
        looks = f". It looks like the same stream: --set {subject.stream} {row.last}" if same else ""
        return Hold(
            f"this is not the stream that was carried to {row.last}: another Redis, a copy from before the worker, or "
            f"the group was destroyed{looks}",
            f"Correct REDIS_URL if it is another Redis. Otherwise: {subject.set_hint}",
        )
    if evidence.first_entry is None and evidence.last_id < row.last:
        return Wait("the stream is empty and behind the position")
    if evidence.mark is None:
        return Unmarked()
    if evidence.mark not in (row.candidate or "").split():
        return Hold(
            "another database or source carries this stream, perhaps",
            OTHER_DATABASE.format(prefix=subject.prefix, set_hint=subject.set_hint),
        )
    return None


def _judge_entries(row: Position, evidence: Evidence, subject: Subject, *, takes_mark: bool) -> Verdict:
    carry = Carry(str(evidence.mark), takes_mark)
    if evidence.next_entry is not None and row.high is not None and evidence.next_entry <= row.high:
        return Hold(
            f"Redis went back, and the entry {evidence.next_entry} may be carried already (carried up to {row.high})",
            f"Compare it with the table. {subject.set_hint}",
        )
    if evidence.next_entry is not None:
        return carry
    if evidence.last_id > row.last:
        return Skip(make_move(row, evidence, evidence, row.last, evidence.last_id, 0, carry))
    return CaughtUp()


def make_move(
    row: Position, first: Evidence, second: Evidence, before: EntryId, after: EntryId, count: int, carry: Carry
) -> Move:
    """The claim of a batch of `count` entries, with the number of entries that were deleted unread before it.

    `first` and `second` are the two looks that the entries were read between.
    """
    read = first.removed if carry.takes_mark else row.entries_read
    gap = carry.takes_mark and row.last != (0, 0)
    entries_read, lost, unsure = _count_lost(read, first, second, before, after, count)
    high = None if row.high is not None and after > row.high else row.high
    return Move(before, after, entries_read, high, carry.mark, lost, gap or unsure)


def _count_lost(
    read: int | None, first: Evidence, second: Evidence, before: EntryId, after: EntryId, count: int
) -> tuple[int | None, int, bool]:
    """Entries read afterwards, entries lost, and whether there is a gap: the number of lost ones is not known."""
    # Entries that are added between the looks are in the batch only where it ends at the second look's last id.
    if after == first.last_id or after == second.last_id:
        at = first if after == first.last_id else second
        certain: int | None = at.added
    elif first.first_entry is not None and first.first_entry > before:
        certain = first.removed + count
    else:
        certain = None
    if read is None:
        return certain, 0, certain is not None
    if certain is None:
        return read + count, 0, False
    lost = certain - read - count
    return (certain, 0, True) if lost < 0 else (certain, lost, False)
