"""Jobs: check, submit, copy, read, change, cancel, pause, stop, resume, delete."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Response
from starlette.concurrency import run_in_threadpool

from dar.protocol.base import MAX_COUNT, Deleted, Page
from dar.protocol.job_config import ForkJob, JobConfig, UpdateJob
from dar.protocol.job_validation import JobValidation
from dar.protocol.jobs import Job, JobError, Progress
from dar.protocol.spec import JobSpec
from dar.protocol.status import TERMINAL
from service.api.job_filters import WantedJobs
from service.api.paging import PageCursor, envelope, seconds
from service.http import errors
from service.http.auth import Reader, Submitter
from service.http.bodies import body_of, schema_of
from service.jobs import copies, ingredients, submission, validation
from service.runtime import CurrentRuntime
from service.store import deletion, job_changes, jobs, pace, tables

PATH = "/v1/fine_tuning/jobs"
router = APIRouter(prefix=PATH, tags=["jobs"])
ACTIONS: Mapping[str, Sequence[str]] = {
    "queued": ["cancel", "pause"],
    "running": ["cancel", "pause"],
    "pausing": ["cancel", "resume"],
    "paused": ["cancel", "resume"],
    "succeeded": [],
    "failed": ["resume"],
    "cancelled": ["resume"],
}
"""Status -> requests that the job accepts."""
Spec = Annotated[JobSpec, Depends(body_of(JobSpec))]
Changes = Annotated[UpdateJob, Depends(body_of(UpdateJob))]
Fork = Annotated[ForkJob, Depends(body_of(ForkJob, is_optional=True))]
IfMatch = Annotated[str | None, Header(min_length=1, max_length=200)]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]
RetryCount = Annotated[int, Header(alias="x-stainless-retry-count", ge=0, le=MAX_COUNT)]


@router.post("", openapi_extra=schema_of(JobSpec), responses=errors.may_answer(409, 429))
async def create_job(
    response: Response,
    runtime: CurrentRuntime,
    user: Submitter,
    spec: Spec,
    idempotency_key: IdempotencyKey = None,
    retry_count: RetryCount = 0,
) -> Job:
    """Submit a job after probing its reward services.

    A request with the ``Idempotency-Key`` of an earlier one returns the earlier job, with the
    header ``Idempotency-Replayed: true``. Without a key, a client's retry does so too, recognised
    by its ``x-stainless-retry-count`` and body, with ``Idempotency-Replayed: inferred``.
    """
    submitted = await submission.submit(
        runtime, user, spec, idempotency_key=idempotency_key, retry_count=retry_count
    )
    return _answer(response, submitted)


@router.post("/validate", openapi_extra=schema_of(JobSpec))
async def validate_job(runtime: CurrentRuntime, user: Submitter, spec: Spec) -> JobValidation:
    """Check a job without submitting it, with a short probe of its reward services.

    The answer has every problem that a submission would be refused for, the resolved spec, and what
    the job would take. A body that is no spec at all is a 400, as at a submission.
    """
    return await validation.validate(runtime, user, spec)


@router.get("")
def list_jobs(
    runtime: CurrentRuntime, user: Reader, cursor: PageCursor, wanted: WantedJobs
) -> Page[Job]:
    """The project's jobs, newest first; ``metadata[key]=value`` filters by label.

    All filters must match. A page is stable while jobs are submitted: it starts after or before a
    job, not at a number.
    """
    with runtime.database.read() as transaction:
        found = jobs.list_page(transaction, user.project_id, cursor, wanted)
    return envelope(found, show, lambda job: job.id)


@router.get("/{job_id}")
def get_job(job_id: str, response: Response, runtime: CurrentRuntime, user: Reader) -> Job:
    """One job. The header ``ETag`` is that of its labels and limits, for ``If-Match``."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
    response.headers["etag"] = job_changes.etag_of(job)
    return show(job)


@router.patch(
    "/{job_id}", openapi_extra=schema_of(UpdateJob), responses=errors.may_answer(409, 412)
)
def update_job(
    job_id: str,
    response: Response,
    runtime: CurrentRuntime,
    user: Submitter,
    changes: Changes,
    if_match: IfMatch = None,
) -> Job:
    """Change the labels of a job, or the limits of one that has not ended.

    With ``If-Match`` it is changed only if labels and limits are still those of that ``ETag``.
    """
    with runtime.database.write() as transaction:
        job = job_changes.update_job(transaction, user.project_id, job_id, changes, if_match)
        transaction.after_commit(lambda: runtime.notifier.notify(job_id))
    response.headers["etag"] = job_changes.etag_of(job)
    return show(job)


@router.get("/{job_id}/config")
def get_job_config(job_id: str, runtime: CurrentRuntime, user: Reader) -> JobConfig:
    """What a job is made of: its resolved spec, and hashes of the code, the data and the model."""
    with runtime.database.read() as transaction:
        return ingredients.config_of(jobs.get(transaction, user.project_id, job_id))


@router.post("/{job_id}/fork", openapi_extra=schema_of(ForkJob), responses=errors.may_answer(409))
async def fork_job(
    job_id: str,
    response: Response,
    runtime: CurrentRuntime,
    user: Submitter,
    wanted: Fork,
    idempotency_key: IdempotencyKey = None,
    retry_count: RetryCount = 0,
) -> Job:
    """Submit a job that starts from a checkpoint of another one, with changed settings.

    It begins at step 0 with the weights of the checkpoint, a new optimizer, and the checkpoint as
    its reference.
    """
    # The job that a repeated request has made stays its answer, whatever became of the other one.
    request = submission.JobRequest(
        user, copies.fork_digest(job_id, wanted), idempotency_key, retry_count
    )
    if (earlier := await run_in_threadpool(submission.replayed, runtime, request)) is not None:
        return _answer(response, earlier)
    spec, copy = await run_in_threadpool(copies.fork, runtime, user, job_id, wanted)
    submitted = await submission.submit(
        runtime, user, spec, idempotency_key=idempotency_key, retry_count=retry_count, copy=copy
    )
    return _answer(response, submitted)


@router.post("/{job_id}/rerun", responses=errors.may_answer(409))
async def rerun_job(
    job_id: str,
    response: Response,
    runtime: CurrentRuntime,
    user: Submitter,
    idempotency_key: IdempotencyKey = None,
    retry_count: RetryCount = 0,
) -> Job:
    """Submit an ended job once more: the same spec, seed and model.

    The earlier job stays as it is, with its attempts; ``origin`` of the new one names it.
    """
    # The job that a repeated request has made stays its answer, whatever became of the other one.
    request = submission.JobRequest(user, copies.rerun_digest(job_id), idempotency_key, retry_count)
    if (earlier := await run_in_threadpool(submission.replayed, runtime, request)) is not None:
        return _answer(response, earlier)
    spec, copy = await run_in_threadpool(copies.rerun, runtime, user, job_id)
    submitted = await submission.submit(
        runtime, user, spec, idempotency_key=idempotency_key, retry_count=retry_count, copy=copy
    )
    return _answer(response, submitted)


@router.post("/{job_id}/cancel", responses=errors.may_answer(409))
def cancel_job(job_id: str, runtime: CurrentRuntime, user: Submitter) -> Job:
    """Cancel a job: at once if it waits, within seconds if it runs. Checkpoints are kept."""
    with runtime.database.write() as transaction:
        job = jobs.cancel(transaction, user.project_id, job_id)
        transaction.after_commit(lambda: runtime.notifier.notify(job_id))
    return show(job)


@router.post("/{job_id}/pause", responses=errors.may_answer(409))
def pause_job(job_id: str, runtime: CurrentRuntime, user: Submitter) -> Job:
    """Pause a job: at once if it waits; if it runs, after a checkpoint of its current step."""
    with runtime.database.write() as transaction:
        job = jobs.pause(transaction, user.project_id, job_id)
        transaction.after_commit(lambda: runtime.notifier.notify(job_id))
    return show(job)


@router.post("/{job_id}/start", responses=errors.may_answer(409))
def start_job(job_id: str, runtime: CurrentRuntime, user: Submitter) -> Job:
    """Queue a job that was submitted with ``auto_start: false``."""
    with runtime.database.write() as transaction:
        job = jobs.start(transaction, user.project_id, job_id)
        transaction.after_commit(runtime.waker.wake)
        transaction.after_commit(lambda: runtime.notifier.notify(job_id))
    return show(job)


@router.post("/{job_id}/stop", responses=errors.may_answer(409))
def stop_job(job_id: str, runtime: CurrentRuntime, user: Submitter) -> Job:
    """End a job successfully with the model that it has so far.

    A running job finishes its step and writes a checkpoint first; a waiting one ends at once with
    its newest checkpoint.
    """
    with runtime.database.write() as transaction:
        job = jobs.stop(transaction, user.project_id, job_id)
        transaction.after_commit(lambda: runtime.notifier.notify(job_id))
    return show(job)


@router.post("/{job_id}/resume", responses=errors.may_answer(409))
def resume_job(job_id: str, runtime: CurrentRuntime, user: Submitter) -> Job:
    """Queue a paused, failed or cancelled job again, from its newest checkpoint."""
    with runtime.database.write() as transaction:
        job = jobs.resume(transaction, user.project_id, job_id)
        transaction.after_commit(runtime.waker.wake)
        transaction.after_commit(lambda: runtime.notifier.notify(job_id))
    return show(job)


@router.delete("/{job_id}", responses=errors.may_answer(409))
def delete_job(job_id: str, runtime: CurrentRuntime, user: Submitter) -> Deleted:
    """Delete a job that has ended, with its checkpoints, model, events, metrics and samples."""
    with runtime.database.write() as transaction:
        deletion.mark_job(transaction, user.project_id, job_id)
    return Deleted(id=job_id, object="fine_tuning.job", deleted=True)


def _answer(response: Response, submitted: submission.Submitted) -> Job:
    response.headers["location"] = f"{PATH}/{submitted.job.id}"
    if submitted.replay is not None:
        response.headers["idempotency-replayed"] = submitted.replay
    return show(submitted.job)


def show(job: tables.JobRow) -> Job:
    spec = job.parsed_spec
    method = spec.method.model_dump(mode="json")
    is_over = job.status in TERMINAL
    path = f"{PATH}/{job.id}"
    belongings = ("config", "events", "metrics", "samples", "checkpoints")
    return Job.model_validate(
        {
            "id": job.id,
            "object": "fine_tuning.job",
            "created_at": seconds(job.created_at),
            "started_at": seconds(job.started_at) if job.started_at else None,
            "finished_at": seconds(job.finished_at) if job.finished_at else None,
            "estimated_finish": _estimated_finish(job),
            "status": job.status,
            "status_detail": job.status_detail,
            "status_message": job.status_message,
            "model": job.model,
            "fine_tuned_model": job.model_name if job.status == "succeeded" else None,
            "best_checkpoint": job.best_checkpoint_id,
            "training_file": spec.training_file,
            "validation_file": spec.validation_file,
            "result_files": [],
            "organization_id": job.project_id,
            "seed": job.seed,
            "suffix": job.suffix,
            "metadata": job.labels,
            "hyperparameters": method["dar"]["hyperparameters"],
            "method": method,
            "integrations": None,
            "trained_tokens": job.tokens if job.started_at or is_over else None,
            "error": JobError.model_validate(job.error) if job.error else None,
            "attempt": job.attempt,
            "failures": job.failures or {},
            "progress": _progress(job),
            "forecast": job.forecast,
            "origin": job.origin,
            "etag": job_changes.etag_of(job),
            "usage": {"tokens": job.tokens, "reward_calls": job.reward_calls},
            "actions": _actions(job),
            "is_stoppable": _is_stoppable(job),
            "is_startable": job.status == "paused" and job.attempt == 0,
            "links": {"self": path} | {name: f"{path}/{name}" for name in belongings},
        }
    )


def _actions(job: tables.JobRow) -> Sequence[str]:
    if job.cancel_requested_at and job.status not in TERMINAL:
        return []
    if job.stop_requested_at and job.status == "running":
        return ["cancel"]
    return ACTIONS[job.status]


def _is_stoppable(job: tables.JobRow) -> bool:
    if job.cancel_requested_at or job.stop_requested_at:
        return False
    if job.status in {"queued", "paused"}:
        return job.latest_checkpoint_id is not None
    return job.status in {"running", "pausing"}


def _progress(job: tables.JobRow) -> Progress:
    return Progress(
        step=job.step,
        total_steps=job.total_steps,
        percent=round(100 * job.step / job.total_steps, 1),
        tokens=job.tokens,
        calibration_completions=(job.forecast or {}).get("spent_completions", 0),
        calibration_tokens=(job.forecast or {}).get("spent_tokens", 0),
    )


def _estimated_finish(job: tables.JobRow) -> int | None:
    found = pace.estimated_finish(job, datetime.now(UTC))
    return None if found is None else int(found)
