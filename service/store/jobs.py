"""Jobs: submission, reading, and what users ask of them. See `service.store.transitions`."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select

from dar.errors import ConflictError, NotFoundError
from dar.protocol.status import TERMINAL
from service.store import checkpoints, events, files, stops, transitions
from service.store.database import Transaction
from service.store.job_filters import JobFilter
from service.store.paging import Cursor, Slice, page
from service.store.tables import JobInputRow, JobRow

NOT_STARTED = "submitted without being started; start it when it is to run"
"""Message of a job with ``auto_start`` false."""


def get(transaction: Transaction, project_id: str, job_id: str) -> JobRow:
    """A job of the project.

    Raises:
        NotFoundError: The project has no job with this id.
    """
    found = transaction.scalars(
        select(JobRow).where(
            JobRow.project_id == project_id, JobRow.id == job_id, JobRow.deleted_at.is_(None)
        )
    ).one_or_none()
    if found is None:
        raise NotFoundError(
            f"there is no job {job_id!r}; GET /v1/fine_tuning/jobs lists the existing ones"
        )
    return found


def list_page(
    transaction: Transaction, project_id: str, cursor: Cursor, wanted: JobFilter
) -> Slice[JobRow]:
    """One page of the project's jobs that match a filter.

    The cursor may name a job that matched when a client saw it, and does so no longer.
    """
    statement = select(JobRow).where(JobRow.project_id == project_id, JobRow.deleted_at.is_(None))
    keys = (JobRow.created_at, JobRow.id)
    matching = statement.where(*wanted.conditions(transaction))
    return page(transaction, matching, JobRow.id, keys, cursor, edges=statement)


def find_by_key(transaction: Transaction, project_id: str, key: str) -> JobRow | None:
    """The job that was submitted with this ``Idempotency-Key``."""
    return transaction.scalars(
        select(JobRow).where(JobRow.project_id == project_id, JobRow.idempotency_key == key)
    ).one_or_none()


def submit(
    transaction: Transaction,
    job: JobRow,
    inputs: Sequence[str],
    request_id: str | None = None,
) -> None:
    """Store a new job, the checkpoints it starts from, and its first event.

    Raises:
        sqlalchemy.exc.IntegrityError: A concurrent request has used the same ``Idempotency-Key``.
    """
    transaction.add(job)
    transaction.flush()
    transaction.add_all(JobInputRow(job_id=job.id, checkpoint_id=item) for item in inputs)
    transaction.flush()
    data: dict[str, object] = {
        "kind": "status",
        "status": job.status,
        "status_detail": job.status_detail,
        "attempt": 0,
    }
    if request_id is not None:
        data["request_id"] = request_id
    events.append(transaction, job.id, [events.NewEvent(job.status_message or "queued", data=data)])


def cancel(transaction: Transaction, project_id: str, job_id: str) -> JobRow:
    """Cancel a waiting job at once; ask the worker of a running job to stop. Idempotent.

    Raises:
        NotFoundError: The project has no job with this id.
        ConflictError: The job has already succeeded or failed.
    """
    job = locked(transaction, project_id, job_id)
    asked = {"cancel_requested_at": transaction.now}
    this = JobRow.id == job_id
    before = (
        "cancelled before it ran" if job.attempt == 0 else f"cancelled while it was {job.status}"
    )
    moved = transitions.move(
        transaction, "cancelled", this, before, values=asked
    ) or transitions.move(
        transaction, "cancel_requested", this, "waiting for the worker to stop", values=asked
    )
    if moved is not None:
        return moved
    transaction.refresh(job)
    if job.status == "cancelled" or (
        job.cancel_requested_at is not None and job.status == "running"
    ):
        return job
    raise ConflictError(_cannot(job, "cancelled"))


def pause(transaction: Transaction, project_id: str, job_id: str) -> JobRow:
    """Pause a waiting job at once; ask a running job's worker to checkpoint and stop. Idempotent.

    Raises:
        NotFoundError: The project has no job with this id.
        ConflictError: The job is over, or is being cancelled.
    """
    job = locked(transaction, project_id, job_id)
    if job.status in {"pausing", "paused"}:
        return job
    if job.stop_requested_at is not None and job.status == "running":
        raise ConflictError(f"job {job_id} is being stopped, so it cannot be paused")
    this = JobRow.id == job_id
    name: transitions.MoveName = "paused" if job.status == "queued" else "pause_requested"
    message = (
        "paused while it waited; resume it to continue"
        if job.status == "queued"
        else "waiting for the worker to write a checkpoint and to stop"
    )
    if (moved := transitions.move(transaction, name, this, message)) is not None:
        return moved
    if job.cancel_requested_at is not None and job.status == "running":
        raise ConflictError(f"job {job_id} is being cancelled, so it cannot be paused")
    raise ConflictError(_cannot(job, "paused"))


def start(transaction: Transaction, project_id: str, job_id: str) -> JobRow:
    """Queue a job that was submitted without being started. Idempotent.

    Raises:
        NotFoundError: The project has no job with this id.
        ConflictError: The job is over, is being cancelled, or is paused after it has run.
    """
    job = locked(transaction, project_id, job_id)
    if job.cancel_requested_at is not None and job.status == "running":
        raise ConflictError(f"job {job_id} is being cancelled, so it cannot be started")
    if job.status in TERMINAL:
        raise ConflictError(_cannot(job, "started"))
    if job.status not in {"paused", "pausing"}:
        return job
    if job.attempt > 0:
        raise ConflictError(f"job {job_id} has run already; resume it to continue")
    moved = transitions.move(
        transaction,
        "resumed",
        JobRow.id == job_id,
        "waiting for a worker",
        values={"not_before": transaction.now},
    )
    assert moved is not None  # the row is locked
    return moved


def stop(transaction: Transaction, project_id: str, job_id: str) -> JobRow:
    """End a job with the model that it has so far. Idempotent.

    A waiting job ends at once, with its newest checkpoint; a running job's worker is asked to
    finish the step and to write a checkpoint.

    Raises:
        NotFoundError: The project has no job with this id.
        ConflictError: The job is over, is being cancelled, or waits and has no checkpoint.
    """
    job = locked(transaction, project_id, job_id)
    is_asked = job.stop_requested_at is not None and job.cancel_requested_at is None
    if is_asked and job.status in {"queued", "running", "succeeded"}:
        return job
    if job.status in {"queued", "paused"}:
        if (moved := stops.finish(transaction, job)) is not None:
            return moved
        raise ConflictError(
            f"job {job_id} has no checkpoint yet, so there is no model to end with; cancel it"
        )
    message = "waiting for the worker to finish its step and to write a checkpoint"
    if (moved := stops.request(transaction, job, message)) is not None:
        return moved
    if job.status == "running":
        raise ConflictError(f"job {job_id} is being cancelled, so it cannot be stopped")
    raise ConflictError(_cannot(job, "stopped"))


def resume(transaction: Transaction, project_id: str, job_id: str) -> JobRow:
    """Queue a paused, failed or cancelled job again, from its newest checkpoint. Idempotent.

    A job that is still pausing keeps running; if its trainer stops anyway, the job is queued again.

    Raises:
        NotFoundError: The project has no job with this id.
        ConflictError: The job has succeeded or is being cancelled, or a file or checkpoint that it
            needs was deleted.
    """
    job = locked(transaction, project_id, job_id)
    if job.status == "running" and job.cancel_requested_at is not None:
        raise ConflictError(f"job {job_id} is being cancelled; resume it when it is cancelled")
    name = _RESUMING.get(job.status)
    if name is None:
        if job.status == "succeeded":
            raise ConflictError(_cannot(job, "resumed"))
        return job
    values: dict[str, Any] = {"reward_waits": 0}
    if name != "pause_withdrawn":
        values["not_before"] = transaction.now
    if name == "restarted":
        _check_needs(transaction, job)
        values |= {"cancel_requested_at": None, "failed_attempts": 0, "fruitless_attempts": 0}
        values["stop_requested_at"] = None
        values["counts_from"] = job.attempt + 1
    moved = transitions.move(transaction, name, JobRow.id == job_id, "resumed", values=values)
    assert moved is not None  # the row is locked
    return moved


_RESUMING: Mapping[str, transitions.MoveName] = {
    "paused": "resumed",
    "pausing": "pause_withdrawn",
    "failed": "restarted",
    "cancelled": "restarted",
}
"""Status -> the move that resumes the job; a job in any other status is left alone."""


def _check_needs(transaction: Transaction, job: JobRow) -> None:
    """Keep what a finished job needs to run again.

    Raises:
        ConflictError: A file, or a checkpoint of its model, was deleted.
    """
    names = [job.training_file, job.parsed_spec.validation_file]
    needed = {name for name in names if name}
    gone = needed - files.keep(transaction, needed)
    if gone:
        raise ConflictError(
            f"job {job.id} cannot be resumed: its file {min(gone)} has been deleted; submit a new job",
            code="file_not_found",
        )
    # Of a checkpoint whose job was deleted, the job's inputs have no row any more.
    source = job.model_source
    ids = [source.get("checkpoint_id"), *source.get("adapter_ids", ())]
    if not checkpoints.keep(transaction, [name for name in ids if name]):
        raise ConflictError(
            f"job {job.id} cannot be resumed: the checkpoints that its model is made of are no "
            "longer kept",
            code="model_not_found",
        )


def locked(transaction: Transaction, project_id: str, job_id: str) -> JobRow:
    """A job of the project, locked, so that its status cannot change between two moves."""
    get(transaction, project_id, job_id)
    found = transaction.scalars(
        select(JobRow)
        .where(JobRow.id == job_id, JobRow.deleted_at.is_(None))
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one_or_none()
    return get(transaction, project_id, job_id) if found is None else found


def _cannot(job: JobRow, what: str) -> str:
    if job.status in TERMINAL:
        status = job.status.replace("cancelled", "been cancelled")
        return f"job {job.id} has already {status}, so it cannot be {what}"
    return f"job {job.id} is {job.status} and cannot be {what} now"


def count_by_status(transaction: Transaction) -> dict[str, int]:
    """Number of jobs by status; a status without jobs is left out."""
    counts = select(JobRow.status, func.count()).where(JobRow.deleted_at.is_(None))
    rows = transaction.execute(counts.group_by(JobRow.status)).all()
    return {status: count for status, count in rows}  # noqa: C416 - `dict(rows)` has no type that fits
