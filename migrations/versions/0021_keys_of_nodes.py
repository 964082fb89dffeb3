"""Names, nodes and last uses of API keys."""

import sqlalchemy as sa
from alembic import op

revision = "0021_keys_of_nodes"
down_revision = "0020_worker_models"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("name", sa.String(64), nullable=True))
    op.add_column("api_keys", sa.Column("node", sa.String(128), nullable=True))
    op.add_column("api_keys", sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("api_keys", "last_used_at")
    op.drop_column("api_keys", "node")
    op.drop_column("api_keys", "name")
