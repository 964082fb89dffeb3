"""The ends of trainers' logs."""

import sqlalchemy as sa
from alembic import op

revision = "0016_trainer_logs"
down_revision = "0015_rows_of_an_attempt"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "trainer_logs",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_trainer_logs_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "attempt", name=op.f("pk_trainer_logs")),
    )


def downgrade() -> None:
    op.drop_table("trainer_logs")
