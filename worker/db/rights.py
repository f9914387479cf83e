"""The rights on the tables that the worker's role needs. deploy/postgres/role.sql grants exactly these."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import ARRAY, Text, bindparam, text

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

RIGHTS = {
    "view_counts": ("SELECT", "INSERT", "UPDATE"),
    "view_count_deltas": ("SELECT", "INSERT", "DELETE"),
    "view_counts_hourly": ("SELECT", "INSERT", "UPDATE"),
    "view_count_flushes": ("SELECT", "INSERT", "DELETE"),
    "view_count_sources": ("SELECT", "INSERT", "UPDATE"),
}
_NEEDED = [(right, table) for table, rights in RIGHTS.items() for right in rights]
_MISSING = text(
    """
    SELECT needed.privilege || ' on ' || needed.name
    FROM unnest(:rights, :tables) WITH ORDINALITY AS needed (privilege, name, position)
    WHERE NOT has_table_privilege(to_regclass(needed.name), needed.privilege)
    ORDER BY needed.position
    """
).bindparams(bindparam("rights", type_=ARRAY(Text)), bindparam("tables", type_=ARRAY(Text)))


async def missing_rights(connection: AsyncConnection) -> tuple[str, ...]:
    """The rights that this session's role lacks, such as `INSERT on view_counts`. Ignores missing tables."""
    rights, tables = zip(*_NEEDED, strict=True)
    found = await connection.execute(_MISSING, {"rights": list(rights), "tables": list(tables)})
    return tuple(found.scalars())
