"""When the wait of a job was set, so that it ends if the clock is set back."""

import sqlalchemy as sa
from alembic import op

revision = "0010_waits"
down_revision = "0009_submission_claims"
branch_labels = None
depends_on = None


def upgrade() -> None:
    column = sa.Column("not_before_set_at", sa.DateTime(timezone=True), nullable=True)
    op.add_column("jobs", column)


def downgrade() -> None:
    op.drop_column("jobs", "not_before_set_at")
