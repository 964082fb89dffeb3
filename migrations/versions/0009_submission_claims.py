"""Submissions without an idempotency key, so that a try and its retries make one job."""

import sqlalchemy as sa
from alembic import op

revision = "0009_submission_claims"
down_revision = "0008_forecasts"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "submission_claims",
        sa.Column("api_key_id", sa.String(64), primary_key=True),
        sa.Column("body_sha256", sa.String(64), primary_key=True),
        sa.Column("calls", sa.JSON(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_submission_claims_seen_at", "submission_claims", ["seen_at"])


def downgrade() -> None:
    op.drop_table("submission_claims")
