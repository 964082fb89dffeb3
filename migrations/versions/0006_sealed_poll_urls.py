"""Poll URLs are stored encrypted.

A URL that was stored in the clear is deleted, and its request counts as not accepted: if its job is
resumed, the request is sent again under the same id.
"""

from alembic import op

revision = "0006_sealed_poll_urls"
down_revision = "0005_place_in_the_queue"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        "UPDATE reward_requests SET is_accepted = false, poll_url = NULL WHERE poll_url IS NOT NULL"
    )


def downgrade() -> None:
    """An encrypted URL means nothing to the earlier code, so it is deleted as well."""
    upgrade()
