"""Totals that were imported from the application's own table.

Revision: 0002
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("view_counts", sa.Column("imported", sa.BigInteger))


def downgrade() -> None:
    op.drop_column("view_counts", "imported")
