"""Metrics of services.

Revision: 0008
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op
from worker.db.hypertable import partition_by_time

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "metrics",
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("service_name", sa.Text, nullable=False),
        sa.Column("metric_name", sa.Text, nullable=False),
        sa.Column("value", sa.Double),
        sa.Column("event_id", sa.Text),
    )
    op.create_index("metrics_time_idx", "metrics", [sa.text("time DESC")])
    op.create_index(
        "metrics_event_idx",
        "metrics",
        ["time", "event_id"],
        unique=True,
        postgresql_where=sa.text("event_id IS NOT NULL"),
    )
    partition_by_time("metrics", "time", "1 day", append_only=True, indexed=True)


def downgrade() -> None:
    op.drop_table("metrics")
