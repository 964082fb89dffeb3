"""API keys as the service shows them, and requests for new ones."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from dar.protocol.base import Input, Output, UnixSeconds
from dar.protocol.worker import Name

Scope = Literal["read", "submit", "admin", "worker"]
LONGEST_EXPIRY = 3650 * 86_400
"""Ten years, in seconds."""
KeyName = Annotated[str, Field(min_length=1, max_length=64)]


class CreateApiKey(Input):
    """Request for a new key."""

    scopes: Annotated[list[Scope], Field(min_length=1, max_length=4)]
    """``read``, ``submit`` and ``admin`` for users; or ``worker`` alone."""
    name: KeyName | None = None
    """For people."""
    node: Name | None = None
    """The only node whose workers may use it, with scope ``worker``; null: any node."""
    expires_in_seconds: Annotated[int, Field(ge=1, le=LONGEST_EXPIRY)] | None = None
    """Seconds until it expires; null: never."""

    @model_validator(mode="after")
    def _check_worker(self) -> Self:
        if "worker" in self.scopes and set(self.scopes) != {"worker"}:
            raise PydanticCustomError(
                "worker_scope", "a worker's key has the scope worker alone; make two keys"
            )
        if self.node is not None and "worker" not in self.scopes:
            raise PydanticCustomError(
                "worker_scope", "only a key of scope worker is bound to a node; leave node out"
            )
        return self


class ApiKey(Output):
    """A key, without the key itself."""

    id: str
    object: Literal["api_key"]
    name: str | None
    scopes: list[str]
    node: str | None
    """The only node whose workers may use it; null: any, or it is a user's key."""
    state: Literal["valid", "expired", "revoked"]
    is_configured: bool
    """Whether it comes from the settings or a key file of the service."""
    created_at: UnixSeconds
    expires_at: UnixSeconds | None
    revoked_at: UnixSeconds | None
    last_used_at: UnixSeconds | None
    """To about a minute; null: not since the service notes it."""


class NewApiKey(ApiKey):
    """A key that was made just now."""

    key: str = Field(repr=False)
    """Shown only this once; the service stores its digest."""
