"""The application's own table: the column of totals that is kept up to date beside ours, in the same transaction."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Text,
    Uuid,
    bindparam,
    cast,
    column,
    exists,
    func,
    quoted_name,
    select,
    table,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import UserDefinedType

from worker.db.errors import is_refused_data
from worker.errors import TargetUnusable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.types import TypeEngine

    from worker.db.ledger import Change

# Why views of an id are not added: no row has it as its key; it cannot be such a key; the row takes no such total.
UNKNOWN, NOT_A_KEY, REFUSED = "unknown", "not_a_key", "refused"

INTEGERS = ("int2", "int4", "int8")
KEY_TYPES = ("smallint", "integer", "bigint", "uuid")
_NAME_PART = re.compile(r'"((?:[^"]|"")+)"|([^".]+)')
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class TargetNames:
    """Bare names, as the catalog has them; without a `schema` the search path decides."""

    schema: str | None
    table: str
    key: str
    column: str

    def __str__(self) -> str:
        return self.table if self.schema is None else f"{self.schema}.{self.table}"

    @property
    def regclass(self) -> str:
        """The table as `to_regclass` reads it."""
        parts = [self.table] if self.schema is None else [self.schema, self.table]
        return ".".join('"' + part.replace('"', '""') + '"' for part in parts)


def parse_target(table: str, key: str, column: str) -> TargetNames:
    """`Vod`, `app.Vod`, or `"odd.name"` (quotes keep a dot in a name). Raises ValueError saying what is expected."""
    parts, at = [], 0
    while match := _NAME_PART.match(table, at):
        parts.append((match[1] or match[2]).replace('""', '"'))
        at = match.end()
        if table[at : at + 1] != ".":
            break
        at += 1
    if at != len(table) or not 1 <= len(parts) <= 2:
        raise ValueError("a table such as Vod or app.Vod, written as it is")
    return TargetNames(parts[0] if len(parts) == 2 else None, parts[-1], key, column)


@dataclass(frozen=True, slots=True)
class Key:
    """How ids become keys: they are sent as `kind` and compared as `cast`, the type of the key column itself."""

    kind: TypeEngine[Any]
    cast: str

    def of(self, vod_id: str) -> str | int | UUID | None:
        """The id as a key, or None if it cannot be one."""
        if isinstance(self.kind, Text):
            return vod_id
        try:
            if isinstance(self.kind, Uuid):
                return UUID(vod_id)
            number = int(vod_id) if _INTEGER.fullmatch(vod_id) else None
        except ValueError:
            return None
        return number if number is not None and -(2**63) <= number < 2**63 else None


class TargetTable:
    """Each method runs in the caller's transaction. What it cannot add is left out there, and never an error."""

    def __init__(self, names: TargetNames) -> None:
        self.names = names
        self._key: Key | None = None

    async def check(self, tx: AsyncConnection) -> Key:
        """Look whether the table is there and fits. Raises TargetUnusable saying what does not."""
        names = {"target": self.names.regclass, "key": self.names.key, "column": self.names.column}
        found = (await tx.execute(_LOOK, names)).one()
        if problem := _problem(self.names, found):
            raise TargetUnusable(*problem)
        if found.key_category == "S":
            self._key = Key(Text(), "pg_catalog.bpchar" if found.key_name == "character" else found.key_name)
        elif found.key_name == "uuid":
            self._key = Key(Uuid(), "uuid")
        else:
            self._key = Key(BigInteger(), "bigint")
        return self._key

    async def locked(self, tx: AsyncConnection, ids: Sequence[str]) -> set[str]:
        """Which of the ids have a row that somebody has locked; the rows of the others are locked for us, in order.

        Raises TargetUnusable when the table does not fit.
        """
        key = self._key or await self.check(tx)
        keys = {vod_id: value for vod_id in ids if (value := key.of(vod_id)) is not None}
        if not keys:
            return set()
        rows = await tx.execute(_Statements(self.names, key).locked(), {"ids": list(keys), "keys": list(keys.values())})
        return set(rows.scalars())

    async def add(self, tx: AsyncConnection, changes: Iterable[Change]) -> Counter[str]:
        """Add each change to its row. Returns the views that were not added, by reason."""
        key = self._key or await self.check(tx)
        skipped: Counter[str] = Counter()
        batch = []
        for change in changes:
            value = key.of(change.vod_id)
            if value is None:
                skipped[NOT_A_KEY] += change.views
            else:
                batch.append((change.vod_id, value, change.views))
        if batch:
            await self._add(tx, _Statements(self.names, key).add(), batch, skipped)
        return skipped

    async def _add(
        self, tx: AsyncConnection, statement: Select[str], batch: list[tuple[str, Any, int]], skipped: Counter[str]
    ) -> None:
        """In a savepoint; a row that refuses is found by halving."""
        ids, keys, views = (list(column) for column in zip(*batch, strict=True))
        try:
            async with tx.begin_nested():
                added = set((await tx.execute(statement, {"ids": ids, "keys": keys, "views": views})).scalars())
        except DBAPIError as error:
            if not is_refused_data(error):
                raise
            if len(batch) == 1:
                skipped[REFUSED] += views[0]
                return
            half = len(batch) // 2
            await self._add(tx, statement, batch[:half], skipped)
            await self._add(tx, statement, batch[half:], skipped)
        else:
            skipped[UNKNOWN] += sum(count for vod_id, _, count in batch if vod_id not in added)


class _Statements:
    """The two statements, for a table whose keys are of one type."""

    def __init__(self, names: TargetNames, key: Key) -> None:
        target = table(
            quoted_name(names.table, quote=True),
            *(column(quoted_name(name, quote=True)) for name in (names.key, names.column)),
            schema=None if names.schema is None else quoted_name(names.schema, quote=True),
        )
        ids, keys, views = (
            func.unnest(bindparam(name, type_=ARRAY(kind)))
            for name, kind in (("ids", Text()), ("keys", key.kind), ("views", BigInteger()))
        )
        self._target = target
        self._key, self._total = target.c[names.key], target.c[names.column]
        self._named = ids.label("vod_id"), cast(keys, _Named(key.cast)).label("key")
        self._views = views.label("views")

    def locked(self) -> Select[str]:
        wanted = select(*self._named).cte("wanted")
        free = (
            select(self._key.label("key"))
            .where(self._key.in_(select(wanted.c.key)))
            .order_by(self._key)
            # What refers to the row by a foreign key is no hindrance.
            .with_for_update(key_share=True, skip_locked=True)
            .cte("free")
        )
        return (
            select(wanted.c.vod_id)
            .join_from(wanted, self._target, self._key == wanted.c.key)
            .where(~exists().where(free.c.key == wanted.c.key))
        )

    def add(self) -> Select[str]:
        wanted = select(*self._named, self._views).cte("wanted")
        # Several ids may mean one row (07 and 7, upper and lower case): it gets their sum.
        sums = (
            select(self._key.label("key"), func.sum(wanted.c.views).label("views"))
            .join_from(wanted, self._target, self._key == wanted.c.key)
            .group_by(self._key)
            .cte("sums")
        )
        added = (
            update(self._target)
            .where(self._key == sums.c.key)
            .values({self._total: func.coalesce(self._total, 0) + sums.c.views})
            .returning(self._key.label("key"))
            .cte("added")
        )
        return select(wanted.c.vod_id).join_from(wanted, added, added.c.key == wanted.c.key)


class _Named(UserDefinedType[Any]):
    """A type of the database by its name. Without a length: one would cut longer ids down to another's key."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return self.name


_LOOK = text(
    """
    SELECT c.relkind,
           k.attnum AS key_number,
           coalesce(nullif(kt.typbasetype, 0), kt.oid)::regtype::text AS key_name,
           kt.typcategory AS key_category,
           v.attnum AS column_number,
           vt.typname AS column_type,
           v.attgenerated <> '' AS generated,
           EXISTS (
               SELECT FROM pg_index i
               WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
                 AND i.indnkeyatts = 1 AND i.indkey[0] = k.attnum
           ) AS is_unique,
           has_column_privilege(c.oid, k.attnum, 'SELECT') AND has_column_privilege(c.oid, v.attnum, 'SELECT')
               AND has_column_privilege(c.oid, v.attnum, 'UPDATE') AS allowed
    FROM (SELECT to_regclass(:target) AS oid) named
    LEFT JOIN pg_class c ON c.oid = named.oid
    LEFT JOIN pg_attribute k ON k.attrelid = c.oid AND k.attname = :key AND NOT k.attisdropped AND k.attnum > 0
    LEFT JOIN pg_type kt ON kt.oid = k.atttypid
    LEFT JOIN pg_attribute v ON v.attrelid = c.oid AND v.attname = :column AND NOT v.attisdropped AND v.attnum > 0
    LEFT JOIN pg_type vt ON vt.oid = v.atttypid
    """
)


def _problem(names: TargetNames, found: Row[Any]) -> tuple[str, str] | None:
    """What does not fit, and what to do about it."""
    shown = str(names)
    if found.relkind is None:
        return f"there is no table {shown}", "Set VIEW_TARGET_TABLE to its name, as it is written."
    if found.relkind not in ("r", "p"):
        return f"{shown} is not a table", "Set VIEW_TARGET_TABLE to a table of this database."
    if found.key_number is None:
        return f"{shown} has no column {names.key}", "Set VIEW_TARGET_KEY to its key column, as it is written."
    if found.column_number is None:
        return f"{shown} has no column {names.column}", "Set VIEW_TARGET_COLUMN to its column, as it is written."
    if found.column_type not in INTEGERS or found.generated:
        kind = "generated" if found.generated else found.column_type
        return f"{shown}.{names.column} is {kind}, not an integer", "Make it an integer or a bigint."
    if found.key_category != "S" and found.key_name not in KEY_TYPES:
        return f"{shown}.{names.key} is {found.key_name}", "The key must be a text, an integer or a uuid."
    if not found.is_unique:
        return f"{shown}.{names.key} is not unique", "Add a primary key or a unique index on it alone."
    if not found.allowed:
        return (
            f"the worker may not read and update {shown}",
            f"GRANT SELECT ({names.key}, {names.column}), UPDATE ({names.column}) on it to the worker's user.",
        )
    return None
