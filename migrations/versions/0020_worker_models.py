"""Models that workers have, so that a job goes to a worker that need not download its model."""

import sqlalchemy as sa
from alembic import op

revision = "0020_worker_models"
down_revision = "0019_memory"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "worker_models",
        sa.Column("node", sa.String(length=128), nullable=False),
        sa.Column("slot", sa.String(length=128), nullable=False),
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.PrimaryKeyConstraint("node", "slot", "name", name="pk_worker_models"),
    )
    op.create_index("ix_worker_models_name", "worker_models", ["name"])


def downgrade() -> None:
    op.drop_table("worker_models")
