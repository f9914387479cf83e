"""Dead letters: records that cannot become rows, kept with their original bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import ARRAY, BigInteger, Interval, any_, bindparam, delete, func, insert, select

from worker.db.tables import dead_letters

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection


class LetterShape(Protocol):
    """What is written of a letter. `payload` is bytes; `error` a line without values."""

    @property
    def origin(self) -> str: ...
    @property
    def error_class(self) -> str: ...
    @property
    def error(self) -> str: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def sqlstate(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class StoredLetter:
    """A row of `dead_letters`."""

    id: int
    pipeline: str
    received_at: datetime
    origin: str
    error_class: str
    sqlstate: str | None
    error: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Which letters are meant; None: all. `older_than` is measured from the time at which they were written."""

    ids: tuple[int, ...] | None = None
    pipeline: str | None = None
    error_class: str | None = None
    older_than: timedelta | None = None


_letter = dead_letters.c
# Every other number is the id of no letter, and some do not fit into the column.
_POSSIBLE_IDS = range(1, 2**63)
_ids = bindparam("ids", type_=ARRAY(BigInteger))


async def write_letters(tx: AsyncConnection, pipeline: str, letters: Sequence[LetterShape]) -> None:
    """In the caller's transaction."""
    if letters:
        rows = [
            {
                "pipeline": pipeline,
                "origin": letter.origin,
                "error_class": letter.error_class,
                "sqlstate": letter.sqlstate,
                "error": letter.error,
                "payload": letter.payload,
            }
            for letter in letters
        ]
        # Without RETURNING, which needs a right to read.
        await tx.execute(insert(dead_letters).inline(), rows)


async def read_letters(tx: AsyncConnection, wanted: LetterFilter, after: int, at_most: int) -> list[StoredLetter]:
    """The oldest letters with an id above `after`."""
    rows = select(dead_letters).where(_letter.id > after, *_conditions(wanted)).order_by(_letter.id).limit(at_most)
    return [StoredLetter(**row._mapping) for row in await tx.execute(rows)]


async def newest_letter(tx: AsyncConnection) -> int:
    """The id of the newest letter; 0 where there is none."""
    return int((await tx.execute(select(func.coalesce(func.max(_letter.id), 0)))).scalar_one())


async def count_letters(tx: AsyncConnection, wanted: LetterFilter) -> dict[tuple[str, str], int]:
    """How many letters there are for each pipeline and error class."""
    found = (
        select(_letter.pipeline, _letter.error_class, func.count())
        .where(*_conditions(wanted))
        .group_by(_letter.pipeline, _letter.error_class)
        .order_by(_letter.pipeline, _letter.error_class)
    )
    return {(pipeline, error_class): count for pipeline, error_class, count in await tx.execute(found)}


async def take_letters(tx: AsyncConnection, ids: Sequence[int]) -> bool:
    """Delete these letters. False, and none is deleted, when another replay or purge deleted one."""
    # Without FOR UPDATE, which needs a right that the worker's role does not have.
    async with tx.begin_nested() as savepoint:
        deleted = await tx.execute(delete(dead_letters).where(_letter.id == any_(_ids)), {"ids": list(ids)})
        if deleted.rowcount != len(ids):
            await savepoint.rollback()
    return deleted.rowcount == len(ids)


async def purge_letters(tx: AsyncConnection, wanted: LetterFilter, at_most: int) -> int:
    """Delete the oldest of these letters. Returns how many went."""
    oldest = select(_letter.id).where(*_conditions(wanted)).order_by(_letter.id).limit(at_most)
    return (await tx.execute(delete(dead_letters).where(_letter.id.in_(oldest)))).rowcount


def _conditions(wanted: LetterFilter) -> list[ColumnElement[Any]]:
    conditions: list[ColumnElement[Any]] = []
    if wanted.ids is not None:
        conditions.append(_letter.id.in_([letter_id for letter_id in wanted.ids if letter_id in _POSSIBLE_IDS]))
    if wanted.pipeline is not None:
        conditions.append(_letter.pipeline == wanted.pipeline)
    if wanted.error_class is not None:
        conditions.append(_letter.error_class == wanted.error_class)
    if wanted.older_than is not None:
        conditions.append(_letter.received_at < func.now() - bindparam(None, wanted.older_than, Interval))
    return conditions
