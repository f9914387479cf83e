"""Views, one by one.

Revision: 0009
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op
from worker.db.hypertable import partition_by_time

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "view_events",
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("vod_id", sa.Text, nullable=False),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.Column("event_id", sa.Text),
    )
    op.create_index(
        "view_events_event_idx",
        "view_events",
        ["time", "event_id"],
        unique=True,
        postgresql_where=sa.text("event_id IS NOT NULL"),
    )
    partition_by_time("view_events", "time", "1 day", append_only=True)


def downgrade() -> None:
    op.drop_table("view_events")
