"""How fast a job's steps are, what it was copied from, and what it was made of."""

import sqlalchemy as sa
from alembic import op

revision = "0024_job_paces"
down_revision = "0023_storage_ids"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Null: not known, as of jobs that were submitted before.
    op.add_column("jobs", sa.Column("pace", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("jobs", sa.Column("origin", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("jobs", sa.Column("ingredients", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "ingredients")
    op.drop_column("jobs", "origin")
    op.drop_column("jobs", "pace")
