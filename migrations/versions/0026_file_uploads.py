"""Training files that arrive in parts."""

import sqlalchemy as sa
from alembic import op

revision = "0026_file_uploads"
down_revision = "0025_samples_by_prompt"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "file_uploads",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("filename", sa.String(256), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("mime_type", sa.String(256), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.String(12), nullable=False),
        sa.Column("file_id", sa.String(64)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.CheckConstraint(
            "status IN ('pending', 'completed', 'cancelled', 'expired')", name="status"
        ),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="fk_file_uploads_project_id_projects"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_file_uploads"),
    )
    op.create_index("ix_file_uploads_status_expires_at", "file_uploads", ["status", "expires_at"])
    op.create_table(
        "file_upload_parts",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("upload_id", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"], ["file_uploads.id"], name="fk_file_upload_parts_upload_id_file_uploads"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_file_upload_parts"),
    )
    op.create_index(
        "ix_file_upload_parts_upload_id_created_at",
        "file_upload_parts",
        ["upload_id", "created_at"],
    )


def downgrade() -> None:
    op.drop_table("file_upload_parts")
    op.drop_table("file_uploads")
