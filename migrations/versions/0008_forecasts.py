"""The forecast of a job with a KL budget."""

import sqlalchemy as sa
from alembic import op

revision = "0008_forecasts"
down_revision = "0007_unfinished_steps"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("forecast", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "forecast")
