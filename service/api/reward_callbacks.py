"""Callbacks: reward services post later results, authorized by the token of one request."""

import hashlib
import hmac
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import orjson
import structlog
from fastapi import APIRouter, Depends, Request
from sqlalchemy.exc import SQLAlchemyError
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
    RESULT_TYPE,
    TOKEN_PREFIX,
    RewardResponse,
    SampleResult,
    decode_result,
    is_own_request,
    load_json,
    one_line,
)
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import Scored, Skipped
from dar.rewards.http.redaction import Redactor
from dar.rewards.http.responses import as_result, redacted
from dar.rewards.http.signing import decode_secret, verify
from service.http import bodies, errors
from service.rewards import endpoints
from service.runtime import CurrentRuntime, Runtime
from service.store import reward_requests
from service.store.tables import RewardRequestRow

log = structlog.get_logger()
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
        if row is not None:
            # In another thread, so that the response takes no longer than for an unknown id.
            error = "401: its token is missing or wrong"
            threading.Thread(target=_note, args=(runtime, row, error), daemon=True).start()
        raise _refusal(request, runtime)
    return row


def _note(runtime: Runtime, row: RewardRequestRow, error: str) -> None:
    """Store why a callback was refused, for the owner of the job."""
    if row.last_error == error or row.state != "waiting":
        return
    try:
        job_id = runtime.database.transact(
            lambda tx: reward_requests.note_refusal(tx, row.id, error)
        )
    except (DARError, SQLAlchemyError) as failure:
        log.warning("refused callback not stored", request=row.id, error=type(failure).__name__)
        return
    if job_id is not None:
        runtime.notifier.notify(job_id)


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


async def received(request: Request, runtime: CurrentRuntime, row: Holder) -> bytes:
    """The body of a callback, at most `MAX_RESPONSE_BYTES`.

    Raises:
        UnsupportedMediaTypeError: The body is not JSON, or compressed.
        PayloadTooLargeError: The body is larger.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    unsupported = ""
    if encoding not in {"", "identity"}:
        unsupported = "send the body of a callback without a content-encoding"
    elif media_type != "application/json" and not media_type.endswith("+json"):
        unsupported = "send the body of a callback as application/json"
    if unsupported:
        runtime.telemetry.count_callback("unsupported")
        await _note_status(runtime, row, f"415: {unsupported}")
        raise UnsupportedMediaTypeError(unsupported)
    try:
        chunks = [
            chunk
            async for chunk in bodies.limited(request.stream(), MAX_RESPONSE_BYTES, "callback")
        ]
    except DARError as error:
        runtime.telemetry.count_callback("too_large")
        await _note_status(runtime, row, f"413: {error.message}")
        raise
    return b"".join(chunks)


async def _note_status(runtime: Runtime, row: RewardRequestRow | ProbeRequest, error: str) -> None:
    if isinstance(row, RewardRequestRow):
        await run_in_threadpool(_note, runtime, row, error)


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
    redact = Redactor([probed.token.removeprefix(TOKEN_PREFIX)])
    raise _as_error(outcome, probed.id, None if error is None else _shown(error, redact))


def _settle(
    request: Request, runtime: Runtime, row: RewardRequestRow, body: bytes
) -> CallbackAnswer:
    access = _access(runtime, row)
    webhook_id = _verified_id(request, runtime, row, body, access)
    if is_own_request(body):
        _note(runtime, row, "401: its body is the request itself, not a result")
        raise _refusal(request, runtime)
    redact = _redactor(request, access)
    text = ""
    error: RewardContractError | None = None
    try:
        found = decode_result(body, request_id=row.id, ids=row.sample_ids)
        text = _without_secrets(body, row.id, found, redact)
    except RewardContractError as refused:
        error = _shown(refused, redact)
    result = reward_requests.CallbackResult(
        text=text,
        sha256=hashlib.sha256(body).hexdigest(),
        error=None if error is None else f"{error.error_code}: {error.message}",
        webhook_id=None if webhook_id is None else hashlib.sha256(webhook_id.encode()).hexdigest(),
    )
    outcome, job_id = runtime.database.transact(
        lambda tx: reward_requests.settle(tx, row.id, result)
    )
    if outcome == "replayed":
        _note(runtime, row, "401: its webhook-id has been used for another body")
        raise _refusal(request, runtime)
    runtime.telemetry.count_callback(outcome)
    if outcome in {"accepted", "invalid"}:
        runtime.notifier.notify(job_id)
    if outcome == "accepted":
        return CallbackAnswer(status="accepted")
    if outcome == "duplicate":
        return CallbackAnswer(status="duplicate")
    raise _as_error(outcome, row.id, error)


def _shown(error: RewardContractError, redact: Redactor) -> RewardContractError:
    """The error without secrets; it may quote the body."""
    message = one_line(redact(error.message))[:MAX_ERROR]
    return RewardContractError(message, code=error.error_code)


def _without_secrets(
    body: bytes, request_id: str, results: Sequence[SampleResult], redact: Redactor
) -> str:
    """The body of a callback as it is stored: if it contains a secret, only what is used of it."""
    content = load_json(body)
    if redact.in_json(content) == content:
        return body.decode()
    kept = [_redacted(result, redact) for result in results]
    return orjson.dumps({"type": RESULT_TYPE, "request_id": request_id, "results": kept}).decode()


def _redacted(result: SampleResult, redact: Redactor) -> dict[str, Any]:
    shown = redacted(as_result(result), redact)
    if isinstance(shown, Scored):
        parts = dict(shown.components)
        more = {} if shown.feedback is None else {"feedback": shown.feedback}
        return {"id": result.id, "reward": shown.reward, "components": parts, **more}
    if isinstance(shown, Skipped):
        return {"id": result.id, "skip": True, "reason": shown.reason}
    error = {
        "code": shown.code.removeprefix("service."),
        "message": shown.message,
        "retryable": shown.is_transient,
    }
    return {"id": result.id, "error": error}


def _as_error(
    outcome: reward_requests.CallbackOutcome, request_id: str, error: RewardContractError | None
) -> DARError:
    if outcome == "conflict":
        return ConflictError(
            f"request {request_id} has a different result already", code="result_conflict"
        )
    if outcome == "invalid":
        assert error is not None
        problem = Problem(error.message, None, error.error_code)
        return InvalidResultError(
            f"not a result of request {request_id}: {error.message}; "
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
    request: Request,
    runtime: Runtime,
    row: RewardRequestRow,
    body: bytes,
    access: ComponentAccess | None,
) -> str | None:
    """The ``webhook-id`` of a signed callback; None if it is neither signed nor has to be.

    Raises:
        AuthenticationError: A required signature is missing, or a signature is wrong.
    """
    if not row.is_signature_required and "webhook-signature" not in request.headers:
        return None
    webhook_id = request.headers.get("webhook-id", "")
    try:
        secrets = [] if access is None else access.secrets
        verify([decode_secret(secret) for secret in secrets], request.headers, body)
    except AuthenticationError as error:
        _note(runtime, row, f"401: {error.message}")
        raise _refusal(request, runtime) from None
    if not webhook_id.startswith(WEBHOOK_PREFIX) or len(webhook_id) > 128:
        _note(runtime, row, f"401: its webhook-id does not begin with {WEBHOOK_PREFIX!r}")
        raise _refusal(request, runtime)
    return webhook_id


def _redactor(request: Request, access: ComponentAccess | None) -> Redactor:
    """Removes what the reward service knows: the endpoint's secrets and the request's token."""
    token = request.headers.get("authorization", "").partition(" ")[2].strip()
    own = [token.removeprefix(TOKEN_PREFIX)]
    if access is None:
        return Redactor(own)
    return Redactor([*own, *access.secrets], access.headers.values(), access.url)


def _access(runtime: Runtime, row: RewardRequestRow) -> ComponentAccess | None:
    """URL and secrets of the endpoint of a request; those that sign it may sign its callbacks."""
    with runtime.database.read() as transaction:
        job = reward_requests.job_of(transaction, row)
    rewards = job.parsed_spec.dar.rewards
    components = () if rewards is None else rewards.components
    for component in components:
        if component.name == row.component:
            return endpoints.access_for(runtime, job, component)
    return None
