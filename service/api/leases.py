"""A worker and its job: claim, heartbeat, directives, rows, and the end of the attempt."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from starlette.concurrency import run_in_threadpool

from dar.errors import (
    ConflictError,
    FencedError,
    InvalidRequestError,
    PermissionDeniedError,
    Problem,
    SecretUnreadableError,
)
from dar.protocol.ids import new_id
from dar.protocol.metrics import is_known
from dar.protocol.worker import (
    Batch,
    BatchAck,
    Claim,
    Complete,
    ComponentAccess,
    Directive,
    Directives,
    Fail,
    Heartbeat,
    Lease,
    LeaseState,
    MetricsRow,
    ModelSource,
    Outcome,
    PinRevisions,
    Release,
    RevisionsPinned,
)
from service import keys
from service.background.directives import ONCE, JobDirective, Received
from service.http import errors
from service.http.auth import LeaseHolder, LeaseSender, Worker
from service.http.bodies import MAX_EXACT, body_of, schema_of
from service.rewards import endpoints
from service.runtime import CurrentRuntime, Runtime
from service.store import events, fence, leases, outcomes, reward_requests, rows, workers
from service.store.database import Transaction

router = APIRouter(prefix="/v1/worker/leases", tags=["worker"])
FENCED = errors.may_answer(409)
MAX_WAIT_SECONDS = 30.0
TOKENS = "train/tokens"
ClaimBody = Annotated[Claim, Depends(body_of(Claim, is_of_worker=True))]
HeartbeatBody = Annotated[Heartbeat, Depends(body_of(Heartbeat, is_of_worker=True))]
PinBody = Annotated[PinRevisions, Depends(body_of(PinRevisions, is_of_worker=True))]
BatchBody = Annotated[
    Batch, Depends(body_of(Batch, lambda settings: settings.max_batch_bytes, is_of_worker=True))
]
CompleteBody = Annotated[Complete, Depends(body_of(Complete, is_of_worker=True))]
FailBody = Annotated[Fail, Depends(body_of(Fail, is_of_worker=True))]
ReleaseBody = Annotated[Release, Depends(body_of(Release, is_of_worker=True))]


@router.post(
    "/claim",
    openapi_extra=schema_of(Claim),
    response_model=Lease,
    responses={204: {"description": "No job is due."}, **FENCED},
)
def claim(runtime: CurrentRuntime, who: Worker, body: ClaimBody) -> Lease | Response:
    """Claim the job that has been in the queue longest of those that the worker can run."""
    if not who.may_act_for(body.node):
        raise PermissionDeniedError(
            f"this key is for workers of node {who.node!r}, and this one says that it is on "
            f"{body.node!r}; make a key for it (dar keys create --scope worker --node …), or "
            "correct DAR_NODE",
            code="wrong_node",
        )
    while True:
        found = _claim_once(runtime, body)
        if found is None:
            return Response(status_code=204)
        if not isinstance(found, str):
            return found
        runtime.notifier.notify(found)


@router.post("/{lease_id}/heartbeat", openapi_extra=schema_of(Heartbeat), responses=FENCED)
def heartbeat(lease_id: LeaseHolder, runtime: CurrentRuntime, body: HeartbeatBody) -> LeaseState:
    """Renew a lease."""
    seconds = runtime.settings.lease_ttl_seconds
    with runtime.database.write() as transaction:
        held = fence.hold(transaction, lease_id, body.attempt)
        if body.progress is not None and body.progress.step > held.job.total_steps:
            raise InvalidRequestError(
                f"the job has {held.job.total_steps} steps, so {body.progress.step} cannot be done",
                param="progress.step",
                code="step_out_of_range",
            )
        leases.renew(transaction, held, timedelta(seconds=seconds), body.progress, body.models)
    return LeaseState(ttl_seconds=seconds)


@router.post("/{lease_id}/revisions", openapi_extra=schema_of(PinRevisions), responses=FENCED)
def pin_revisions(lease_id: LeaseHolder, runtime: CurrentRuntime, body: PinBody) -> RevisionsPinned:
    """Fix the commits of hub models that all attempts of the job use."""
    with runtime.database.write() as transaction:
        held = fence.hold(transaction, lease_id, body.attempt)
        pinned = leases.pin_revisions(transaction, held, body.revisions)
    return RevisionsPinned(revisions=dict(pinned))


@router.get("/{lease_id}/directives", response_model_exclude_none=True, responses=FENCED)
async def get_directives(
    lease_id: LeaseHolder,
    runtime: CurrentRuntime,
    after: Annotated[str, Query(max_length=64)] = "",
    wait: Annotated[float, Query(ge=0, le=MAX_WAIT_SECONDS)] = 20.0,
) -> Directives:
    """Wait for directives to the attempt, or results of its reward requests."""
    received = Received.parse(after)
    job_id, found = await run_in_threadpool(_directives, runtime, lease_id, received)
    if not found:
        await runtime.notifier.wait(job_id, wait, received=received)
        _, found = await run_in_threadpool(_directives, runtime, lease_id, received)
    return Directives(directives=found, cursor=received.plus(found).text)


@router.post(
    "/{lease_id}/batch",
    openapi_extra=schema_of(Batch),
    response_model_exclude_defaults=True,
    responses=FENCED,
)
def append_rows(lease_id: LeaseSender, runtime: CurrentRuntime, body: BatchBody) -> BatchAck:
    """Store rows of a trainer, also those of an attempt that has lost its job."""
    _check_rows(body)
    with runtime.database.write() as transaction:
        held = fence.lock(transaction, lease_id)
        if held.attempt.number != body.attempt:
            raise InvalidRequestError(
                f"lease {lease_id} is of attempt {held.attempt.number}, not {body.attempt}",
                param="attempt",
            )
        _check_steps(body, held.job.total_steps)
        fresh = [row for row in body.rows if row.seq > held.attempt.acked_seq]
        stored = rows.add(transaction, held, body.rows)
        if isinstance(stored, rows.Contradiction):
            _append_contradiction(transaction, held, stored.seq)
        else:
            transaction.after_commit(lambda: runtime.telemetry.take(fresh))
    if isinstance(stored, rows.Contradiction):
        raise ConflictError(
            f"row {stored.seq} was committed before with other content; the spool was altered",
            code="integrity",
        )
    return BatchAck(acked_seq=stored, is_fenced=not fence.is_live(held.attempt, held.job))


@router.post("/{lease_id}/complete", openapi_extra=schema_of(Complete), responses=FENCED)
def complete(lease_id: LeaseHolder, runtime: CurrentRuntime, body: CompleteBody) -> Outcome:
    """End an attempt that trained to the last step, or was stopped."""
    return _ended(runtime, lease_id, body)


@router.post("/{lease_id}/fail", openapi_extra=schema_of(Fail), responses=FENCED)
def fail(lease_id: LeaseHolder, runtime: CurrentRuntime, body: FailBody) -> Outcome:
    """End a failed attempt."""
    return _ended(runtime, lease_id, body)


@router.post("/{lease_id}/release", openapi_extra=schema_of(Release), responses=FENCED)
def release(lease_id: LeaseHolder, runtime: CurrentRuntime, body: ReleaseBody) -> Outcome:
    """Give the job back, or confirm a cancellation or a pause."""
    return _ended(runtime, lease_id, body)


def _ended(runtime: Runtime, lease_id: str, said: Complete | Fail | Release) -> Outcome:
    seconds = runtime.settings.reward_probe_seconds

    def work(transaction: Transaction) -> Outcome:
        job_id = fence.find(transaction, lease_id).job_id
        outcome = outcomes.end(transaction, lease_id, said, seconds)
        if (outcome.status, outcome.status_detail) == ("paused", "reward"):
            transaction.after_commit(lambda: runtime.telemetry.note("reward_pauses"))
        if outcome.status == "queued":
            transaction.after_commit(runtime.waker.wake)
        transaction.after_commit(lambda: runtime.notifier.notify(job_id))
        return outcome

    return runtime.database.transact(work)


def _claim_once(runtime: Runtime, body: Claim) -> Lease | str | None:
    """A lease. If the secrets cannot be read, the job fails and its id is returned.

    None: no job is queued.
    """
    lease_id = new_id("lease-")
    token = keys.new_attempt_token(lease_id)
    ttl = timedelta(seconds=runtime.settings.lease_ttl_seconds)

    def work(transaction: Transaction) -> Lease | str | None:
        credential = leases.Credential(lease_id, keys.digest(token))
        held = leases.claim(transaction, body, credential, ttl)
        if held is None:
            return None
        try:
            access = endpoints.access_of(transaction, runtime, held.job)
        except SecretUnreadableError as error:
            number, code = held.attempt.number, error.error_code
            said = Fail(
                attempt=number, kind="user", code=code, message=error.message, owner="service"
            )
            outcomes.end(transaction, lease_id, said)
            return held.job.id
        request_id = events.request_of(transaction, held.job.id)
        return _lease(runtime, held, token, access, request_id)

    return runtime.database.transact(work)


def _lease(
    runtime: Runtime,
    held: fence.Held,
    token: str,
    access: dict[str, ComponentAccess],
    request_id: str | None,
) -> Lease:
    job, attempt = held.job, held.attempt
    return Lease(
        lease_id=attempt.lease_id,
        job_id=job.id,
        attempt=attempt.number,
        token=token,
        ttl_seconds=runtime.settings.lease_ttl_seconds,
        spec=job.parsed_spec,
        seed=job.seed,
        total_steps=job.total_steps,
        model=ModelSource.model_validate(job.model_source),
        resume_checkpoint_id=attempt.resume_checkpoint_id,
        reward_secret=None,
        rewards=access,
        request_id=request_id,
    )


def _directives(runtime: Runtime, lease_id: str, received: Received) -> tuple[str, list[Directive]]:
    with runtime.database.read() as transaction:
        held = fence.look(transaction, lease_id)
        job, attempt = held.job, held.attempt
        if not fence.is_live(attempt, job):
            raise FencedError(
                f"attempt {attempt.number} no longer holds job {job.id}; stop the trainer"
            )
        # A worker of an earlier version knows only the pause. That would end an attempt without any
        # step before its first checkpoint, so it comes after the first step.
        knows_stop = workers.reports(transaction, attempt)
        is_to_stop = job.stop_requested_at is not None and (knows_stop or job.step > 0)
        is_to_drain = workers.must_drain(transaction, attempt)
        came = reward_requests.results(transaction, held, received.last_result)
    wanted: dict[JobDirective, bool] = {  # the most urgent one first
        "cancel": job.cancel_requested_at is not None,
        "pause": job.status == "pausing",
        "drain": is_to_drain,
        "stop": is_to_stop,
    }
    found: list[Directive] = []
    due = (one for one, applies in wanted.items() if applies and not received.has(one))
    if (first := next(due, None)) is not None:
        kind = "pause" if first == "stop" and not knows_stop else first
        found.append(Directive(id=ONCE[first], type=kind))
    return job.id, found + [
        Directive(id=number, type="reward_result", request_id=request_id, result=body)
        for number, request_id, body in came
    ]


def _check_rows(body: Batch) -> None:
    problems = []
    for index, row in enumerate(body.rows):
        if row.seq != body.rows[0].seq + index:
            message = (
                f"the rows must be consecutive, but {row.seq} follows {body.rows[index - 1].seq}"
            )
            problems.append(Problem(message, f"rows[{index}].seq", "not_consecutive"))
            break
        if isinstance(row, MetricsRow):
            unknown = [name for name in row.values if not is_known(name)]
            problems += [
                Problem(
                    f"there is no metric {name!r}; register it in dar/protocol/metrics.py",
                    f"rows[{index}].values",
                    "unknown_metric",
                )
                for name in unknown
            ]
            if not 0 <= (row.values.get(TOKENS) or 0) <= MAX_EXACT:
                problems.append(
                    Problem("must be a count of tokens", f"rows[{index}].values", "invalid_count")
                )
    if problems:
        raise errors.invalid(problems)


def _check_steps(body: Batch, total_steps: int) -> None:
    """Refuse rows of steps that the job does not have. Only metrics and the like start at 1."""
    problems = [
        Problem(
            f"the job has {total_steps} steps, so there is no step {row.step}",
            f"rows[{index}].step",
            "step_out_of_range",
        )
        for index, row in enumerate(body.rows)
        if row.step is not None and row.step > total_steps
    ]
    if problems:
        raise errors.invalid(problems)


def _append_contradiction(transaction: Transaction, held: fence.Held, seq: int) -> None:
    number = held.attempt.number
    message = f"attempt {number} sent row {seq} again with other content; the first one is kept"
    data = {"kind": "integrity", "attempt": number, "seq": seq}
    events.append(transaction, held.job.id, [events.NewEvent(message, level="error", data=data)])
