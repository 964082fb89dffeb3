"""The id by which an installation knows its artifact store again."""

import sqlalchemy as sa
from alembic import op

revision = "0023_storage_ids"
down_revision = "0022_reward_secrets_of_projects"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "storage_ids",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("value", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("number = 1", name="number"),
        sa.PrimaryKeyConstraint("number", name="pk_storage_ids"),
    )


def downgrade() -> None:
    op.drop_table("storage_ids")
