"""Registered reward services."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dar.client.paging import Listing
from dar.client.transport import Transport, escaped
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
"""Completions to be scored: ``prompt`` or ``messages``, ``completion``, and perhaps
``ground_truth`` and ``columns``."""


class RewardEndpoints:
    """Reward services with their secrets: ``client.reward_endpoints``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
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
            keep(endpoint.signing_secret)  # it is shown this once
            rewards = {"components": [{"name": "judge", "endpoint": endpoint.id}]}

        Args:
            name: For people.
            url: Where requests are posted.
            headers: Secret headers; they are sent to this URL's origin alone, and never shown
                again.
            signing_secret: ``whsec_…``; default: the service makes one.
            **options: Fields of a component that stand behind a job's own, like ``timeouts`` or
                ``protocol``.

        Raises:
            InvalidRequestError: ``param`` says what is wrong.
        """
        body = {"name": name, "url": url, "headers": dict(headers or {}), **options}
        if signing_secret is not None:
            body["signing_secret"] = signing_secret
        return self._transport.post(PATH, NewRewardEndpoint, body=body)

    def list(self, *, order: Order = "desc", limit: int = 20) -> Listing[RewardEndpoint]:
        """All endpoints, newest first; ``limit`` is the size of a page."""
        params = {"order": order, "limit": limit}
        return Listing(self._transport, PATH, Page[RewardEndpoint], params)

    def retrieve(self, endpoint_id: str) -> RewardEndpoint:
        """One endpoint; of its secrets only fingerprints."""
        return self._transport.get(_path(endpoint_id), RewardEndpoint)

    def update(self, endpoint_id: str, **changes: object) -> ChangedRewardEndpoint:
        """Change an endpoint: what is given replaces what was there.

        Args:
            endpoint_id: The endpoint.
            **changes: ``name``, ``url``, ``headers`` (None removes one) or any option. Another
                origin of ``url`` drops the secret headers that are not given again;
                ``dropped_headers`` of the answer names them.

        Raises:
            InvalidRequestError: ``param`` says what is wrong.
        """
        return self._transport.patch(_path(endpoint_id), ChangedRewardEndpoint, body=changes)

    def delete(self, endpoint_id: str) -> Deleted:
        """Delete an endpoint and its secrets.

        Raises:
            ConflictError: A job still needs it.
        """
        return self._transport.delete(_path(endpoint_id), Deleted)

    def rotate_secret(
        self, endpoint_id: str, *, keep_old_secret_active_for_24_hours: bool = True
    ) -> NewRewardEndpoint:
        """Make a new signing secret; ``signing_secret`` of the answer shows it, this once.

        Args:
            endpoint_id: The endpoint.
            keep_old_secret_active_for_24_hours: Whether the old one signs beside it for a day.
        """
        body = {"keep_old_secret_active_for_24_hours": keep_old_secret_active_for_24_hours}
        return self._transport.post(
            f"{_path(endpoint_id)}/rotate_secret", NewRewardEndpoint, body=body
        )

    def purge_cache(self, endpoint_id: str) -> RewardEndpoint:
        """Have rewards that were remembered of an endpoint never be used again, as after a change of the service's model.

        Jobs see it when they are next given to a worker. `cache.enabled` ``auto`` wants a new probe
        before rewards are remembered again.
        """
        return self._transport.post(f"{_path(endpoint_id)}/purge_cache", RewardEndpoint)

    def probe(
        self,
        endpoint_id: str | None = None,
        *,
        component: Mapping[str, Any] | None = None,
        samples: Samples | None = None,
        light: bool = False,
    ) -> ProbeReport:
        """Try an endpoint, or the reward service of a component, as a job would use it.

        Args:
            endpoint_id: The endpoint.
            component: Instead: a component with a ``url``.
            samples: Two to eight completions; default: built-in ones.
            light: Only the steps that a submission takes.

        Raises:
            ValueError: Both or neither of ``endpoint_id`` and ``component`` are given.
            RateLimitError: Too many probes in a minute.
        """
        if (endpoint_id is None) == (component is None):
            raise ValueError("give endpoint_id or component")
        body: dict[str, Any] = {"light": light}
        if samples is not None:
            body["samples"] = [dict(sample) for sample in samples]
        if component is not None:
            body["component"] = dict(component)
        path = PATH if endpoint_id is None else _path(endpoint_id)
        return self._transport.post(f"{path}/probe", ProbeReport, body=body)

    def stats(self, endpoint_id: str) -> RewardEndpointStats:
        """Which jobs use an endpoint, and what its latest probe found."""
        return self._transport.get(f"{_path(endpoint_id)}/stats", RewardEndpointStats)


def _path(endpoint_id: str) -> str:
    return f"{PATH}/{escaped(endpoint_id)}"
