"""Jobs that are being deleted, and the size of each job's samples."""

import sqlalchemy as sa
from alembic import op

revision = "0017_retention"
down_revision = "0016_trainer_logs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
    column = sa.Column("samples_bytes", sa.BigInteger(), nullable=False, server_default="0")
    op.add_column("jobs", column)
    op.create_index("ix_jobs_deleted_at", "jobs", ["deleted_at"])
    op.create_index("ix_jobs_finished_at", "jobs", ["finished_at"])
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    size = "length(CAST(body AS BLOB))" if is_sqlite else "octet_length(body::text)"
    op.execute(
        f"UPDATE jobs SET samples_bytes = coalesce((SELECT sum({size}) FROM samples "  # noqa: S608 - one of two texts
        "WHERE samples.job_id = jobs.id), 0)"
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_finished_at", table_name="jobs")
    op.drop_index("ix_jobs_deleted_at", table_name="jobs")
    op.drop_column("jobs", "samples_bytes")
    op.drop_column("jobs", "deleted_at")
