"""Replays dead letters: writes each to its table, with its original position and time, and deletes it, in one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from worker.contract.entry_id import EntryId
from worker.db.dead_letters import newest_letter, read_letters, take_letters
from worker.errors import TableRefused, UnknownFailure
from worker.pipelines.model import Batch, InvalidRecord, Item, Written
from worker.pipelines.sources.stream.entries import TOO_LARGE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.db.dead_letters import LetterFilter, StoredLetter
    from worker.db.session import Database, Transaction
    from worker.pipelines.model import RecordType, Sink, Window

LETTERS_AT_ONCE = 100
REPLAY_AGAIN = "Fix the cause, and replay again: the letters that are left stay. viewer-worker check may show more."


@dataclass(frozen=True, slots=True)
class LetterClaim:
    """The claim of a replay is the deletion of its letters: a letter becomes a row once."""

    ids: tuple[int, ...]

    async def take(self, tx: Transaction) -> bool:
        return await take_letters(tx, self.ids)


@dataclass(frozen=True, slots=True)
class Replayed:
    """One step. `rows` became rows; `refused` by the table, letters again; `invalid`: id → why it stays as it is."""

    rows: int = 0
    refused: int = 0
    invalid: dict[int, str] = field(default_factory=dict)


async def replay(
    database: Database, record: RecordType[Any], sink: Sink[Any], wanted: LetterFilter, window: Window
) -> AsyncIterator[Replayed]:
    """Step by step, the oldest first. Letters that are written during the replay are not replayed.

    Raises Unavailable and TableRefused; it may be repeated then.
    """
    async with database.transaction() as tx:
        newest = await newest_letter(tx)
    after = 0
    while True:
        async with database.transaction() as tx:
            found = await read_letters(tx, wanted, after, LETTERS_AT_ONCE)
        letters = [letter for letter in found if letter.id <= newest]
        if not letters:
            return
        after = letters[-1].id
        async for done in _replay_page(record, sink, letters, window):
            yield done


async def _replay_page(
    record: RecordType[Any], sink: Sink[Any], letters: list[StoredLetter], window: Window
) -> AsyncIterator[Replayed]:
    by_origin: dict[str, dict[int, Item[Any]]] = {}
    invalid: dict[int, str] = {}
    for letter in letters:
        try:
            item = _read(record, letter, window)
        except InvalidRecord as error:
            invalid[letter.id] = str(error)
        else:
            by_origin.setdefault(letter.origin.rpartition("/")[0], {})[letter.id] = item
    yield Replayed(invalid=invalid)
    for origin, items in by_origin.items():
        try:
            outcome = await sink.write(Batch(LetterClaim(tuple(items)), origin, tuple(items.values())))
        except (TableRefused, UnknownFailure) as error:
            raise TableRefused(str(error), REPLAY_AGAIN) from error
        if isinstance(outcome, Written):
            yield Replayed(outcome.rows + outcome.repeated, outcome.letters)
        else:
            yield Replayed(invalid=dict.fromkeys(items, "another replay or purge takes letters of this page"))


def _read(record: RecordType[Any], letter: StoredLetter, window: Window) -> Item[Any]:
    """The record of a letter, as of its arrival: the id of its entry, or else the time of the letter.

    Raises InvalidRecord.
    """
    if letter.error_class == TOO_LARGE:
        raise InvalidRecord(TOO_LARGE, "only the beginning of the entry is kept")
    key = letter.origin.rpartition("/")[2]
    try:
        arrived = EntryId.parse(key.encode())
    except ValueError:  # a ticket, and the record's place in its batch
        arrived = EntryId(int(letter.received_at.timestamp() * 1000), 0)
    return Item(key, letter.payload, record.parse(letter.payload, arrived, window))
