"""Checkpoints: announced, then available, then removed."""

from collections.abc import Iterator, Sequence

from sqlalchemy import ColumnElement, Select, and_, func, or_, select, update
from sqlalchemy.orm import defer

from dar.errors import ConflictError, NotFoundError
from dar.protocol.checkpoints import Manifest
from dar.protocol.ids import new_id
from dar.protocol.status import TERMINAL
from service.store import events, poison
from service.store.database import Transaction
from service.store.paging import Cursor, Slice, page
from service.store.tables import AttemptRow, CheckpointRow, JobInputRow, JobRow


def find(transaction: Transaction, job_id: str, checkpoint_id: str) -> CheckpointRow | None:
    """A checkpoint of a job in any status, or None."""
    return transaction.scalars(
        select(CheckpointRow).where(
            CheckpointRow.job_id == job_id, CheckpointRow.id == checkpoint_id
        )
    ).one_or_none()


def get(transaction: Transaction, job_id: str, checkpoint_id: str) -> CheckpointRow:
    """An available checkpoint of a job.

    Raises:
        NotFoundError: The job has no available checkpoint with this id.
    """
    found = find(transaction, job_id, checkpoint_id)
    if found is None or found.status != "available":
        raise NotFoundError(
            f"job {job_id} has no checkpoint {checkpoint_id!r}; its checkpoints route lists those "
            "it has"
        )
    return found


def list_page(transaction: Transaction, job_id: str, cursor: Cursor) -> Slice[CheckpointRow]:
    """One page of a job's available checkpoints."""
    return page(
        transaction,
        select(CheckpointRow).where(
            CheckpointRow.job_id == job_id, CheckpointRow.status == "available"
        ),
        CheckpointRow.id,
        (CheckpointRow.step, CheckpointRow.attempt),
        cursor,
    )


def keep(transaction: Transaction, ids: Sequence[str]) -> bool:
    """Keep checkpoints until the transaction ends. Returns whether all of them are available."""
    kept = transaction.scalars(
        select(CheckpointRow.id)
        .where(CheckpointRow.id.in_(ids), CheckpointRow.status == "available")
        .order_by(CheckpointRow.id)
        .with_for_update(read=True)
    ).all()
    return len(kept) == len(set(ids))


def newest(transaction: Transaction, job_id: str) -> CheckpointRow | None:
    """The checkpoint that the next attempt resumes from."""
    return transaction.scalars(
        select(CheckpointRow)
        .where(CheckpointRow.job_id == job_id, CheckpointRow.status == "available")
        .order_by(CheckpointRow.step.desc(), CheckpointRow.attempt.desc())
        .limit(1)
    ).one_or_none()


def trained_tokens(checkpoint: CheckpointRow) -> int:
    """Completion tokens that were trained on up to a checkpoint."""
    return int(checkpoint.manifest["metrics"].get("train/tokens") or 0)


def by_ids(transaction: Transaction, ids: Sequence[str]) -> dict[str, CheckpointRow]:
    """Checkpoints by id."""
    rows = transaction.scalars(select(CheckpointRow).where(CheckpointRow.id.in_(ids))).all()
    return {row.id: row for row in rows}


def models(
    transaction: Transaction, project_id: str, *, name: str | None = None, limit: int | None = None
) -> Iterator[tuple[str, CheckpointRow, JobRow]]:
    """A project's models, each with its checkpoint and job: results of jobs, then checkpoints.

    Of checkpoints with the same name only the newest counts.

    Args:
        transaction: Where they are read.
        project_id: Their project.
        name: Only models of this name.
        limit: At most this many results, and at most this many checkpoints.
    """
    # Neither manifest nor spec says where a model comes from.
    available = (
        select(CheckpointRow, JobRow)
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(JobRow.project_id == project_id, CheckpointRow.status == "available")
        .options(defer(CheckpointRow.manifest), defer(JobRow.spec))
        .limit(limit)
    )
    results = available.where(
        JobRow.status == "succeeded", CheckpointRow.id == JobRow.latest_checkpoint_id
    ).order_by(JobRow.created_at.desc(), JobRow.id.desc())
    if name is not None:
        results = results.where(JobRow.model_name == name)
        available = available.where(CheckpointRow.name == name)
    for checkpoint, job in transaction.execute(results).all():
        yield job.model_name, checkpoint, job
    newest_first = available.order_by(CheckpointRow.created_at.desc(), CheckpointRow.id.desc())
    seen: set[str] = set()
    for checkpoint, job in transaction.execute(newest_first).all():
        if checkpoint.name not in seen:
            seen.add(checkpoint.name)
            yield checkpoint.name, checkpoint, job


def register(
    transaction: Transaction, job: JobRow, attempt: AttemptRow, manifest: Manifest, sha256: str
) -> CheckpointRow:
    """Store an announced checkpoint, or return it if it was announced before.

    Raises:
        ConflictError: Rows from before the checkpoint are missing (``spool_behind``), or the
            attempt has announced another checkpoint at this step (``checkpoint_mismatch``).
    """
    if attempt.acked_seq < manifest.last_seq:
        raise ConflictError(
            f"the checkpoint was written after row {manifest.last_seq}, but {attempt.acked_seq} is "
            "the last one committed; send the rows first",
            code="spool_behind",
        )
    found = transaction.scalars(
        select(CheckpointRow).where(
            CheckpointRow.job_id == job.id,
            CheckpointRow.attempt == attempt.number,
            CheckpointRow.step == manifest.step,
        )
    ).one_or_none()
    if found is not None:
        if found.manifest_sha256 != sha256:
            raise ConflictError(
                f"attempt {attempt.number} has announced another checkpoint at step "
                f"{manifest.step}",
                code="checkpoint_mismatch",
            )
        return found
    checkpoint = CheckpointRow(
        id=new_id("ckpt-"),
        job_id=job.id,
        attempt=attempt.number,
        step=manifest.step,
        name=f"{job.model_name}-step-{manifest.step}",
        status="pending",
        kind=manifest.kind,
        bytes=sum(file.bytes for file in manifest.files),
        manifest=manifest.model_dump(mode="json"),
        manifest_bytes=0,
        manifest_sha256=sha256,
        created_at=transaction.now,
    )
    transaction.add(checkpoint)
    transaction.flush()
    return checkpoint


def publish(
    transaction: Transaction, job: JobRow, checkpoint: CheckpointRow, manifest_bytes: int
) -> None:
    """Make a verified checkpoint available, and let the job resume from it."""
    published = transaction.execute(
        update(CheckpointRow)
        .where(CheckpointRow.id == checkpoint.id, CheckpointRow.status == "pending")
        .values(status="available", manifest_bytes=manifest_bytes)
        .returning(CheckpointRow.id)
    ).one_or_none()
    if published is None:
        return
    transaction.execute(
        update(JobRow).where(JobRow.id == job.id).values(latest_checkpoint_id=checkpoint.id)
    )
    poison.note_progress(transaction, job.id, checkpoint.attempt, checkpoint.step)
    data = {
        "kind": "checkpoint",
        "checkpoint_id": checkpoint.id,
        "step": checkpoint.step,
        "attempt": checkpoint.attempt,
        "bytes": checkpoint.bytes,
        "fine_tuned_model_checkpoint": checkpoint.name,
    }
    message = f"checkpoint of step {checkpoint.step} is available"
    events.append(transaction, job.id, [events.NewEvent(message, data=data)])


def is_any_to_remove(transaction: Transaction) -> bool:
    """Whether there is a checkpoint to mark for removal, or to remove. Writes and locks nothing."""
    superseded = CheckpointRow.id.in_(_superseded())
    abandoned = and_(CheckpointRow.status == "pending", _is_abandoned())
    found = select(CheckpointRow.id).where(
        or_(CheckpointRow.status == "deleting", superseded, abandoned)
    )
    return transaction.scalars(found.limit(1)).first() is not None


def _superseded() -> Select[tuple[str]]:
    """Ids of all but each job's ``keep_last`` newest checkpoints.

    The newest checkpoint of a job, and those that an unfinished job starts from, are left out.
    """
    rank = (
        func.row_number()
        .over(
            partition_by=CheckpointRow.job_id,
            order_by=(CheckpointRow.step.desc(), CheckpointRow.attempt.desc()),
        )
        .label("rank")
    )
    ranked = (
        select(CheckpointRow.id, CheckpointRow.job_id, rank)
        .where(CheckpointRow.status == "available")
        .subquery()
    )
    needed = (
        select(JobInputRow.checkpoint_id)
        .join(JobRow, JobRow.id == JobInputRow.job_id)
        .where(JobRow.status.not_in(list(TERMINAL)))
        .correlate(None)
    )
    return (
        select(ranked.c.id)
        .join(JobRow, JobRow.id == ranked.c.job_id)
        .where(ranked.c.rank > JobRow.keep_last, ranked.c.id.not_in(needed))
    )


def mark_superseded(transaction: Transaction) -> int:
    """Mark superseded checkpoints for removal; returns how many."""
    superseded = _superseded()
    # A concurrent submission locks the checkpoints that its job starts from. Once these locks are
    # granted, the job is visible to the second statement.
    locked = transaction.scalars(
        select(CheckpointRow.id)
        .where(CheckpointRow.id.in_(superseded))
        .order_by(CheckpointRow.id)
        .with_for_update()
    ).all()
    marked = transaction.scalars(
        update(CheckpointRow)
        .where(
            CheckpointRow.status == "available",
            CheckpointRow.id.in_(locked),
            CheckpointRow.id.in_(superseded),
        )
        .values(status="deleting")
        .returning(CheckpointRow.id)
        .execution_options(synchronize_session=False)
    ).all()
    return len(marked)


def _is_abandoned() -> ColumnElement[bool]:
    """Whether the attempt that writes a checkpoint has ended."""
    return (
        select(AttemptRow.number)
        .where(
            AttemptRow.job_id == CheckpointRow.job_id,
            AttemptRow.number == CheckpointRow.attempt,
            AttemptRow.status != "running",
        )
        .exists()
    )


def mark_abandoned(transaction: Transaction) -> int:
    """Mark for removal the unfinished uploads of ended attempts; returns how many."""
    marked = transaction.scalars(
        update(CheckpointRow)
        .where(CheckpointRow.status == "pending", _is_abandoned())
        .values(status="deleting")
        .returning(CheckpointRow.id)
        .execution_options(synchronize_session=False)
    ).all()
    return len(marked)


def to_remove(transaction: Transaction) -> Sequence[CheckpointRow]:
    """Checkpoints that are marked for removal."""
    return transaction.scalars(
        select(CheckpointRow).where(CheckpointRow.status == "deleting")
    ).all()


def mark_removed(transaction: Transaction, checkpoint_id: str) -> None:
    """Note that the files of a checkpoint were removed."""
    transaction.execute(
        update(CheckpointRow)
        .where(CheckpointRow.id == checkpoint_id, CheckpointRow.status == "deleting")
        .values(status="deleted")
    )
