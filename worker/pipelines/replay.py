"""Replays dead letters: writes each to its table, with its original position and time, and deletes it, in one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from worker.contract.entry_id import EntryId
from worker.db.dead_letters import newest_letter, read_letters, take_letters
from worker.pipelines.model import Batch, InvalidRecord, Item, Written
from worker.pipelines.sources.stream.entries import TOO_LARGE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.db.dead_letters import LetterFilter, StoredLetter
    from worker.db.session import Database, Transaction
    from worker.pipelines.model import RecordType, Sink, Window

LETTERS_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class LetterClaim:
    """The claim of a replay is the deletion of its letters: a letter becomes a row once."""

    ids: tuple[int, ...]

    async def take(self, tx: Transaction) -> bool:
        return await take_letters(tx, self.ids)


@dataclass(slots=True)
class Replayed:
    """`rows` became rows; `refused` by the table, letters again; `invalid`: id → why it stays as it is."""

    rows: int = 0
    refused: int = 0
    invalid: dict[int, str] = field(default_factory=dict)


async def replay(
    database: Database, record: RecordType[Any], sink: Sink[Any], wanted: LetterFilter, window: Window
) -> AsyncIterator[Replayed]:
    """Page by page, the oldest first. Letters that are written during the replay are not replayed.

    Raises Unavailable, TableRefused, UnknownFailure; it may be repeated then.
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
        yield await _replay_page(record, sink, letters, window)


async def _replay_page(
    record: RecordType[Any], sink: Sink[Any], letters: list[StoredLetter], window: Window
) -> Replayed:
    done = Replayed()
    by_origin: dict[str, dict[int, Item[Any]]] = {}
    for letter in letters:
        try:
            item = _read(record, letter, window)
        except InvalidRecord as error:
            done.invalid[letter.id] = str(error)
        else:
            by_origin.setdefault(letter.origin.rpartition("/")[0], {})[letter.id] = item
    for origin, items in by_origin.items():
        outcome = await sink.write(Batch(LetterClaim(tuple(items)), origin, tuple(items.values())))
        if isinstance(outcome, Written):
            done.rows += outcome.rows
            done.refused += outcome.letters
        else:
            done.invalid |= dict.fromkeys(items, "another replay or purge takes letters of this page")
    return done


def _read(record: RecordType[Any], letter: StoredLetter, window: Window) -> Item[Any]:
    """The record of a letter, as of the arrival of its entry. Raises InvalidRecord."""
    if letter.error_class == TOO_LARGE:
        raise InvalidRecord(TOO_LARGE, "only the beginning of the entry is kept")
    try:
        entry_id = EntryId.parse(letter.origin.rpartition("/")[2].encode())
    except ValueError:
        raise InvalidRecord("origin", f"the origin {letter.origin} is not an entry") from None
    return Item(entry_id, letter.payload, record.parse(letter.payload, entry_id, window))
