"""A root from which the reward secrets of projects are derived, and their generations."""

import sqlalchemy as sa
from alembic import op

revision = "0022_reward_secrets_of_projects"
down_revision = "0021_keys_of_nodes"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "installation_secrets",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_installation_secrets"),
    )
    # With a default, as a service of the earlier version may still insert rows.
    op.add_column(
        "projects",
        sa.Column("reward_generation", sa.Integer(), nullable=False, server_default="0"),
    )
    op.add_column(
        "projects",
        sa.Column("old_reward_secret_until", sa.DateTime(timezone=True), nullable=True),
    )


def downgrade() -> None:
    op.drop_column("projects", "old_reward_secret_until")
    op.drop_column("projects", "reward_generation")
    op.drop_table("installation_secrets")
