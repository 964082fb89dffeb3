"""Prompt, group and place of a sample, to find and order samples by them."""

import sqlalchemy as sa
from alembic import op

revision = "0025_samples_by_prompt"
down_revision = "0024_job_paces"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Without values for the rows that exist: there may be millions.
    op.add_column("samples", sa.Column("prompt_id", sa.String(24), nullable=True))
    op.add_column("samples", sa.Column("group_number", sa.Integer(), nullable=True))
    op.add_column("samples", sa.Column("group_index", sa.Integer(), nullable=True))
    op.create_index("ix_samples_job_id_prompt_id", "samples", ["job_id", "prompt_id"])


def downgrade() -> None:
    op.drop_index("ix_samples_job_id_prompt_id", "samples")
    op.drop_column("samples", "group_index")
    op.drop_column("samples", "group_number")
    op.drop_column("samples", "prompt_id")
