"""Reward endpoints: reward services, registered with their secrets, and probed."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.concurrency import run_in_threadpool

from dar.errors import ConfigurationError, InvalidRequestError, Problem, RewardMisconfiguredError
from dar.protocol.base import Deleted, Page
from dar.protocol.ids import new_id
from dar.protocol.reward_endpoints import (
    OPTIONS,
    ChangedRewardEndpoint,
    CreateRewardEndpoint,
    EndpointOptions,
    LastProbe,
    NewRewardEndpoint,
    ProbeEndpoint,
    ProbeInline,
    RewardEndpoint,
    RewardEndpointStats,
    RotateSecret,
    UpdateRewardEndpoint,
    check_options,
)
from dar.protocol.reward_probe import ProbeReport
from dar.protocol.worker import ComponentAccess
from dar.rewards.http.egress import EgressPolicy, parse_url
from dar.rewards.http.signing import decode_secret
from dar.rewards.probe.client import ProbeTarget
from dar.rewards.probe.run import as_samples
from service import keys
from service.api.paging import PageCursor, envelope, seconds
from service.http import errors
from service.http.auth import Reader, Submitter, User
from service.http.bodies import body_of, schema_of
from service.rewards import endpoints, probing
from service.runtime import CurrentRuntime, Runtime
from service.store import reward_endpoints, reward_secrets, tables
from service.store.database import Transaction

PATH = "/v1/reward_endpoints"
router = APIRouter(prefix=PATH, tags=["reward_endpoints"])
NOT_NULL = ("name", "url")
KEPT_OF_REPORT = {"ok", "errors", "warnings", "latency_ms", "determinism"}
UNKNOWN: dict[str, Any] = {"determinism": {}, "revision": 0}
"""Fields that reports stored by an earlier version lack."""
CreateBody = Annotated[CreateRewardEndpoint, Depends(body_of(CreateRewardEndpoint))]
UpdateBody = Annotated[UpdateRewardEndpoint, Depends(body_of(UpdateRewardEndpoint))]
RotateBody = Annotated[RotateSecret, Depends(body_of(RotateSecret, is_optional=True))]
ProbeBody = Annotated[ProbeEndpoint, Depends(body_of(ProbeEndpoint, is_optional=True))]
InlineBody = Annotated[ProbeInline, Depends(body_of(ProbeInline))]


@router.post("", openapi_extra=schema_of(CreateRewardEndpoint))
def create_reward_endpoint(
    runtime: CurrentRuntime, user: Submitter, body: CreateBody
) -> NewRewardEndpoint:
    """Register a reward service. Only this answer contains its signing secret."""
    _check_egress(runtime, body.url)
    secret = _signing_secret(body)
    options = body.model_dump(mode="json", include=set(OPTIONS), exclude_unset=True)
    endpoint = tables.RewardEndpointRow(
        id=new_id("rwe_"),
        project_id=user.project_id,
        name=body.name,
        url=body.url,
        protocol=options.pop("protocol", "dar.reward.v1"),
        options=options,
    )
    with runtime.database.write() as transaction:
        reward_endpoints.add(transaction, endpoint)
        reward_secrets.add_signing(transaction, runtime.secrets, endpoint, secret)
        headers = {name: value.get_secret_value() for name, value in body.headers.items()}
        reward_secrets.set_headers(transaction, runtime.secrets, endpoint, headers)
        shown = show(endpoint, reward_secrets.list_all(transaction, [endpoint.id]))
    return NewRewardEndpoint(**dict(shown), signing_secret=secret)


@router.get("")
def list_reward_endpoints(
    runtime: CurrentRuntime, user: Reader, cursor: PageCursor
) -> Page[RewardEndpoint]:
    """List the project's reward endpoints, newest first."""
    with runtime.database.read() as transaction:
        found = reward_endpoints.list_page(transaction, user.project_id, cursor)
        secrets = reward_secrets.list_all(transaction, [row.id for row in found.rows])
    return envelope(found, lambda row: show(row, secrets), lambda item: item.id)


@router.get("/{endpoint_id}")
def get_reward_endpoint(endpoint_id: str, runtime: CurrentRuntime, user: Reader) -> RewardEndpoint:
    """Show a reward endpoint. Its secrets are shown as fingerprints only."""
    with runtime.database.read() as transaction:
        return _shown(transaction, reward_endpoints.get(transaction, user.project_id, endpoint_id))


@router.patch("/{endpoint_id}", openapi_extra=schema_of(UpdateRewardEndpoint))
def update_reward_endpoint(
    endpoint_id: str, runtime: CurrentRuntime, user: Submitter, body: UpdateBody
) -> ChangedRewardEndpoint:
    """Change a reward endpoint.

    A new origin of its URL drops secret headers that are not sent again.
    """
    sent = body.model_fields_set
    for name in NOT_NULL:
        if name in sent and getattr(body, name) is None:
            raise errors.invalid([Problem("must not be null", name, "null_value")])
    if body.url is not None:
        _check_egress(runtime, body.url)
    box = runtime.secrets
    with runtime.database.write() as transaction:
        endpoint = reward_endpoints.get(transaction, user.project_id, endpoint_id, lock="change")
        endpoint.name = body.name or endpoint.name
        _set_options(endpoint, body.options)
        dropped = []
        if body.url is not None:
            dropped = reward_secrets.move(transaction, box, endpoint, body.url)
        headers = {
            name: None if value is None else value.get_secret_value()
            for name, value in body.headers.items()
        }
        reward_secrets.set_headers(transaction, box, endpoint, headers)
        reward_endpoints.touch(transaction, endpoint, is_revised=bool(sent - {"name"}))
        shown = _shown(transaction, endpoint)
    again = {secret.name for secret in shown.secrets}
    return ChangedRewardEndpoint(
        **dict(shown), dropped_headers=[name for name in dropped if name not in again]
    )


@router.delete("/{endpoint_id}", responses=errors.may_answer(409))
def delete_reward_endpoint(endpoint_id: str, runtime: CurrentRuntime, user: Submitter) -> Deleted:
    """Delete a reward endpoint and its secrets; no unfinished job may name it."""
    with runtime.database.write() as transaction:
        reward_endpoints.remove(transaction, user.project_id, endpoint_id)
    return Deleted(id=endpoint_id, object="reward_endpoint", deleted=True)


@router.post("/{endpoint_id}/rotate_secret", openapi_extra=schema_of(RotateSecret))
def rotate_secret(
    endpoint_id: str, runtime: CurrentRuntime, user: Submitter, body: RotateBody
) -> NewRewardEndpoint:
    """Make a new signing secret, which only this answer contains.

    The old one still signs beside it for 24 hours.
    """
    secret = keys.new_reward_secret()
    with runtime.database.write() as transaction:
        endpoint = reward_endpoints.get(transaction, user.project_id, endpoint_id, lock="change")
        reward_secrets.replace_signing(
            transaction,
            runtime.secrets,
            endpoint,
            secret,
            is_overlapping=body.keep_old_secret_active_for_24_hours,
        )
        reward_endpoints.touch(transaction, endpoint, is_revised=True)
        shown = _shown(transaction, endpoint)
    return NewRewardEndpoint(**dict(shown), signing_secret=secret)


@router.post("/{endpoint_id}/purge_cache")
def purge_cache(endpoint_id: str, runtime: CurrentRuntime, user: Submitter) -> RewardEndpoint:
    """Make cached rewards of an endpoint unusable.

    A running job sees the change at its next attempt.
    """
    with runtime.database.write() as transaction:
        endpoint = reward_endpoints.get(transaction, user.project_id, endpoint_id, lock="change")
        reward_endpoints.purge(transaction, endpoint)
        return _shown(transaction, endpoint)


@router.post("/probe", openapi_extra=schema_of(ProbeInline), responses=errors.may_answer(429))
async def probe_inline(runtime: CurrentRuntime, user: Submitter, body: InlineBody) -> ProbeReport:
    """Probe the reward service of a component, as a job would use it."""
    component = body.component
    if component.kind != "http" or component.endpoint is not None or component.url is None:
        message = (
            "send an http component with a url; a registered endpoint is probed at its own path"
        )
        raise InvalidRequestError(message, param="component", code="not_inline")
    runtime.probes.take(user.key_id)
    access = await run_in_threadpool(_inline, runtime, user, component.url)
    target = endpoints.probe_target(runtime.settings, component, access, runtime.probe_inbox)
    return await probing.report_on(target, as_samples(body.samples), light=body.light)


@router.post(
    "/{endpoint_id}/probe",
    openapi_extra=schema_of(ProbeEndpoint),
    responses=errors.may_answer(429),
)
async def probe_reward_endpoint(
    endpoint_id: str, runtime: CurrentRuntime, user: Submitter, body: ProbeBody
) -> ProbeReport:
    """Probe a registered reward endpoint, as a job would use it."""
    target, revision = await run_in_threadpool(_target, runtime, user, endpoint_id)
    runtime.probes.take(user.key_id)
    report = await probing.report_on(target, as_samples(body.samples), light=body.light)
    await run_in_threadpool(_note, runtime, endpoint_id, revision, report)
    return report


@router.get("/{endpoint_id}/stats")
def get_reward_endpoint_stats(
    endpoint_id: str, runtime: CurrentRuntime, user: Reader
) -> RewardEndpointStats:
    """Count the jobs that use a reward endpoint, and show its latest probe."""
    with runtime.database.read() as transaction:
        endpoint = reward_endpoints.get(transaction, user.project_id, endpoint_id)
        jobs, steps, newest = reward_endpoints.usage(transaction, endpoint_id)
    probe = endpoint.last_probe
    return RewardEndpointStats.model_validate(
        {
            "id": endpoint.id,
            "object": "reward_endpoint.stats",
            "state": endpoint.state,
            "jobs": jobs,
            "steps": steps,
            "last_job_id": newest,
            "last_probe": None if probe is None else LastProbe.model_validate({**UNKNOWN, **probe}),
        }
    )


def show(
    endpoint: tables.RewardEndpointRow, secrets: Sequence[tables.RewardSecretRow]
) -> RewardEndpoint:
    """An endpoint as the API shows it; of ``secrets`` only those of this endpoint are used."""
    options = EndpointOptions.model_validate({"protocol": endpoint.protocol, **endpoint.options})
    return RewardEndpoint.model_validate(
        {
            **dict(options),
            "id": endpoint.id,
            "object": "reward_endpoint",
            "created_at": seconds(endpoint.created_at),
            "updated_at": seconds(endpoint.updated_at),
            "name": endpoint.name,
            "url": endpoint.url,
            "revision": endpoint.revision,
            "state": endpoint.state,
            "secrets": [
                {
                    "kind": secret.kind,
                    "name": secret.name,
                    "fingerprint": secret.fingerprint,
                    "created_at": seconds(secret.created_at),
                    "expires_at": None if secret.expires_at is None else seconds(secret.expires_at),
                }
                for secret in secrets
                if secret.endpoint_id == endpoint.id
            ],
        }
    )


def _shown(transaction: Transaction, endpoint: tables.RewardEndpointRow) -> RewardEndpoint:
    return show(endpoint, reward_secrets.list_all(transaction, [endpoint.id]))


def _check_egress(runtime: Runtime, url: str) -> None:
    """Reject a URL that every request would reject.

    Raises:
        InvalidRequestError: The egress policy does not allow the URL.
    """
    try:
        parse_url(url, EgressPolicy.from_settings(runtime.settings))
    except RewardMisconfiguredError as error:
        raise InvalidRequestError(error.message, param="url", code=error.error_code) from None


def _signing_secret(body: CreateRewardEndpoint) -> str:
    if body.signing_secret is None:
        return keys.new_reward_secret()
    secret = body.signing_secret.get_secret_value()
    try:
        decode_secret(secret)
    except ConfigurationError as error:
        message = f"signing_secret: {error.message}"
        raise InvalidRequestError(message, param="signing_secret", code="signing_secret") from None
    return secret


def _set_options(endpoint: tables.RewardEndpointRow, sent: dict[str, Any]) -> None:
    """Replace the sent fields.

    Raises:
        InvalidRequestError: The fields do not fit together.
    """
    both = {"protocol": endpoint.protocol, **endpoint.options, **sent}
    options = {name: value for name, value in both.items() if value is not None}
    try:
        check_options(options)
    except ValueError as error:
        raise InvalidRequestError(str(error), code="endpoint_options") from None
    endpoint.protocol = options.pop("protocol", "dar.reward.v1")
    endpoint.options = options


def _inline(runtime: Runtime, user: User, url: str) -> ComponentAccess:
    with runtime.database.read() as transaction:
        return endpoints.inline_access(transaction, runtime, user.project_id, url)


def _target(runtime: Runtime, user: User, endpoint_id: str) -> tuple[ProbeTarget, int]:
    with runtime.database.read() as transaction:
        endpoint = reward_endpoints.get(transaction, user.project_id, endpoint_id)
        access = endpoints.access_to(transaction, runtime.secrets, endpoint)
    component, inbox = endpoints.component_of(endpoint), runtime.probe_inbox
    return endpoints.probe_target(runtime.settings, component, access, inbox), endpoint.revision


def _note(runtime: Runtime, endpoint_id: str, revision: int, report: ProbeReport) -> None:
    kept = report.model_dump(mode="json", include=KEPT_OF_REPORT)
    with runtime.database.write() as transaction:
        state = probing.state_after(report)
        reward_endpoints.note_probe(transaction, endpoint_id, kept, revision=revision, state=state)
