"""Registered reward services."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dar.client.arguments import HasId, in_path, mapping, mappings
from dar.client.paging import Listing
from dar.client.transport import Transport
from dar.protocol.base import Deleted, Page
from dar.protocol.reward_endpoints import (
    ChangedRewardEndpoint,
    NewRewardEndpoint,
    RewardEndpoint,
    RewardEndpointStats,
)
from dar.protocol.reward_probe import ProbeReport

PATH = "/reward_endpoints"
Order = Literal["asc", "desc"]
Samples = Sequence[Mapping[str, Any]]
"""Completions to score: ``prompt`` or ``messages``, ``completion``; optional: ``ground_truth``,
``columns``."""


class RewardEndpoints:
    """Reward services with their secrets: ``client.reward_endpoints``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        /,
        name: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        signing_secret: str | None = None,
        **options: object,
    ) -> NewRewardEndpoint:
        """Register a reward service.

            endpoint = client.reward_endpoints.create(
                "judge", "https://judge.example/score", headers={"authorization": "Bearer …"})
            keep(endpoint.signing_secret)  # it is shown only once
            rewards = {"components": [{"name": "judge", "endpoint": endpoint.id}]}

        Args:
            name: A name for people.
            url: URL to which requests are posted.
            headers: Secret headers; they are sent only to the origin of ``url`` and never shown
                again.
            signing_secret: ``whsec_…``; default: the service makes one.
            **options: Defaults for fields of a component, like ``timeouts`` or ``protocol``.

        Raises:
            InvalidRequestError: A field is invalid; ``param`` names it.
        """
        body = {"name": name, "url": url, "headers": mapping("headers", headers or {}), **options}
        if signing_secret is not None:
            body["signing_secret"] = signing_secret
        return self._transport.post(PATH, NewRewardEndpoint, body=body)

    def list(self, *, order: Order = "desc", limit: int = 20) -> Listing[RewardEndpoint]:
        """All endpoints, newest first; ``limit`` is the size of a page."""
        params = {"order": order, "limit": limit}
        return Listing(self._transport, PATH, Page[RewardEndpoint], params)

    def retrieve(self, endpoint_id: str | HasId) -> RewardEndpoint:
        """One endpoint, with fingerprints instead of its secrets."""
        return self._transport.get(_path(endpoint_id), RewardEndpoint)

    def update(self, /, endpoint_id: str | HasId, **changes: object) -> ChangedRewardEndpoint:
        """Change fields of an endpoint.

        Args:
            endpoint_id: The endpoint.
            **changes: ``name``, ``url``, ``headers`` (None removes one) or any option. A ``url``
                with another origin drops the secret headers that are not given again;
                ``dropped_headers`` of the response names them.

        Raises:
            InvalidRequestError: A field is invalid; ``param`` names it.
        """
        return self._transport.patch(_path(endpoint_id), ChangedRewardEndpoint, body=changes)

    def delete(self, endpoint_id: str | HasId) -> Deleted:
        """Delete an endpoint and its secrets.

        Raises:
            ConflictError: A job still needs it.
        """
        return self._transport.delete(_path(endpoint_id), Deleted)

    def rotate_secret(
        self, endpoint_id: str | HasId, *, keep_old_secret_active_for_24_hours: bool = True
    ) -> NewRewardEndpoint:
        """Make a new signing secret; ``signing_secret`` of the response shows it, only this once.

        Args:
            endpoint_id: The endpoint.
            keep_old_secret_active_for_24_hours: Whether requests are signed with the old secret
                too, for one day.
        """
        body = {"keep_old_secret_active_for_24_hours": keep_old_secret_active_for_24_hours}
        return self._transport.post(
            f"{_path(endpoint_id)}/rotate_secret", NewRewardEndpoint, body=body
        )

    def purge_cache(self, endpoint_id: str | HasId) -> RewardEndpoint:
        """Stop using the cached rewards of an endpoint, as after a change of its model.

        It takes effect in a job when its next attempt starts. With `cache.enabled` ``auto``, a new
        probe is needed before rewards are cached again.
        """
        return self._transport.post(f"{_path(endpoint_id)}/purge_cache", RewardEndpoint)

    def probe(
        self,
        endpoint_id: str | HasId | None = None,
        *,
        component: Mapping[str, Any] | None = None,
        samples: Samples | None = None,
        light: bool = False,
    ) -> ProbeReport:
        """Test an endpoint, or the reward service of a component, as a job would use it.

        Args:
            endpoint_id: The endpoint.
            component: A component with a ``url``, instead of an endpoint.
            samples: Two to eight completions; default: built-in ones.
            light: Whether to run only the checks that are run when a job is submitted.

        Raises:
            ValueError: Both or neither of ``endpoint_id`` and ``component`` are given.
            RateLimitError: Too many probes in a minute.
        """
        if (endpoint_id is None) == (component is None):
            raise ValueError("give endpoint_id or component")
        body: dict[str, Any] = {"light": light}
        if samples is not None:
            body["samples"] = mappings("samples", samples)
        if component is not None:
            body["component"] = mapping("component", component)
        path = PATH if endpoint_id is None else _path(endpoint_id)
        return self._transport.post(f"{path}/probe", ProbeReport, body=body)

    def stats(self, endpoint_id: str | HasId) -> RewardEndpointStats:
        """The jobs that use an endpoint, and the result of its latest probe."""
        return self._transport.get(f"{_path(endpoint_id)}/stats", RewardEndpointStats)


def _path(endpoint_id: str | HasId) -> str:
    return f"{PATH}/{in_path(endpoint_id)}"
