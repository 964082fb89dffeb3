"""Reward counts of the step in which an attempt ended."""

import sqlalchemy as sa
from alembic import op

revision = "0007_unfinished_steps"
down_revision = "0006_sealed_poll_urls"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("unfinished", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("attempts", "unfinished")
