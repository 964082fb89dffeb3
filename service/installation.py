"""What every part of a process needs of its installation: settings, database and keys."""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from dar.settings import Settings
from service.secret_box import SecretBox
from service.store import keys
from service.store.database import Database


@dataclass(frozen=True, slots=True)
class Installation:
    """Settings, database and keys."""

    settings: Settings
    database: Database
    reward_secrets: tuple[str, ...] = field(repr=False)
    """Reward secrets of the settings, the newest first. They sign the first project's requests to
    inline reward URLs until its secret is rotated (`service.store.project_secrets`)."""
    secrets: SecretBox
    """Encrypts and decrypts the secrets of reward endpoints."""
    key_uses: keys.KeyUses = field(default_factory=keys.KeyUses, kw_only=True)
    """Last uses of keys that are not stored yet."""


async def current(request: Request) -> Installation:
    """The installation that serves the request."""
    installation: Installation = request.app.state.runtime
    return installation


CurrentInstallation = Annotated[Installation, Depends(current)]
