"""View counters: totals, ledger, hourly history, flush headers, sources.

Revision: 0001
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "view_counts",
        sa.Column("vod_id", sa.Text, primary_key=True),
        sa.Column("views", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("counted", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("announced", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    )
    op.create_table(
        "view_count_deltas",
        sa.Column("flushed_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("flush_id", sa.BigInteger, nullable=False),
        sa.Column("vod_id", sa.Text, nullable=False),
        sa.Column("counted", sa.BigInteger, nullable=False),
        sa.Column("announced", sa.BigInteger, nullable=False),
        sa.Column("views", sa.BigInteger, nullable=False),
    )
    op.create_index("view_count_deltas_flush_idx", "view_count_deltas", ["source", "flush_id"])
    op.create_table(
        "view_counts_hourly",
        sa.Column("bucket", sa.DateTime(timezone=True), nullable=False),
        sa.Column("vod_id", sa.Text, nullable=False),
        sa.Column("views", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("vod_id", "bucket"),
    )
    op.create_table(
        "view_count_flushes",
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("flush_id", sa.BigInteger, nullable=False),
        sa.Column("flushed_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("nonce", sa.Uuid, nullable=False),
        sa.Column("prev_nonce", sa.Uuid, nullable=False),
        sa.Column("keys", sa.Integer, nullable=False),
        sa.Column("views", sa.Numeric, nullable=False),
        sa.Column("worker_id", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("source", "flush_id"),
    )
    op.create_table(
        "view_count_sources",
        sa.Column("source", sa.Text, primary_key=True),
        sa.Column("lineage", sa.Uuid),
        sa.Column("last_flush_id", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("last_nonce", sa.Uuid),
        sa.Column("settled_id", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("replid", sa.Text),
        sa.Column("announced_nonce", sa.Uuid),
        sa.Column("refused", sa.Text),
        sa.Column("lease_holder", sa.Text),
        sa.Column("lease_epoch", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("lease_until", sa.DateTime(timezone=True)),
    )
    by_time("view_count_deltas", "flushed_at", "1 day")
    by_time("view_counts_hourly", "bucket", "7 days")


def by_time(table: str, column: str, chunk: str) -> None:
    """Make a hypertable if TimescaleDB is installed in this database, else a BRIN index: rows arrive in time order."""
    if has_timescaledb():
        op.execute(
            f"SELECT create_hypertable('{table}', by_range('{column}', INTERVAL '{chunk}'), "
            "create_default_indexes => false)"
        )
    else:
        op.create_index(f"{table}_{column}_brin", table, [column], postgresql_using="brin")


def has_timescaledb() -> bool:
    if context.is_offline_mode():
        return False
    found = op.get_bind().execute(sa.text("SELECT 1 FROM pg_extension WHERE extname = 'timescaledb'"))
    return found.scalar() is not None


def downgrade() -> None:
    for table in (
        "view_count_sources",
        "view_count_flushes",
        "view_counts_hourly",
        "view_count_deltas",
        "view_counts",
    ):
        op.drop_table(table)
