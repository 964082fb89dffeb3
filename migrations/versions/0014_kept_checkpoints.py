"""Which checkpoints are kept: the best, every N-th and pinned ones; and a job's result.

Jobs that succeeded before have the result that they had, their newest checkpoint.
"""

import sqlalchemy as sa
from alembic import op

revision = "0014_kept_checkpoints"
down_revision = "0013_damaged_checkpoints"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "checkpoints", sa.Column("ordinal", sa.Integer(), nullable=False, server_default="0")
    )
    op.add_column(
        "checkpoints",
        sa.Column("is_pinned", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    for name in ("reward", "kl"):
        op.add_column("checkpoints", sa.Column(name, sa.Float(53), nullable=True))
    op.add_column("jobs", sa.Column("keep_every", sa.Integer(), nullable=True))
    for name in ("best_checkpoint_id", "result_checkpoint_id"):
        op.add_column("jobs", sa.Column(name, sa.String(64), nullable=True))


def downgrade() -> None:
    for name in ("result_checkpoint_id", "best_checkpoint_id", "keep_every"):
        op.drop_column("jobs", name)
    for name in ("kl", "reward", "is_pinned", "ordinal"):
        op.drop_column("checkpoints", name)
