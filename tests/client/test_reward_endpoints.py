"""Reward endpoints in the SDK, against the real service."""

from typing import Any

import pytest

from dar.client import Client
from dar.errors import ConflictError, InvalidRequestError, NotFoundError, RateLimitError

URL = "https://judge.example/score"


def test_an_endpoint_lives_from_its_creation_to_its_deletion(client: Client) -> None:
    made = client.reward_endpoints.create(
        "judge", URL, headers={"Authorization": "Bearer x"}, timeouts={"attempt": 9.0}
    )
    assert made.signing_secret not in repr(made)
    shown = client.reward_endpoints.retrieve(made.id)
    assert (shown.timeouts.attempt, shown.url, shown.revision) == (9.0, URL, 1)
    assert {secret.name for secret in shown.secrets} == {None, "authorization"}
    assert made.id in [item.id for item in client.reward_endpoints.list(limit=1)]
    changed = client.reward_endpoints.update(made.id, url="https://other.example/")
    assert (changed.dropped_headers, changed.revision) == (["authorization"], 2)
    rotated = client.reward_endpoints.rotate_secret(made.id)
    assert rotated.signing_secret != made.signing_secret
    purged = client.reward_endpoints.purge_cache(made.id)
    assert (purged.revision, purged.cache.enabled) == (4, "auto")
    assert client.reward_endpoints.stats(made.id).jobs == {}
    assert client.reward_endpoints.delete(made.id).deleted
    with pytest.raises(NotFoundError):
        client.reward_endpoints.retrieve(made.id)


def test_a_probe_says_what_is_wrong(client: Client) -> None:
    component = {"name": "a", "url": "http://127.0.0.1:61999/score", "retry": {"attempts": 1}}
    report = client.reward_endpoints.probe(component=component, light=True)
    assert (report.ok, report.errors[0].code) == (False, "connect")
    with pytest.raises(ValueError, match="endpoint_id or component"):
        client.reward_endpoints.probe()


def test_failures_are_the_services_own_errors(
    client: Client, prompts: bytes, method: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.reward_endpoints.create("judge", URL, headers={"host": "x"})
    assert caught.value.param == "headers.host"
    made = client.reward_endpoints.create("judge", URL)
    rewards = {"components": [{"name": "a", "endpoint": made.id}]}
    file_id = client.files.create(prompts).id
    dar = {**method["dar"], "rewards": rewards}
    job = client.jobs.create(
        model="tiny",
        training_file=file_id,
        method={**method, "dar": dar},
        skip_validation=True,
    )
    with pytest.raises(ConflictError):
        client.reward_endpoints.delete(made.id)
    client.jobs.cancel(job.id)
    client.reward_endpoints.delete(made.id)


def test_too_many_probes_are_a_rate_limit(service: Any) -> None:
    component = {"name": "a", "url": "http://127.0.0.1:61999/score", "retry": {"attempts": 1}}
    with Client(service.api_key, service.url, max_retries=0) as client:

        def probe_often() -> None:
            for _ in range(7):
                client.reward_endpoints.probe(component=component, light=True)

        with pytest.raises(RateLimitError) as caught:
            probe_often()
    assert caught.value.retry_after_seconds is not None
