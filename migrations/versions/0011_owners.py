"""Whose fault each failure of an attempt was, and from which attempt on failures count."""

import sqlalchemy as sa
from alembic import op

revision = "0011_owners"
down_revision = "0010_waits"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # With a default, as a service of the earlier version may still insert rows.
    op.add_column(
        "jobs", sa.Column("counts_from", sa.Integer(), nullable=False, server_default="1")
    )
    op.add_column("jobs", sa.Column("failures", sa.JSON(), nullable=True))
    op.add_column("attempts", sa.Column("owner", sa.String(length=12), nullable=True))
    op.add_column("attempts", sa.Column("failure", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("attempts", "failure")
    op.drop_column("attempts", "owner")
    op.drop_column("jobs", "failures")
    op.drop_column("jobs", "counts_from")
