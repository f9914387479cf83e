"""The rights on the tables that the worker's role needs. deploy/postgres/role.sql grants exactly these."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from sqlalchemy import ARRAY, Text, bindparam, text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from worker.db.upsert import RecordShape

RIGHTS = {
    "view_counts": ("SELECT", "INSERT", "UPDATE"),
    "view_counts_hourly": ("SELECT", "INSERT", "UPDATE"),
    "view_count_flushes": ("SELECT", "INSERT", "DELETE"),
    "view_count_sources": ("SELECT", "INSERT", "UPDATE"),
    "view_count_lineages": ("SELECT", "INSERT", "UPDATE", "DELETE"),
}
# Not needed to count views: without them only the pipelines are on hold.
STREAM_RIGHTS = {
    "stream_positions": ("SELECT", "INSERT", "UPDATE"),
    "dead_letters": ("SELECT", "INSERT", "DELETE"),
}
# Of a pipeline that reads a channel, too.
TICKET_RIGHTS = {"ingest_batches": ("SELECT", "INSERT", "DELETE")}
# Of tables whose rows are kept, and of those whose rows are replaced.
RECORD_RIGHTS = ("SELECT", "INSERT", "DELETE")
REPLACED_RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")
# What the role of an application needs that writes by a Writer: docs/how-to/write-from-inside.md grants exactly these.
WRITER_RIGHTS = {
    "chunk_requests": ("INSERT",),
    "dead_letters": ("INSERT",),
    **TICKET_RIGHTS,
}
# On some columns only: table → right → columns.
WRITER_COLUMN_RIGHTS = {"chunk_requests": {"SELECT": ("time", "event_id")}}
_MISSING = text(
    """
    SELECT needed.privilege || ' on ' || needed.name
    FROM unnest(:rights, :tables) WITH ORDINALITY AS needed (privilege, name, position)
    WHERE NOT has_table_privilege(to_regclass(needed.name), needed.privilege)
    ORDER BY needed.position
    """
).bindparams(bindparam("rights", type_=ARRAY(Text)), bindparam("tables", type_=ARRAY(Text)))


_NO_TABLE = text("SELECT name FROM unnest(:tables) name WHERE to_regclass(name) IS NULL ORDER BY name").bindparams(
    bindparam("tables", type_=ARRAY(Text))
)


def rights_on_records(records: Iterable[RecordShape]) -> dict[str, Sequence[str]]:
    """Table → rights, for the tables of these records."""
    return {each.name: RECORD_RIGHTS if each.rule.action == "keep" else REPLACED_RIGHTS for each in records}


async def missing_tables(connection: AsyncConnection, tables: Sequence[str]) -> tuple[str, ...]:
    """Those of the tables that do not exist."""
    return tuple((await connection.execute(_NO_TABLE, {"tables": list(tables)})).scalars())


async def missing_rights(
    connection: AsyncConnection, rights: Mapping[str, Sequence[str]] = MappingProxyType(RIGHTS)
) -> tuple[str, ...]:
    """Rights that this session's role lacks, such as `INSERT on view_counts`. Ignores missing tables."""
    needed = [(right, table) for table, each in rights.items() for right in each]
    names, tables = zip(*needed, strict=True)
    found = await connection.execute(_MISSING, {"rights": list(names), "tables": list(tables)})
    return tuple(found.scalars())
