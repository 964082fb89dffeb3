"""Requests to reward services that failed after all attempts."""

import sqlalchemy as sa
from alembic import op

revision = "0003_reward_failures"
down_revision = "0002_reward_endpoints"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "reward_failures",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("component", sa.String(length=32), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("code", sa.String(length=64), nullable=False),
        sa.Column("family", sa.String(length=16), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Float(precision=53), nullable=False),
        sa.Column("quote", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_reward_failures_job_id_jobs"),
        sa.PrimaryKeyConstraint("id", name="pk_reward_failures"),
    )
    op.create_index(
        "ix_reward_failures_job_id_created_at_id",
        "reward_failures",
        ["job_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        "ix_reward_failures_job_id_step", "reward_failures", ["job_id", "step"], unique=False
    )


def downgrade() -> None:
    op.drop_table("reward_failures")
