"""Reward endpoints.

Registered reward services, their encrypted secrets, and which jobs name them.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002_reward_endpoints"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "reward_endpoints",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("url", sa.String(length=2048), nullable=False),
        sa.Column("protocol", sa.String(length=32), nullable=False),
        sa.Column("options", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("last_probe", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('ok', 'misconfigured')", name=op.f("ck_reward_endpoints_state")
        ),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="fk_reward_endpoints_project_id_projects"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_reward_endpoints"),
    )
    op.create_index(
        "ix_reward_endpoints_project_id_created_at_id",
        "reward_endpoints",
        ["project_id", "created_at", "id"],
        unique=False,
    )
    op.create_table(
        "reward_secrets",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("endpoint_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=True),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('signing', 'header')", name=op.f("ck_reward_secrets_kind")),
        sa.ForeignKeyConstraint(
            ["endpoint_id"],
            ["reward_endpoints.id"],
            name="fk_reward_secrets_endpoint_id_reward_endpoints",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_reward_secrets"),
    )
    op.create_index(
        "ix_reward_secrets_endpoint_id", "reward_secrets", ["endpoint_id"], unique=False
    )
    op.create_table(
        "job_endpoints",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("component", sa.String(length=32), nullable=False),
        sa.Column("endpoint_id", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_endpoints_job_id_jobs"),
        sa.ForeignKeyConstraint(
            ["endpoint_id"],
            ["reward_endpoints.id"],
            name="fk_job_endpoints_endpoint_id_reward_endpoints",
        ),
        sa.PrimaryKeyConstraint("job_id", "component", name="pk_job_endpoints"),
    )
    op.create_index("ix_job_endpoints_endpoint_id", "job_endpoints", ["endpoint_id"], unique=False)
    op.create_table(
        "secret_keys",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_secret_keys"),
    )


def downgrade() -> None:
    op.drop_table("secret_keys")
    op.drop_index("ix_job_endpoints_endpoint_id", table_name="job_endpoints")
    op.drop_table("job_endpoints")
    op.drop_index("ix_reward_secrets_endpoint_id", table_name="reward_secrets")
    op.drop_table("reward_secrets")
    op.drop_index("ix_reward_endpoints_project_id_created_at_id", table_name="reward_endpoints")
    op.drop_table("reward_endpoints")
