"""Past lineages of a source, and when Redis and Postgres last agreed.

Revision: 0010
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("view_count_sources", sa.Column("agreed_at", sa.DateTime(timezone=True)))
    op.create_table(
        "view_count_lineages",
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("lineage", sa.Uuid, nullable=False),
        sa.Column("last_flush_id", sa.BigInteger, nullable=False),
        sa.Column("last_nonce", sa.Uuid, nullable=False),
        sa.Column("replid", sa.Text),
        sa.Column("successor", sa.Text),
        sa.PrimaryKeyConstraint("source", "lineage"),
    )


def downgrade() -> None:
    op.drop_table("view_count_lineages")
    op.drop_column("view_count_sources", "agreed_at")
