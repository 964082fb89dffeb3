"""The least memory that a job's trainer needs."""

import sqlalchemy as sa
from alembic import op

revision = "0019_memory"
down_revision = "0018_stops"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Null: not known, as of jobs that were submitted before.
    op.add_column("jobs", sa.Column("memory_bytes", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("loading_bytes", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "loading_bytes")
    op.drop_column("jobs", "memory_bytes")
