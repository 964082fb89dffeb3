"""API keys of users and workers."""

from collections.abc import Sequence
from typing import Any

from dar.client.arguments import HasId, in_path
from dar.client.paging import Listing
from dar.client.transport import Transport
from dar.protocol.api_keys import ApiKey, NewApiKey, Scope
from dar.protocol.base import Page

PATH = "/api_keys"


class ApiKeys:
    """Keys of the project and of workers: ``client.api_keys``. All of it needs scope ``admin``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        scopes: Sequence[Scope],
        *,
        name: str | None = None,
        node: str | None = None,
        expires_in_seconds: int | None = None,
    ) -> NewApiKey:
        """Make a key; ``key`` of the response shows it, only this once.

            new = client.api_keys.create(["worker"], node="gpu-7", expires_in_seconds=90 * 86_400)

        Args:
            scopes: ``read``, ``submit`` and ``admin`` for users; or ``worker`` alone.
            name: A name for people.
            node: The only node whose workers may use it, with scope ``worker``; None: any.
            expires_in_seconds: None: it does not expire.

        Raises:
            InvalidRequestError: A field is invalid; ``param`` names it.
            PermissionDeniedError: The client's key lacks the scope ``admin``.
        """
        given = {"name": name, "node": node, "expires_in_seconds": expires_in_seconds}
        body: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return self._transport.post(PATH, NewApiKey, body={"scopes": list(scopes), **body})

    def list(self, *, limit: int = 100) -> Listing[ApiKey]:
        """All keys, newest first, also those that open nothing; ``limit`` is the size of a page."""
        return Listing(self._transport, PATH, Page[ApiKey], {"limit": limit})

    def retrieve(self, key_id: str | HasId) -> ApiKey:
        """One key, without the key itself."""
        return self._transport.get(f"{PATH}/{in_path(key_id)}", ApiKey)

    def revoke(self, key_id: str | HasId) -> ApiKey:
        """Make a key invalid at once.

        Attempts that were claimed with it keep their own tokens; ban their node to end them.

        Raises:
            ConflictError: It comes from the settings of the service; change it there.
        """
        return self._transport.post(f"{PATH}/{in_path(key_id)}/revoke", ApiKey)
