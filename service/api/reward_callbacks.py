"""Where reward services post results that come later; opened by the token of one request, not by an API key."""

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
from dar.protocol.rewards import MAX_RESPONSE_BYTES, decode_result, is_own_request
from dar.rewards.http.signing import decode_secret, verify
from service.http import bodies
from service.rewards import endpoints
from service.runtime import CurrentRuntime, Runtime
from service.store import reward_requests
from service.store.tables import JobRow, RewardRequestRow

router = APIRouter(prefix="/v1/reward_callbacks", tags=["reward callbacks"])
WEBHOOK_PREFIX = "rwr_"
"""How the ``webhook-id`` of a callback begins; our own requests' begins otherwise, so that none can be sent back to us."""
MAX_ERROR = 1000
"""Characters of an error that are kept."""
_NO_HASH = "0" * 64


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """A request that a probe of this process has made, opened by its token."""

    id: str
    token: str = field(repr=False)


def holder(
    request_id: str, request: Request, runtime: CurrentRuntime
) -> RewardRequestRow | ProbeRequest:
    """Lets the holder of a request's token pass.

    A wrong token, a missing one and an unknown id take the same way: one look-up, the same comparisons, one answer.

    Raises:
        AuthenticationError: Whatever is wrong, it says the same.
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
        "the callback's credentials do not fit: send the token of reply.callback as 'Authorization: Bearer rwt_…', and "
        "a fresh signature whose webhook-id begins with 'rwr_' where one is due",
        code="invalid_callback",
    )


Holder = Annotated[RewardRequestRow | ProbeRequest, Depends(holder)]


async def received(request: Request, runtime: CurrentRuntime, row: Holder) -> bytes:  # noqa: ARG001 - the token is checked first
    """The body of a callback, at most `MAX_RESPONSE_BYTES`.

    Raises:
        UnsupportedMediaTypeError: It is no JSON, or packed.
        PayloadTooLargeError: It is larger.
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


@router.post("/{request_id}")
async def post_result(
    request: Request,
    runtime: CurrentRuntime,
    row: Holder,
    body: Annotated[bytes, Depends(received)],
) -> CallbackAnswer:
    """Give the result of a reward request that was answered with 202. Opened by the request's own token."""
    if isinstance(row, ProbeRequest):
        return await run_in_threadpool(_settle_probe, request, runtime, row, body)
    return await run_in_threadpool(_settle, request, runtime, row, body)


def _settle_probe(
    request: Request, runtime: Runtime, asked: ProbeRequest, body: bytes
) -> CallbackAnswer:
    if is_own_request(body):
        raise _refusal(request, runtime)
    fate, error = runtime.probe_inbox.receive(asked.id, asked.token, body)
    if fate == "refused":  # it was forgotten meanwhile
        raise _refusal(request, runtime)
    runtime.telemetry.count_callback(fate)
    if fate in {"accepted", "duplicate"}:
        return CallbackAnswer.model_validate({"status": fate})
    raise _as_error(fate, asked.id, error)


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
    fate, job_id = runtime.database.transact(lambda tx: reward_requests.settle(tx, row.id, result))
    if fate == "replayed":
        raise _refusal(request, runtime)
    runtime.telemetry.count_callback(fate)
    if fate == "accepted":
        runtime.notifier.notify(job_id)
        return CallbackAnswer(status="accepted")
    if fate == "duplicate":
        return CallbackAnswer(status="duplicate")
    raise _as_error(fate, row.id, error)


def _storable(text: str) -> str:
    """A message that may quote what was sent, without NUL, which no database holds."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")[:MAX_ERROR]


def _as_error(
    fate: reward_requests.CallbackOutcome, request_id: str, error: RewardContractError | None
) -> DARError:
    if fate == "conflict":
        return ConflictError(
            f"request {request_id} has another result already, which stands", code="result_conflict"
        )
    if fate == "invalid":
        assert error is not None
        problem = Problem(error.message[:MAX_ERROR], None, error.error_code)
        return InvalidResultError(
            f"not a result of request {request_id}: {error.message[:MAX_ERROR]}; the token is still good for "
            "a corrected one, but not for many tries",
            problems=[problem],
        )
    reasons = {
        "late": "its deadline has passed, or its job has ended",
        "closed": "it was answered on another way",
        "burned": "it got too many invalid results",
    }
    return GoneError(f"nobody waits for request {request_id} any more: {reasons[fate]}")


def _verified_id(
    request: Request, runtime: Runtime, row: RewardRequestRow, body: bytes
) -> str | None:
    """The ``webhook-id`` of a signed callback; None where none is due and none was sent.

    Raises:
        AuthenticationError: The signature is missing though it is due, or does not hold.
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
    """The secrets that may sign callbacks of a request: those that sign the request itself, while they are rotated both."""
    with runtime.database.read() as transaction:
        job = transaction.get(JobRow, row.job_id)
    assert job is not None
    rewards = job.parsed_spec.dar.rewards
    components = () if rewards is None else rewards.components
    for component in components:
        if component.name == row.component:
            access = endpoints.access_for(runtime, job, component)
            return [] if access is None else [decode_secret(secret) for secret in access.secrets]
    return []
