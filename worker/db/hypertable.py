"""Tables by time, for migrations: hypertables where TimescaleDB is installed, plain tables elsewhere."""

from __future__ import annotations

import sqlalchemy as sa

from alembic import context, op


def partition_by_time(table: str, column: str, chunk: str, *, append_only: bool, indexed: bool = False) -> None:
    """Make a hypertable with chunks of an interval such as `1 day`.

    Elsewhere add a BRIN index on the time, unless it is `indexed` already.

    Rows without a key (`append_only`) cannot be deleted under a publication for all tables, unless the whole row is
    their identity. Hypertables cannot have that setting.
    """
    if has_timescaledb():
        op.execute(
            f"SELECT create_hypertable('{table}', by_range('{column}', INTERVAL '{chunk}'), "
            "create_default_indexes => false)"
        )
        return
    if not indexed:
        op.create_index(f"{table}_{column}_brin", table, [column], postgresql_using="brin")
    if append_only:
        op.execute(f"ALTER TABLE {table} REPLICA IDENTITY FULL")


def has_timescaledb() -> bool:
    if context.is_offline_mode():
        return False
    found = op.get_bind().execute(sa.text("SELECT 1 FROM pg_extension WHERE extname = 'timescaledb'"))
    return found.scalar() is not None
