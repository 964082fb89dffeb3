"""What a user deletes: jobs that have ended, checkpoints, and models that jobs have made.

A deletion only marks: the job with ``deleted_at``, its checkpoints with the status ``deleting``.
From then on no user sees them. The service's background threads remove the files, then the rows.
Each step can be repeated, so a crash between two of them loses nothing and leaves nothing.
"""

from sqlalchemy import ColumnElement, func, select, update

from dar.errors import ConflictError, NotFoundError
from dar.protocol.status import TERMINAL
from service.store import checkpoints, events, jobs, promotions
from service.store.database import Transaction
from service.store.tables import CheckpointRow, JobInputRow, JobRow


def mark_job(transaction: Transaction, project_id: str, job_id: str) -> None:
    """Delete a job that has ended, with all that belongs to it.

    Raises:
        NotFoundError: The project has no job with this id.
        ConflictError: It has not ended (``job_not_ended``), or one of its checkpoints is pinned or
            promoted, or another unfinished job starts from one (``checkpoint_in_use``).
    """
    job = jobs.locked(transaction, project_id, job_id)
    if job.status not in TERMINAL:
        raise ConflictError(
            f"job {job_id} is {job.status}, and only a job that has ended can be deleted; cancel it "
            "first, or wait for its end",
            code="job_not_ended",
        )
    kept = transaction.scalars(
        select(CheckpointRow)
        .where(CheckpointRow.job_id == job_id, checkpoints.is_kept_by_user())
        .order_by(CheckpointRow.id)
        .limit(1)
    ).one_or_none()
    if kept is not None:
        raise _kept_by_user(transaction, kept)
    _mark(transaction, CheckpointRow.job_id == job_id)
    transaction.execute(
        update(JobRow)
        .where(JobRow.id == job_id)
        .values(deleted_at=transaction.now, idempotency_key=None)
        .execution_options(synchronize_session=False)
    )


def mark_checkpoint(
    transaction: Transaction,
    project_id: str,
    job_id: str,
    checkpoint_id: str,
    *,
    has_expired: bool = False,
) -> None:
    """Delete a checkpoint, because a user says so or because its time is over.

    Raises:
        NotFoundError: The job has no such checkpoint.
        ConflictError: It is pinned or promoted, its own job has not ended and would resume from it,
            or another unfinished job starts from it (``checkpoint_in_use``).
    """
    job = jobs.locked(transaction, project_id, job_id)
    found = checkpoints.stored(transaction, job_id, checkpoint_id)
    newest = checkpoints.newest(transaction, job_id)
    if job.status not in TERMINAL and newest is not None and newest.id == checkpoint_id:
        raise ConflictError(
            f"job {job_id} is {job.status} and would resume from checkpoint {checkpoint_id}, its "
            "newest; cancel the job first, or delete an older checkpoint",
            code="checkpoint_in_use",
        )
    if found.is_pinned:
        raise _kept_by_user(transaction, found)
    this = CheckpointRow.id == checkpoint_id
    _mark(transaction, this)
    # It is locked now, so nobody can pin it or take back its end any more.
    transaction.refresh(found)
    if found.is_pinned:
        raise _kept_by_user(transaction, found)
    if has_expired and (found.expires_at is None or found.expires_at > transaction.now):
        raise ConflictError(f"checkpoint {checkpoint_id} of job {job_id} has not expired")
    checkpoints.point_to(transaction, job, checkpoints.newest(transaction, job_id))
    kind, what = "checkpoint_deleted", "was deleted by a user"
    if has_expired:
        kind, what = "checkpoint_expired", "has expired and is removed"
    message = f"checkpoint of step {found.step} {what}"
    data = {"kind": kind, "checkpoint_id": checkpoint_id, "step": found.step}
    events.append(transaction, job_id, [events.NewEvent(message, data=data)])


def _kept_by_user(transaction: Transaction, checkpoint: CheckpointRow) -> ConflictError:
    """The error about a checkpoint that is pinned or promoted."""
    why = "is pinned; unpin it first"
    if not checkpoint.is_pinned:
        names = promotions.names_of(transaction, [checkpoint.id])[checkpoint.id]
        why = (
            f"is the model {', '.join(map(repr, names))}; promote another checkpoint to that name, "
            "or delete the model, first"
        )
    return ConflictError(
        f"checkpoint {checkpoint.id} of job {checkpoint.job_id} {why}", code="checkpoint_in_use"
    )


def mark_model(transaction: Transaction, project_id: str, name: str) -> None:
    """Delete the checkpoints that a model's name stands for.

    Raises:
        NotFoundError: No job of the project has made such a model.
        ConflictError: An unfinished job needs one of them (``checkpoint_in_use``).
    """
    found = list(checkpoints.models(transaction, project_id, name=name))
    if not found:
        raise NotFoundError(f"there is no model {name!r}; GET /v1/models lists the existing ones")
    while found:  # several attempts of a job may have made checkpoints of one name
        for _, checkpoint, job in found:
            mark_checkpoint(transaction, project_id, job.id, checkpoint.id)
        found = list(checkpoints.models(transaction, project_id, name=name))


def _mark(transaction: Transaction, which: ColumnElement[bool]) -> None:
    """Mark checkpoints for removal that are not promoted and that no unfinished job starts from.

    Raises:
        ConflictError: One of them is promoted, or such a job starts from it.
    """
    # A concurrent submission locks the checkpoints that its job starts from, and a promotion the
    # one that it names. Once these locks are granted, both are visible to the next statements.
    locked = transaction.scalars(
        select(CheckpointRow.id).where(which).order_by(CheckpointRow.id).with_for_update()
    ).all()
    promoted = transaction.scalars(
        select(CheckpointRow).where(which, promotions.is_promoted()).order_by(CheckpointRow.id)
    ).first()
    if promoted is not None:
        raise _kept_by_user(transaction, promoted)
    needed_by = transaction.scalars(
        select(func.min(JobInputRow.job_id))
        .join(CheckpointRow, CheckpointRow.id == JobInputRow.checkpoint_id)
        .join(JobRow, JobRow.id == JobInputRow.job_id)
        .where(which, JobRow.status.not_in(list(TERMINAL)))
    ).one()
    if needed_by is not None:
        raise ConflictError(
            f"job {needed_by} starts from it; cancel that job or wait until it has ended",
            code="checkpoint_in_use",
        )
    if locked:
        transaction.execute(
            update(CheckpointRow)
            .where(which, CheckpointRow.status.in_(["available", "pending"]))
            .values(status="deleting")
            .execution_options(synchronize_session=False)
        )
        transaction.expire_all()
