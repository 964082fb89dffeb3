"""Callbacks: reward services post later results, authorized by the token of one request."""

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from dar.errors import (
    AuthenticationError,
    ConflictError,
    DARError,
    GoneError,
    InvalidResultError,
    Problem,
    RateLimitError,
    RewardContractError,
    UnsupportedMediaTypeError,
)
from dar.protocol.reward_callbacks import CallbackAnswer
from dar.protocol.rewards import (
    MAX_RESPONSE_BYTES,
    RewardResponse,
    decode_result,
    is_own_request,
)
from dar.rewards.http.signing import decode_secret, verify
from service.http import bodies, errors
from service.rewards import endpoints
from service.runtime import CurrentRuntime, Runtime
from service.store import reward_requests
from service.store.tables import RewardRequestRow

router = APIRouter(prefix="/v1/reward_callbacks", tags=["reward callbacks"])
WEBHOOK_PREFIX = "rwr_"
"""Start of a callback's ``webhook-id``. Requests of this product start differently, so that a
signed request cannot be sent back as a callback."""
MAX_ERROR = 1000
"""Characters of an error that are kept."""
_NO_HASH = "0" * 64


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """A request of a probe in this process."""

    id: str
    token: str = field(repr=False)


def holder(
    request_id: str, request: Request, runtime: CurrentRuntime
) -> RewardRequestRow | ProbeRequest:
    """Authorize the holder of a request's token.

    A wrong token, a missing one and an unknown id take the same path: one query, the same
    comparisons, one answer.

    Raises:
        AuthenticationError: With the same message for every cause.
        RateLimitError: The address fails too often.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    token = token.strip() if scheme.lower() == "bearer" else ""
    if runtime.probe_inbox.opens(request_id, token):
        return ProbeRequest(request_id, token)
    with runtime.database.read() as transaction:
        row = reward_requests.find(transaction, request_id)
    hashes = [] if row is None else row.token_hashes.split()
    hashes += [_NO_HASH] * (reward_requests.MAX_TOKENS - len(hashes))
    sha256 = hashlib.sha256(token.encode()).hexdigest()
    fits = [hmac.compare_digest(sha256, known) for known in hashes]
    if row is None or not any(fits):
        raise _refusal(request, runtime)
    return row


def _refusal(request: Request, runtime: Runtime) -> DARError:
    runtime.telemetry.count_callback("refused")
    address = "" if request.client is None else request.client.host
    wait = runtime.callback_failures.fail(address)
    if wait is not None:
        return RateLimitError(
            "too many callbacks with wrong credentials came from this address",
            retry_after_seconds=wait,
        )
    return AuthenticationError(
        "the callback's credentials are wrong: send the token of reply.callback as "
        "'Authorization: Bearer rwt_…', and a fresh signature whose webhook-id begins with 'rwr_' "
        "if one is required",
        code="invalid_callback",
    )


Holder = Annotated[RewardRequestRow | ProbeRequest, Depends(holder)]


async def received(request: Request, runtime: CurrentRuntime, row: Holder) -> bytes:  # noqa: ARG001 - makes the token be checked first
    """The body of a callback, at most `MAX_RESPONSE_BYTES`.

    Raises:
        UnsupportedMediaTypeError: The body is not JSON, or compressed.
        PayloadTooLargeError: The body is larger.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if encoding not in {"", "identity"}:
        runtime.telemetry.count_callback("unsupported")
        raise UnsupportedMediaTypeError("send the body of a callback without a content-encoding")
    if media_type != "application/json" and not media_type.endswith("+json"):
        runtime.telemetry.count_callback("unsupported")
        raise UnsupportedMediaTypeError("send the body of a callback as application/json")
    try:
        chunks = [
            chunk
            async for chunk in bodies.limited(request.stream(), MAX_RESPONSE_BYTES, "callback")
        ]
    except DARError:
        runtime.telemetry.count_callback("too_large")
        raise
    return b"".join(chunks)


@router.post(
    "/{request_id}",
    openapi_extra=bodies.schema_of(RewardResponse),
    responses=errors.may_answer(409, 410, 422, 429),
)
async def post_result(
    request: Request,
    runtime: CurrentRuntime,
    row: Holder,
    body: Annotated[bytes, Depends(received)],
) -> CallbackAnswer:
    """Post the result of a reward request after a 202; authorized by the request's token."""
    if isinstance(row, ProbeRequest):
        return await run_in_threadpool(_settle_probe, request, runtime, row, body)
    return await run_in_threadpool(_settle, request, runtime, row, body)


def _settle_probe(
    request: Request, runtime: Runtime, probed: ProbeRequest, body: bytes
) -> CallbackAnswer:
    if is_own_request(body):
        raise _refusal(request, runtime)
    outcome, error = runtime.probe_inbox.receive(probed.id, probed.token, body)
    if outcome == "refused":  # it has expired since the token was checked
        raise _refusal(request, runtime)
    runtime.telemetry.count_callback(outcome)
    if outcome in {"accepted", "duplicate"}:
        return CallbackAnswer.model_validate({"status": outcome})
    raise _as_error(outcome, probed.id, error)


def _settle(
    request: Request, runtime: Runtime, row: RewardRequestRow, body: bytes
) -> CallbackAnswer:
    webhook_id = _verified_id(request, runtime, row, body)
    if is_own_request(body):
        raise _refusal(request, runtime)
    error: RewardContractError | None = None
    try:
        decode_result(body, request_id=row.id, ids=row.sample_ids)
    except RewardContractError as found:
        error = found
    result = reward_requests.CallbackResult(
        text="" if error else body.decode(),
        sha256=hashlib.sha256(body).hexdigest(),
        error=None if error is None else _storable(f"{error.error_code}: {error.message}"),
        webhook_id=webhook_id,
    )
    outcome, job_id = runtime.database.transact(
        lambda tx: reward_requests.settle(tx, row.id, result)
    )
    if outcome == "replayed":
        raise _refusal(request, runtime)
    runtime.telemetry.count_callback(outcome)
    if outcome == "accepted":
        runtime.notifier.notify(job_id)
        return CallbackAnswer(status="accepted")
    if outcome == "duplicate":
        return CallbackAnswer(status="duplicate")
    raise _as_error(outcome, row.id, error)


def _storable(text: str) -> str:
    """A message that may quote the body, without NUL, which no database stores."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")[:MAX_ERROR]


def _as_error(
    outcome: reward_requests.CallbackOutcome, request_id: str, error: RewardContractError | None
) -> DARError:
    if outcome == "conflict":
        return ConflictError(
            f"request {request_id} has a different result already", code="result_conflict"
        )
    if outcome == "invalid":
        assert error is not None
        problem = Problem(error.message[:MAX_ERROR], None, error.error_code)
        return InvalidResultError(
            f"not a result of request {request_id}: {error.message[:MAX_ERROR]}; "
            "the token stays valid for a few corrected results",
            problems=[problem],
        )
    reasons = {
        "late": "its deadline has passed, or its job has ended",
        "closed": "its result came another way",
        "burned": "it got too many invalid results",
    }
    return GoneError(f"request {request_id} accepts no result any more: {reasons[outcome]}")


def _verified_id(
    request: Request, runtime: Runtime, row: RewardRequestRow, body: bytes
) -> str | None:
    """The ``webhook-id`` of a signed callback; None if it is neither signed nor has to be.

    Raises:
        AuthenticationError: A required signature is missing, or a signature is wrong.
    """
    if not row.is_signature_required and "webhook-signature" not in request.headers:
        return None
    webhook_id = request.headers.get("webhook-id", "")
    try:
        verify(callback_keys(runtime, row), request.headers, body)
    except AuthenticationError:
        raise _refusal(request, runtime) from None
    if not webhook_id.startswith(WEBHOOK_PREFIX) or len(webhook_id) > 128:
        raise _refusal(request, runtime)
    return webhook_id


def callback_keys(runtime: Runtime, row: RewardRequestRow) -> list[bytes]:
    """The secrets that may sign callbacks of a request: those that sign the request itself."""
    with runtime.database.read() as transaction:
        job = reward_requests.job_of(transaction, row)
    rewards = job.parsed_spec.dar.rewards
    components = () if rewards is None else rewards.components
    for component in components:
        if component.name == row.component:
            access = endpoints.access_for(runtime, job, component)
            return [] if access is None else [decode_secret(secret) for secret in access.secrets]
    return []
