"""The secret that signs a project's requests to reward services that jobs name by URL."""

from typing import Literal

from pydantic import Field

from dar.protocol.base import Output, UnixSeconds


class ProjectRewardSecret(Output):
    """A project's reward secret, without the secret itself."""

    object: Literal["reward_secret"]
    generation: int
    """How often it was rotated."""
    is_configured: bool
    """Whether it is that of the service's settings (``DAR_REWARD_SECRET`` or the file
    ``reward_secret``), as it is for the first project until its first rotation."""
    fingerprints: list[str]
    """One for each secret that signs requests, the newest first."""
    old_until: UnixSeconds | None
    """Until when requests are signed with the secret before it too; null: they are not."""


class NewProjectRewardSecret(ProjectRewardSecret):
    """A reward secret that was made just now."""

    signing_secret: str = Field(repr=False)
    """``whsec_…``, shown only this once."""
