"""Writes records: one statement for a batch, made from the columns and the conflict rule of a record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import ARRAY, BigInteger, DateTime, Double, Text, bindparam, cast, column, func, select, table, text
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


class AppendRule(Protocol):
    @property
    def time(self) -> str: ...
    @property
    def event_id(self) -> str: ...


class RecordShape(Protocol):
    """What this module reads of a record type."""

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> Sequence[ColumnShape]: ...
    @property
    def rule(self) -> AppendRule: ...


class RecordTable:
    """The table of a record type. Every method runs in the caller's transaction."""

    def __init__(self, record: RecordShape) -> None:
        self.name = record.name
        self.columns = frozenset(shape.name for shape in record.columns)
        self._names = [shape.name for shape in record.columns]
        self._texts = [place for place, shape in enumerate(record.columns) if _is_text(shape)]
        self._time = self._names.index(record.rule.time)
        self._event_id = self._names.index(record.rule.event_id)
        self._insert = _insertion(record)
        # A separate statement: ON CONFLICT costs something even where no row has an event_id.
        self._insert_once = self._insert.on_conflict_do_nothing(
            index_elements=[record.rule.time, record.rule.event_id],
            index_where=text(f"{record.rule.event_id} IS NOT NULL"),
        )

    async def insert(self, tx: AsyncConnection, rows: Sequence[tuple[Any, ...]]) -> int:
        """Insert rows, at least one; a row with an `event_id` only if its time and id are not there yet.

        Returns how many were inserted.
        """
        event_id, time = self._event_id, self._time
        if any(row[event_id] is not None for row in rows):
            # Two writers that insert the same ids in different orders would deadlock.
            rows = sorted(rows, key=lambda row: (row[event_id] or "", row[time]))
            statement = self._insert_once
        else:
            statement = self._insert
        columns: list[Any] = list(zip(*rows, strict=True))
        packed = pack([columns[place] for place in self._texts])
        for place, joined in zip(self._texts, packed.texts, strict=True):
            columns[place] = joined
        parameters = dict(zip(self._names, columns, strict=True))
        parameters |= {"separator": packed.separator, "null": packed.null}
        return (await tx.execute(statement, parameters)).rowcount


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
