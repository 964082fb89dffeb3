"""Reward requests with later results.

Requests whose results come by callback, and the signed callbacks that were received.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004_reward_requests"
down_revision = "0003_reward_failures"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "reward_requests",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("component", sa.String(length=128), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("sample_ids", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=8), nullable=False),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=False),
        sa.Column("token_hashes", sa.Text(), nullable=False),
        sa.Column("is_signature_required", sa.Boolean(), nullable=False),
        sa.Column("is_accepted", sa.Boolean(), nullable=False),
        sa.Column("poll_url", sa.Text(), nullable=True),
        sa.Column("result_id", sa.Integer(), nullable=True),
        sa.Column("body_hash", sa.String(length=64), nullable=True),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("invalid_count", sa.Integer(), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("told", sa.String(length=64), nullable=False),
        sa.CheckConstraint(
            "state IN ('waiting', 'done', 'closed', 'burned')",
            name=op.f("ck_reward_requests_state"),
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_reward_requests_job_id_jobs"),
        sa.PrimaryKeyConstraint("id", name="pk_reward_requests"),
        sa.UniqueConstraint("job_id", "result_id", name="uq_reward_requests_job_id_result_id"),
    )
    op.create_index("ix_reward_requests_deadline", "reward_requests", ["deadline"], unique=False)
    op.create_table(
        "reward_deliveries",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("body_hash", sa.String(length=64), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_reward_deliveries"),
    )
    op.create_index("ix_reward_deliveries_seen_at", "reward_deliveries", ["seen_at"], unique=False)


def downgrade() -> None:
    op.drop_table("reward_deliveries")
    op.drop_table("reward_requests")
