"""Names of promoted checkpoints, and when a checkpoint is removed for its age."""

import sqlalchemy as sa
from alembic import op

revision = "0027_promoted_checkpoints"
down_revision = "0026_file_uploads"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("checkpoints", sa.Column("expires_at", sa.DateTime(timezone=True)))
    op.create_index("ix_checkpoints_expires_at", "checkpoints", ["expires_at"])
    op.create_table(
        "model_aliases",
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("checkpoint_id", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="fk_model_aliases_project_id_projects"
        ),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["checkpoints.id"],
            name="fk_model_aliases_checkpoint_id_checkpoints",
            ondelete="CASCADE",  # a replica of an earlier version deletes checkpoints alone
        ),
        sa.PrimaryKeyConstraint("project_id", "name", name="pk_model_aliases"),
    )
    op.create_index("ix_model_aliases_checkpoint_id", "model_aliases", ["checkpoint_id"])


def downgrade() -> None:
    op.drop_table("model_aliases")
    op.drop_index("ix_checkpoints_expires_at", "checkpoints")
    op.drop_column("checkpoints", "expires_at")
