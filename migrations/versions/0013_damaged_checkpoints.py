"""Checkpoints that were found damaged, and when each was last verified."""

import sqlalchemy as sa
from alembic import op

revision = "0013_damaged_checkpoints"
down_revision = "0012_workers"
branch_labels = None
depends_on = None
COLUMNS = (
    ("verified_at", sa.DateTime(timezone=True)),
    ("damage", sa.Text()),
    ("damaged_at", sa.DateTime(timezone=True)),
)


def upgrade() -> None:
    for name, kind in COLUMNS:
        op.add_column("checkpoints", sa.Column(name, kind, nullable=True))


def downgrade() -> None:
    for name, _ in COLUMNS:
        op.drop_column("checkpoints", name)
