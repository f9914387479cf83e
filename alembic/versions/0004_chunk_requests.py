"""Chunk requests.

Revision: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import INET

from alembic import op
from worker.db.hypertable import partition_by_time

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "chunk_requests",
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("ip", INET),
        sa.Column("referer", sa.Text),
        sa.Column("user_agent", sa.Text),
        sa.Column("sid", sa.Text),
        sa.Column("uid", sa.Text),
        sa.Column("event_id", sa.Text),
    )
    op.create_index(
        "chunk_requests_event_idx",
        "chunk_requests",
        ["time", "event_id"],
        unique=True,
        postgresql_where=sa.text("event_id IS NOT NULL"),
    )
    partition_by_time("chunk_requests", "time", "1 day", append_only=True)


def downgrade() -> None:
    op.drop_table("chunk_requests")
