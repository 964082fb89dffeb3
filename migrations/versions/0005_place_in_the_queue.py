"""Since when a job has waited for a worker; the queue was ordered by submission."""

import sqlalchemy as sa
from alembic import op

revision = "0005_place_in_the_queue"
down_revision = "0004_reward_requests"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # SQLite adds a column without NULL only with a default, and cannot drop the default later.
    column = sa.Column(
        "queued_at",
        sa.DateTime(timezone=True),
        nullable=False,
        server_default="1970-01-01 00:00:00.000000",
    )
    op.add_column("jobs", column)
    op.execute("UPDATE jobs SET queued_at = created_at")
    op.drop_index("ix_jobs_status_created_at_id", table_name="jobs")
    op.create_index("ix_jobs_status_queued_at_id", "jobs", ["status", "queued_at", "id"])


def downgrade() -> None:
    op.drop_index("ix_jobs_status_queued_at_id", table_name="jobs")
    op.create_index("ix_jobs_status_created_at_id", "jobs", ["status", "created_at", "id"])
    op.drop_column("jobs", "queued_at")
