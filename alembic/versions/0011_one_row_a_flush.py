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

ARRAYS = {"vod_ids": sa.Text, "counted": sa.BigInteger, "announced": sa.BigInteger, "changes": sa.BigInteger}
CARRY_OVER = """
UPDATE view_count_flushes f SET (vod_ids, counted, announced, changes) = (
    SELECT array_agg(vod_id ORDER BY vod_id), array_agg(counted ORDER BY vod_id),
           array_agg(announced ORDER BY vod_id), array_agg(views ORDER BY vod_id)
    FROM view_count_deltas d
    WHERE d.source = f.source AND d.flush_id = f.flush_id AND d.flushed_at = f.flushed_at
)
"""
# A flush without all of its rows cannot be settled from: it was a hold, and is one without its row, too.
DROP_INCOMPLETE = "DELETE FROM view_count_flushes WHERE vod_ids IS NULL OR cardinality(vod_ids) <> keys"
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
    for column, element in ARRAYS.items():
        op.add_column("view_count_flushes", sa.Column(column, sa.ARRAY(element)))
    op.execute(CARRY_OVER)
    op.execute(DROP_INCOMPLETE)
    for column in ARRAYS:
        op.alter_column("view_count_flushes", column, nullable=False)
    op.create_check_constraint(
        "view_count_flushes_complete",
        "view_count_flushes",
        "cardinality(vod_ids) = keys AND cardinality(counted) = keys AND cardinality(announced) = keys "
        "AND cardinality(changes) = keys",
    )
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
    for column in ARRAYS:
        op.drop_column("view_count_flushes", column)
    op.drop_column("view_count_sources", "rolled_up_id")
