"""The attempt and the step of a trainer's event."""

import sqlalchemy as sa
from alembic import op

revision = "0015_rows_of_an_attempt"
down_revision = "0014_kept_checkpoints"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job_events", sa.Column("attempt", sa.Integer(), nullable=True))
    op.add_column("job_events", sa.Column("step", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("job_events", "step")
    op.drop_column("job_events", "attempt")
