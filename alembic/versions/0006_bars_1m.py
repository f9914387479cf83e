"""Bars of one minute.

Revision: 0006
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op
from worker.db.hypertable import partition_by_time

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "bars_1m",
        sa.Column("symbol", sa.Text, nullable=False),
        sa.Column("timestamp", sa.DateTime(timezone=True), nullable=False),
        sa.Column("open", sa.Double, nullable=False),
        sa.Column("high", sa.Double, nullable=False),
        sa.Column("low", sa.Double, nullable=False),
        sa.Column("close", sa.Double, nullable=False),
        sa.Column("volume", sa.BigInteger, nullable=False),
        sa.Column("vwap", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("symbol", "timestamp"),
    )
    # The key is the index on both.
    op.create_index("bars_1m_symbol_idx", "bars_1m", ["symbol"])
    op.create_index("bars_1m_timestamp_idx", "bars_1m", ["timestamp"])
    partition_by_time("bars_1m", "timestamp", "7 days", append_only=False, indexed=True)


def downgrade() -> None:
    op.drop_table("bars_1m")
