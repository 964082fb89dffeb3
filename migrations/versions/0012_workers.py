"""Workers: what they report about themselves, and what an operator has ordered."""

import sqlalchemy as sa
from alembic import op

revision = "0012_workers"
down_revision = "0011_owners"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("node", sa.String(length=128), nullable=False),
        sa.Column("slot", sa.String(length=128), nullable=False),
        sa.Column("incarnation", sa.String(length=128), nullable=False),
        sa.Column("earlier", sa.JSON(), nullable=False),
        sa.Column("boot_id", sa.String(length=128), nullable=False),
        sa.Column("machine", sa.String(length=128), nullable=True),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.Column("is_fit", sa.Boolean(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("alive_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("duty", sa.String(length=8), nullable=False),
        sa.Column("duty_reason", sa.Text(), nullable=True),
        sa.Column("faults", sa.Integer(), nullable=False),
        sa.Column("fault", sa.JSON(), nullable=True),
        sa.Column("retry_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("duty IN ('ban', 'drain', 'work')", name=op.f("ck_workers_duty")),
        sa.PrimaryKeyConstraint("node", "slot", name="pk_workers"),
    )


def downgrade() -> None:
    op.drop_table("workers")
