"""Tickets of batches that come from a process's memory.

Revision: 0005
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ingest_batches",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("pipeline", sa.Text, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    )
    op.create_index("ingest_batches_at_idx", "ingest_batches", ["at"])


def downgrade() -> None:
    op.drop_table("ingest_batches")
