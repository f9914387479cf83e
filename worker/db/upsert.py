"""Writes records: one statement for a batch, made from the columns and the conflict rule of a record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from sqlalchemy import (
    ARRAY,
    BigInteger,
    DateTime,
    Double,
    Text,
    bindparam,
    cast,
    column,
    func,
    or_,
    select,
    table,
    text,
    tuple_,
)
from sqlalchemy.dialects.postgresql import INET
from sqlalchemy.dialects.postgresql import insert as upsert

from worker.db.packed_text import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.dialects.postgresql.dml import Insert
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.types import TypeEngine

# Type of the column → type that its values are sent as. Where they differ, Postgres casts.
_TYPES: dict[str, tuple[TypeEngine[Any], TypeEngine[Any]]] = {
    "text": (Text(), Text()),
    "timestamptz": (DateTime(timezone=True), DateTime(timezone=True)),
    "inet": (INET(), Text()),
    "bigint": (BigInteger(), BigInteger()),
    "double precision": (Double(), Double()),
}


class ColumnShape(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...


class ConflictRule(Protocol):
    @property
    def key(self) -> tuple[str, ...]: ...
    @property
    def action(self) -> Literal["keep", "replace", "replace_older"]: ...
    @property
    def optional(self) -> str | None: ...
    @property
    def position(self) -> tuple[str, ...]: ...


class RecordShape(Protocol):
    """What this module reads of a record type."""

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> Sequence[ColumnShape]: ...
    @property
    def rule(self) -> ConflictRule: ...


Rows: TypeAlias = "Sequence[tuple[Any, ...]]"


class RecordTable:
    """The table of a record type. Every method runs in the caller's transaction.

    `future` (seconds): a position further ahead of the time is a mistake, which any record replaces. Without
    `replaces`, a record whose key the table has is refused where the rule would replace its row.
    """

    def __init__(self, record: RecordShape, *, future: float = 0.0, replaces: bool = True) -> None:
        self.name = record.name
        self.columns = frozenset(shape.name for shape in record.columns)
        self._names = [shape.name for shape in record.columns]
        self._texts = [place for place, shape in enumerate(record.columns) if _is_text(shape)]
        rule = record.rule
        self._key = [self._names.index(name) for name in rule.key]
        self._position = [self._names.index(name) for name in rule.position]
        self._optional = None if rule.optional is None else self._names.index(rule.optional)
        self._folds = rule.action != "keep"
        self._insert = _insertion(record)
        keeps = rule.action == "replace" and not replaces
        self._upsert = self._insert if keeps else _on_conflict(self._insert, record, future)

    async def insert(self, tx: AsyncConnection, rows: Rows) -> int:
        """Insert rows, at least one; those of equal key as if one after the other.

        Returns how many are in the table for the first time, or, where the rule replaces rows, all.
        """
        if self._has_no_key(rows):
            # ON CONFLICT costs something even where no row has a key.
            return await self._execute(tx, self._insert, rows)
        # In the order of the key: two writers that insert the same keys in different orders would deadlock.
        inserted = await self._execute(tx, self._upsert, sorted(self._fold(rows), key=self._sort_key))
        return len(rows) if self._folds else inserted

    async def insert_all(self, tx: AsyncConnection, rows: Rows, at_once: int) -> int:
        """As `insert`, with at most `at_once` rows in a statement."""
        if not self._has_no_key(rows):
            # As in one statement: all of them in the order of the key.
            rows = sorted(rows, key=self._sort_key)
        return sum([await self.insert(tx, rows[at : at + at_once]) for at in range(0, len(rows), at_once)])

    def _has_no_key(self, rows: Rows) -> bool:
        return self._optional is not None and all(row[self._optional] is None for row in rows)

    def _fold(self, rows: Rows) -> Rows:
        """The row that wins, for each key: a statement must not have two."""
        if not self._folds:
            return rows
        winners: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for row in rows:
            key = self._key_of(row)
            if key not in winners or self._position_of(row) >= self._position_of(winners[key]):
                winners[key] = row
        return list(winners.values())

    def _key_of(self, row: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple([row[place] for place in self._key])

    def _position_of(self, row: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple([row[place] for place in self._position])

    def _sort_key(self, row: tuple[Any, ...]) -> tuple[tuple[bool, Any], ...]:
        """NULL is less than any value."""
        return tuple([(row[place] is not None, row[place]) for place in self._key])

    async def _execute(self, tx: AsyncConnection, statement: Insert, rows: Rows) -> int:
        columns: list[Any] = list(zip(*rows, strict=True))
        packed = pack([columns[place] for place in self._texts])
        for place, joined in zip(self._texts, packed.texts, strict=True):
            columns[place] = joined
        parameters = dict(zip(self._names, columns, strict=True))
        parameters |= {"separator": packed.separator, "null": packed.null}
        return (await tx.execute(statement, parameters)).rowcount


def _on_conflict(insert: Insert, record: RecordShape, future: float) -> Insert:
    rule = record.rule
    if rule.action == "keep":
        given = None if rule.optional is None else text(f"{rule.optional} IS NOT NULL")
        return insert.on_conflict_do_nothing(index_elements=rule.key, index_where=given)
    new = insert.excluded
    values = {shape.name: new[shape.name] for shape in record.columns if shape.name not in rule.key}
    if rule.action == "replace":
        return insert.on_conflict_do_update(index_elements=rule.key, set_=values)
    stored = insert.table.c
    is_newer = tuple_(*(new[name] for name in rule.position)) > tuple_(*(stored[name] for name in rule.position))
    latest = (func.extract("epoch", func.clock_timestamp()) + future) * 1000
    return insert.on_conflict_do_update(
        index_elements=rule.key, set_=values, where=or_(is_newer, stored[rule.position[0]] > latest)
    )


def _insertion(record: RecordShape) -> Insert:
    target = table(record.name, *(column(shape.name, _TYPES[shape.type][0]) for shape in record.columns))
    return upsert(target).from_select(
        [shape.name for shape in record.columns], select(*(_unnest(shape) for shape in record.columns))
    )


def _is_text(shape: ColumnShape) -> bool:
    return isinstance(_TYPES[shape.type][1], Text)


def _unnest(shape: ColumnShape) -> Any:
    """Beside longer arrays, unnest fills up a shorter one with NULLs."""
    stored, sent = _TYPES[shape.type]
    values = func.unnest(unpack(shape.name) if _is_text(shape) else bindparam(shape.name, type_=ARRAY(sent)))
    return values if stored is sent or type(stored) is type(sent) else cast(values, stored)
