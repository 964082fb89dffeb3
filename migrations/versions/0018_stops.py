"""Jobs that stop before their last step, by request or at a limit."""

import sqlalchemy as sa
from alembic import op

revision = "0018_stops"
down_revision = "0017_retention"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("stop_requested_at", sa.DateTime(timezone=True), nullable=True))
    # With a default, as a service of the earlier version may still insert rows.
    op.add_column(
        "jobs", sa.Column("reward_calls", sa.BigInteger(), nullable=False, server_default="0")
    )


def downgrade() -> None:
    op.drop_column("jobs", "reward_calls")
    op.drop_column("jobs", "stop_requested_at")
