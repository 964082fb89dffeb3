"""Jobs: submission, reading, cancelling. Moves between states are `service.store.transitions`' business."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, exists, func, select

from dar.errors import ConflictError, NotFoundError
from dar.protocol.status import JobStatus
from service.store import events, transitions
from service.store.database import Transaction
from service.store.paging import Cursor, Slice, page
from service.store.tables import Job, JobInput

REPLAY_WINDOW = timedelta(minutes=10)
"""How long a retried submission without a key is recognised by its body."""


def get(transaction: Transaction, project_id: str, job_id: str) -> Job:
    """A job of the project.

    Raises:
        NotFoundError: The project has none of that id.
    """
    found = transaction.scalars(
        select(Job).where(Job.project_id == project_id, Job.id == job_id)
    ).one_or_none()
    if found is None:
        raise NotFoundError(
            f"there is no job {job_id!r}; GET /v1/fine_tuning/jobs lists those there are"
        )
    return found


def list_page(
    transaction: Transaction,
    project_id: str,
    cursor: Cursor,
    *,
    status: JobStatus | None = None,
    labels: Mapping[str, str] | None = None,
) -> Slice[Job]:
    """One page of the project's jobs, narrowed to a status and to labels that must all match."""
    statement = select(Job).where(Job.project_id == project_id)
    if status is not None:
        statement = statement.where(Job.status == status)
    for key, value in (labels or {}).items():
        statement = statement.where(_has_label(transaction, key, value))
    return page(transaction, statement, Job.id, (Job.created_at, Job.id), cursor)


def _has_label(transaction: Transaction, key: str, value: str) -> ColumnElement[bool]:
    # A JSON path would need the key quoted, and keys are the user's: compare them as values instead.
    unpack = func.json_each_text if transaction.is_postgresql else func.json_each
    pairs = unpack(Job.labels).table_valued("key", "value")
    return exists(select(1).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value))


def find_by_key(transaction: Transaction, project_id: str, key: str) -> Job | None:
    """The job that was submitted with this ``Idempotency-Key``."""
    return transaction.scalars(
        select(Job).where(Job.project_id == project_id, Job.idempotency_key == key)
    ).one_or_none()


def find_retried(
    transaction: Transaction, api_key_id: str, body_sha256: str, retry_count: int
) -> Job | None:
    """The job that an earlier try of the same request has made, when its reply was lost.

    The OpenAI client never sends a key by itself; what marks its second try is ``x-stainless-retry-count``.
    """
    return transaction.scalars(
        select(Job)
        .where(
            Job.api_key_id == api_key_id,
            Job.body_sha256 == body_sha256,
            Job.created_at > transaction.now - REPLAY_WINDOW,
            Job.retry_count < retry_count,
            Job.idempotency_key.is_(None),
        )
        .order_by(Job.created_at.desc())
        .limit(1)
    ).one_or_none()


def submit(transaction: Transaction, job: Job, inputs: Sequence[str]) -> None:
    """Store a queued job, the checkpoints it starts from, and its first event.

    Raises:
        sqlalchemy.exc.IntegrityError: Another request with the same ``Idempotency-Key`` was faster.
    """
    transaction.add(job)
    transaction.flush()
    transaction.add_all(JobInput(job_id=job.id, checkpoint_id=item) for item in inputs)
    transaction.flush()
    data = {"kind": "status", "status": job.status, "status_detail": None, "attempt": 0}
    events.append(transaction, job.id, [events.NewEvent(job.status_message or "queued", data=data)])


def cancel(transaction: Transaction, project_id: str, job_id: str) -> Job:
    """Cancel a waiting job at once; ask the worker of a running one to stop. Twice is once.

    Raises:
        NotFoundError: The project has none of that id.
        ConflictError: The job has already succeeded or failed.
    """
    get(transaction, project_id, job_id)
    # Locked, so that it cannot get out of the way of one move into the sources of the other.
    job = transaction.scalars(select(Job).where(Job.id == job_id).with_for_update()).one()
    asked = {"cancel_requested_at": transaction.now}
    this = Job.id == job_id
    moved = transitions.move(
        transaction, "cancelled", this, "cancelled before it ran", values=asked
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
    raise ConflictError(
        f"job {job_id} has already {job.status}, so it cannot be cancelled"
        if job.status in {"succeeded", "failed"}
        else f"job {job_id} is {job.status} and cannot be cancelled now"
    )


def count_due(transaction: Transaction, older_than: timedelta) -> int:
    """Queued jobs that have been due for ``older_than`` and that nobody has claimed."""
    return transaction.scalars(
        select(func.count())
        .select_from(Job)
        .where(Job.status == "queued", Job.not_before <= transaction.now - older_than)
    ).one()
