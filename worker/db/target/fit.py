"""Checks whether the worker can update the application's own table, and how ids become its keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import BigInteger, Text, Uuid, text

from worker.db.quoting import quote_identifier
from worker.db.tables import metadata
from worker.errors import TargetUnusable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.types import TypeEngine

    from worker.db.target.names import TargetNames

INTEGERS = ("int2", "int4", "int8")
OWN = list(metadata.tables)
KEY_TYPES = ("smallint", "integer", "bigint", "uuid")
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class Key:
    """How ids become keys: they are sent as `kind` and compared as `cast`, the key column's type."""

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


async def fit(tx: AsyncConnection, names: TargetNames) -> Key:
    """Check that the table exists and fits. Raises TargetUnusable with the problem and its fix."""
    found = (
        await tx.execute(
            _LOOK,
            {"target": names.regclass, "table": names.table, "key": names.key, "column": names.column, "own": OWN},
        )
    ).one()
    if problem := _problem(names, found):
        raise TargetUnusable(*problem)
    if found.key_category == "S":
        # A cast to "character" would cut ids down to one character.
        return Key(Text(), "pg_catalog.bpchar" if found.key_name == "character" else found.key_name)
    return Key(Uuid(), "uuid") if found.key_name == "uuid" else Key(BigInteger(), "bigint")


_LOOK = text(
    """
    SELECT c.relkind::text,
           c.oid = ANY (SELECT to_regclass(own) FROM unnest(CAST(:own AS text[])) AS own) AS is_own,
           k.attnum AS key_number,
           kt.oid::regtype::text AS key_name,
           kt.typcategory::text AS key_category,
           v.attnum AS column_number,
           vt.typname AS column_type,
           v.attgenerated <> '' AS generated,
           (
               SELECT r.rulename FROM pg_rewrite r
               WHERE r.ev_class = c.oid AND r.ev_type = '2' AND r.ev_enabled IN ('O', 'A')
               ORDER BY r.rulename LIMIT 1
           ) AS update_rule,
           EXISTS (
               SELECT FROM pg_index i
               WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
                 AND i.indnkeyatts = 1 AND i.indkey[0] = k.attnum
           ) AS is_unique,
           has_column_privilege(c.oid, k.attnum, 'SELECT') AND has_column_privilege(c.oid, v.attnum, 'SELECT')
               AND has_column_privilege(c.oid, v.attnum, 'UPDATE') AS allowed,
           -- A row that is visible but may not be changed looks as if it were locked.
           row_security_active(c.oid) AND NOT (
               EXISTS (
                   SELECT FROM pg_policy p
                   WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd = '*'
                     -- Only a constant can be printed without its table, and so without waiting for a lock on it.
                     AND CASE WHEN p.polqual::text LIKE '{CONST %' THEN pg_get_expr(p.polqual, 0) = 'true' END
                     AND CASE
                             WHEN p.polwithcheck IS NULL THEN true
                             WHEN p.polwithcheck::text LIKE '{CONST %' THEN pg_get_expr(p.polwithcheck, 0) = 'true'
                         END
                     AND EXISTS (SELECT FROM unnest(p.polroles) role WHERE role = 0 OR pg_has_role(role, 'USAGE'))
               ) AND NOT EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND NOT p.polpermissive)
           ) AS rows_may_hide,
           (
               SELECT array_agg(
                   CASE WHEN pg_table_is_visible(o.oid) THEN o.relname ELSE n.nspname || '.' || o.relname END
                   ORDER BY o.oid
               )
               FROM pg_class o JOIN pg_namespace n ON n.oid = o.relnamespace
               WHERE c.oid IS NULL AND lower(o.relname) = lower(:table) AND o.relkind IN ('r', 'p')
                 AND n.nspname NOT IN ('pg_catalog', 'information_schema')
           ) AS like_table,
           (
               SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute a
               WHERE a.attrelid = c.oid AND lower(a.attname) IN (lower(:key), lower(:column)) AND NOT a.attisdropped
           ) AS like_columns
    FROM (SELECT to_regclass(:target) AS oid) named
    LEFT JOIN pg_class c ON c.oid = named.oid
    LEFT JOIN pg_attribute k ON k.attrelid = c.oid AND k.attname = :key AND NOT k.attisdropped AND k.attnum > 0
    LEFT JOIN LATERAL (
        -- A domain may be based on another domain.
        WITH RECURSIVE base AS (
            SELECT oid, typbasetype, typcategory FROM pg_type WHERE oid = k.atttypid
            UNION ALL
            SELECT t.oid, t.typbasetype, t.typcategory FROM base JOIN pg_type t ON t.oid = base.typbasetype
        )
        SELECT oid, typcategory FROM base WHERE typbasetype = 0
    ) kt ON true
    LEFT JOIN pg_attribute v ON v.attrelid = c.oid AND v.attname = :column AND NOT v.attisdropped AND v.attnum > 0
    LEFT JOIN pg_type vt ON vt.oid = v.atttypid
    """
)


def _problem(names: TargetNames, found: Row[Any]) -> tuple[str, str] | None:
    """The problem and its fix, or None if the table fits."""
    shown = str(names)
    if found.relkind is None:
        return f"there is no table {shown}", _exact_name("VIEW_TARGET_TABLE", "the table", found.like_table)
    if found.is_own:
        return f"{shown} is the worker's own table", "Set VIEW_TARGET_TABLE to a table of the application."
    if found.relkind not in ("r", "p"):
        return f"{shown} is not a table", "Set VIEW_TARGET_TABLE to a table of this database."
    if found.key_number is None:
        remedy = _exact_name("VIEW_TARGET_KEY", "its key column", _alike(names.key, found.like_columns))
        return f"{shown} has no column {names.key}", remedy
    if found.column_number is None:
        remedy = _exact_name("VIEW_TARGET_COLUMN", "its total column", _alike(names.column, found.like_columns))
        return f"{shown} has no column {names.column}", remedy
    if found.column_type not in INTEGERS or found.generated:
        kind = "generated" if found.generated else found.column_type
        return f"{shown}.{names.column} is {kind}, not an integer", "Change the column's type to integer or bigint."
    # The type `name` would cut an id down to 63 bytes, and so to another id's key.
    if (found.key_category != "S" or found.key_name == "name") and found.key_name not in KEY_TYPES:
        return f"{shown}.{names.key} is {found.key_name}", "The key must be of type text, integer or uuid."
    if not found.is_unique:
        return f"{shown}.{names.key} is not unique", "Add a primary key or a unique index on this column alone."
    if found.update_rule is not None:
        return (
            f"{shown} has the rule {found.update_rule} ON UPDATE",
            "Replace the rule by a trigger: Postgres does not let the worker's statement pass through rules.",
        )
    return _problem_of_rights(names, found)


def _exact_name(setting: str, what: str, alike: Sequence[str] | None) -> str:
    """`alike`: names that differ from the given one only by case or by their schema."""
    if not alike:
        return f"Set {setting} to the exact name of {what}."
    return f"Did you mean {' or '.join(alike)}? Set {setting} to the exact name of {what}: case matters."


def _alike(name: str, columns: Sequence[str] | None) -> list[str]:
    return [column for column in columns or () if column.lower() == name.lower()]


def _problem_of_rights(names: TargetNames, found: Row[Any]) -> tuple[str, str] | None:
    key, column = quote_identifier(names.key), quote_identifier(names.column)
    if not found.allowed:
        return (
            f"the worker may not read and update {names}",
            f"GRANT SELECT ({key}, {column}), UPDATE ({column}) ON {names.regclass} TO the worker's user.",
        )
    if found.rows_may_hide:
        return (
            f"row-level security may hide rows of {names} from the worker",
            f"CREATE POLICY viewer_worker ON {names.regclass} TO the worker's user USING (true).",
        )
    return None
