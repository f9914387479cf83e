"""The ledger has one row for each flush, with arrays; the hourly history is kept behind the flushes.

Revision: 0011
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op
from worker.db.hypertable import partition_by_time

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# A flush without all of its rows was useless to settle from: it is left out, which is a hold as it was before.
CARRY_OVER = """
INSERT INTO view_count_flushes
    (source, flush_id, flushed_at, nonce, prev_nonce, keys, views, worker_id, vod_ids, counted, announced, changes)
SELECT f.source, f.flush_id, f.flushed_at, f.nonce, f.prev_nonce, f.keys, f.views, f.worker_id,
       d.vod_ids, d.counted, d.announced, d.changes
FROM flushes_before f CROSS JOIN LATERAL (
    SELECT count(*) AS keys,
           array_agg(vod_id ORDER BY vod_id) AS vod_ids, array_agg(counted ORDER BY vod_id) AS counted,
           array_agg(announced ORDER BY vod_id) AS announced, array_agg(views ORDER BY vod_id) AS changes
    FROM view_count_deltas d
    WHERE d.source = f.source AND d.flush_id = f.flush_id AND d.flushed_at = f.flushed_at
) d
WHERE d.keys = f.keys AND d.keys > 0
"""
DELTAS = """
CREATE VIEW view_count_deltas AS
SELECT f.flushed_at, f.source, f.flush_id, d.vod_id, d.counted, d.announced, d.views
FROM view_count_flushes f,
     unnest(f.vod_ids, f.counted, f.announced, f.changes) AS d (vod_id, counted, announced, views)
"""
CARRY_BACK = """
INSERT INTO view_count_deltas (flushed_at, source, flush_id, vod_id, counted, announced, views)
SELECT f.flushed_at, f.source, f.flush_id, d.vod_id, d.counted, d.announced, d.views
FROM view_count_flushes f,
     unnest(f.vod_ids, f.counted, f.announced, f.changes) AS d (vod_id, counted, announced, views)
"""
ROLL_UP = """
INSERT INTO view_counts_hourly (bucket, vod_id, views)
SELECT date_trunc('hour', f.flushed_at, 'UTC'), d.vod_id, sum(d.views)
FROM view_count_sources s
JOIN view_count_flushes f ON f.source = s.source AND f.flush_id > s.rolled_up_id,
     unnest(f.vod_ids, f.changes) AS d (vod_id, views)
GROUP BY 1, 2 HAVING sum(d.views) > 0
ON CONFLICT (vod_id, bucket) DO UPDATE SET views = view_counts_hourly.views + excluded.views
"""


def upgrade() -> None:
    op.add_column("view_count_sources", sa.Column("rolled_up_id", sa.BigInteger, nullable=False, server_default="0"))
    op.execute("UPDATE view_count_sources SET rolled_up_id = last_flush_id")
    op.rename_table("view_count_flushes", "flushes_before")
    op.execute("ALTER INDEX view_count_flushes_pkey RENAME TO flushes_before_pkey")
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
        sa.Column("vod_ids", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("counted", sa.ARRAY(sa.BigInteger), nullable=False),
        sa.Column("announced", sa.ARRAY(sa.BigInteger), nullable=False),
        sa.Column("changes", sa.ARRAY(sa.BigInteger), nullable=False),
        sa.PrimaryKeyConstraint("source", "flush_id"),
        sa.CheckConstraint(
            "cardinality(vod_ids) = keys AND cardinality(counted) = keys AND cardinality(announced) = keys "
            "AND cardinality(changes) = keys",
            name="view_count_flushes_complete",
        ),
    )
    op.execute(CARRY_OVER)
    op.drop_table("flushes_before")
    op.drop_table("view_count_deltas")
    op.execute(DELTAS)


def downgrade() -> None:
    op.execute("DROP VIEW view_count_deltas")
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
    partition_by_time("view_count_deltas", "flushed_at", "1 day", append_only=False)
    op.execute(CARRY_BACK)
    op.execute(ROLL_UP)
    op.drop_constraint("view_count_flushes_complete", "view_count_flushes")
    for column in ("vod_ids", "counted", "announced", "changes"):
        op.drop_column("view_count_flushes", column)
    op.drop_column("view_count_sources", "rolled_up_id")
