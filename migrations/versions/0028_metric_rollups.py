"""Extremes of metrics in buckets of steps, written as the steps arrive."""

import sqlalchemy as sa
from alembic import op

revision = "0028_metric_rollups"
down_revision = "0027_promoted_checkpoints"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "metric_rollups",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("level", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("bucket", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("extremes_json", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["jobs.id"],
            name=op.f("fk_metric_rollups_job_id_jobs"),
            ondelete="CASCADE",  # a replica of an earlier version deletes jobs, and not these rows
        ),
        sa.PrimaryKeyConstraint(
            "job_id", "attempt", "level", "bucket", name=op.f("pk_metric_rollups")
        ),
    )


def downgrade() -> None:
    op.drop_table("metric_rollups")
