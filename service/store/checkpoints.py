"""Checkpoints: announced, then available, then removed."""

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Select, and_, func, or_, select, update
from sqlalchemy.orm import aliased, defer

from dar.errors import ConflictError, NotFoundError
from dar.protocol.checkpoints import MANIFEST_NAME, Manifest, ManifestFile
from dar.protocol.events import Level
from dar.protocol.ids import new_id
from dar.protocol.status import TERMINAL
from service.store import best_checkpoint, events, poison, promotions
from service.store.best_checkpoint import Standing
from service.store.database import Transaction
from service.store.fence import Held
from service.store.paging import Cursor, Slice, page
from service.store.tables import (
    AttemptRow,
    CheckpointRow,
    JobInputRow,
    JobRow,
    ModelAliasRow,
)

UNMEASURED = Standing()
KEPT_DAMAGED = timedelta(days=7)
"""How long a damaged checkpoint is kept for inspection, once the job has a newer whole one."""


def is_kept_by_user() -> ColumnElement[bool]:
    """Whether a checkpoint is stored, whole or damaged, and pinned or promoted."""
    is_kept = or_(CheckpointRow.is_pinned, promotions.is_promoted())
    return and_(CheckpointRow.status == "available", is_kept)


def files_of(checkpoint: CheckpointRow) -> list[ManifestFile]:
    """Name, size and digest of each file, including the manifest."""
    own = ManifestFile(
        name=MANIFEST_NAME, bytes=checkpoint.manifest_bytes, sha256=checkpoint.manifest_sha256
    )
    return [*(ManifestFile.model_validate(file) for file in checkpoint.manifest["files"]), own]


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
        ConflictError: It is damaged (``checkpoint_damaged``).
    """
    found = stored(transaction, job_id, checkpoint_id)
    if found.damage is not None:
        raise damaged(transaction, found)
    return found


def stored(transaction: Transaction, job_id: str, checkpoint_id: str) -> CheckpointRow:
    """An available checkpoint of a job, whole or damaged.

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


def pin(transaction: Transaction, checkpoint: CheckpointRow, *, is_pinned: bool) -> None:
    """Keep a whole checkpoint until it is unpinned, or leave any to the job's rules again.

    Raises:
        NotFoundError: It is being removed.
    """
    changed = transaction.execute(
        update(CheckpointRow)
        .where(
            CheckpointRow.id == checkpoint.id,
            CheckpointRow.is_whole if is_pinned else CheckpointRow.status == "available",
        )
        .values(is_pinned=is_pinned)
        .returning(CheckpointRow.id)
    ).one_or_none()
    if changed is None:
        raise NotFoundError(f"checkpoint {checkpoint.id} is no longer kept")


def set_expiry(
    transaction: Transaction, checkpoint: CheckpointRow, expires_at: datetime | None
) -> None:
    """Let a checkpoint be removed at a time; None: not for its age.

    Raises:
        NotFoundError: It is being removed.
    """
    changed = transaction.execute(
        update(CheckpointRow)
        .where(CheckpointRow.id == checkpoint.id, CheckpointRow.status == "available")
        .values(expires_at=expires_at)
        .returning(CheckpointRow.id)
    ).one_or_none()
    if changed is None:
        raise NotFoundError(f"checkpoint {checkpoint.id} is no longer kept")


def damaged(transaction: Transaction, checkpoint: CheckpointRow) -> ConflictError:
    """The error about a damaged checkpoint; it names the one to take instead."""
    other = newest(transaction, checkpoint.job_id)
    instead = "the job has no other one"
    if other is not None:
        instead = f"its newest whole one is {other.id}, of step {other.step}"
    return ConflictError(
        f"checkpoint {checkpoint.id} of step {checkpoint.step} is damaged: {checkpoint.damage}. "
        f"It was set aside; {instead}",
        code="checkpoint_damaged",
    )


def list_page(transaction: Transaction, job_id: str, cursor: Cursor) -> Slice[CheckpointRow]:
    """One page of a job's whole checkpoints."""
    return page(
        transaction,
        select(CheckpointRow).where(CheckpointRow.job_id == job_id, CheckpointRow.is_whole),
        CheckpointRow.id,
        (CheckpointRow.step, CheckpointRow.attempt),
        cursor,
    )


def keep(transaction: Transaction, ids: Sequence[str]) -> bool:
    """Keep checkpoints until the transaction ends. Returns whether all of them are whole."""
    kept = transaction.scalars(
        select(CheckpointRow.id)
        .where(CheckpointRow.id.in_(ids), CheckpointRow.is_whole)
        .order_by(CheckpointRow.id)
        .with_for_update(read=True)
    ).all()
    return len(kept) == len(set(ids))


def newest(transaction: Transaction, job_id: str) -> CheckpointRow | None:
    """The checkpoint that the next attempt resumes from."""
    return transaction.scalars(
        select(CheckpointRow)
        .where(CheckpointRow.job_id == job_id, CheckpointRow.is_whole)
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
    """A project's models, each with its checkpoint and job.

    Promoted checkpoints come first, then results of jobs, then all checkpoints.

    Of checkpoints with the same name only the newest counts.

    Args:
        transaction: Where they are read.
        project_id: Their project.
        name: Only models of this name.
        limit: At most this many of each kind.
    """
    # Neither manifest nor spec says where a model comes from.
    available = (
        select(CheckpointRow, JobRow)
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(JobRow.project_id == project_id, CheckpointRow.is_whole)
        .options(defer(CheckpointRow.manifest), defer(JobRow.spec))
        .limit(limit)
    )
    results = available.where(
        JobRow.status == "succeeded",
        CheckpointRow.id == func.coalesce(JobRow.result_checkpoint_id, JobRow.latest_checkpoint_id),
    ).order_by(JobRow.created_at.desc(), JobRow.id.desc())
    promoted = available.join(ModelAliasRow, ModelAliasRow.checkpoint_id == CheckpointRow.id).where(
        ModelAliasRow.project_id == project_id
    )
    if name is not None:
        promoted = promoted.where(ModelAliasRow.name == name)
        results = results.where(JobRow.model_name == name)
        available = available.where(CheckpointRow.name == name)
    named = promoted.add_columns(ModelAliasRow.name).order_by(ModelAliasRow.name)
    for checkpoint, job, alias in transaction.execute(named).all():
        yield alias, checkpoint, job
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
    transaction: Transaction,
    job: JobRow,
    checkpoint: CheckpointRow,
    manifest_bytes: int,
    standing: Standing = UNMEASURED,
) -> None:
    """Make a verified checkpoint available, and let the job resume from it."""
    published = transaction.execute(
        update(CheckpointRow)
        .where(CheckpointRow.id == checkpoint.id, CheckpointRow.status == "pending")
        .values(
            status="available",
            manifest_bytes=manifest_bytes,
            verified_at=transaction.now,
            ordinal=standing.ordinal,
            reward=standing.reward,
            kl=standing.kl,
        )
        .returning(CheckpointRow.id)
    ).one_or_none()
    if published is None:
        return
    poison.note_progress(transaction, job.id, checkpoint.attempt, checkpoint.step)
    point_to(transaction, job, checkpoint)
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
    expired = _is_expired(transaction)
    abandoned = and_(CheckpointRow.status == "pending", _is_abandoned())
    inspected = _is_inspected(transaction)
    found = select(CheckpointRow.id).where(
        or_(CheckpointRow.status == "deleting", superseded, abandoned, inspected, expired)
    )
    return transaction.scalars(found.limit(1)).first() is not None


def _needed() -> Select[str]:
    """Ids of the checkpoints that an unfinished job starts from."""
    return (
        select(JobInputRow.checkpoint_id)
        .join(JobRow, JobRow.id == JobInputRow.job_id)
        .where(JobRow.status.not_in(list(TERMINAL)))
        .correlate(None)
    )


def _superseded() -> Select[tuple[str]]:
    """Ids of the checkpoints that no job keeps.

    Kept are the ``keep_last`` newest of each job, its best one, its result, of every ``keep_every``
    the last, pinned and promoted ones, and those that an unfinished job starts from.
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
        .where(CheckpointRow.is_whole)
        .subquery()
    )
    is_nth = and_(
        JobRow.keep_every.is_not(None),
        CheckpointRow.ordinal > 0,
        CheckpointRow.ordinal % func.coalesce(JobRow.keep_every, 1) == 0,
    )
    return (
        select(ranked.c.id)
        .join(JobRow, JobRow.id == ranked.c.job_id)
        .join(CheckpointRow, CheckpointRow.id == ranked.c.id)
        .where(
            ranked.c.rank > JobRow.keep_last,
            ~CheckpointRow.is_pinned,
            ranked.c.id.is_distinct_from(JobRow.best_checkpoint_id),
            ranked.c.id.is_distinct_from(JobRow.result_checkpoint_id),
            ~is_nth,
            ranked.c.id.not_in(_needed()),
            ranked.c.id.not_in(promotions.promoted_ids()),
        )
        .correlate(None)
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


def _is_inspected(transaction: Transaction) -> ColumnElement[bool]:
    """Whether a checkpoint was damaged a week ago, and its job has a newer whole one.

    Results and those that an unfinished job starts from stay: a backup may restore their files.
    """
    newer = aliased(CheckpointRow)
    has_newer = select(newer.id).where(
        newer.job_id == CheckpointRow.job_id,
        newer.step >= CheckpointRow.step,
        newer.is_whole,
    )
    result = func.coalesce(JobRow.result_checkpoint_id, JobRow.latest_checkpoint_id)
    is_result = select(JobRow.id).where(
        JobRow.id == CheckpointRow.job_id, result == CheckpointRow.id
    )
    return and_(
        CheckpointRow.status == "available",
        CheckpointRow.damaged_at < transaction.now - KEPT_DAMAGED,
        ~CheckpointRow.is_pinned,
        ~promotions.is_promoted(),
        ~is_result.exists(),
        CheckpointRow.id.not_in(_needed()),
        has_newer.exists(),
    )


def _is_expired(transaction: Transaction) -> ColumnElement[bool]:
    """Whether a checkpoint is past its time, and nobody keeps or needs it."""
    own = aliased(JobRow)  # the statement around it may select jobs too
    is_resumed_from = select(own.id).where(
        own.id == CheckpointRow.job_id,
        own.status.not_in(list(TERMINAL)),
        own.latest_checkpoint_id == CheckpointRow.id,
    )
    return and_(
        CheckpointRow.expires_at <= transaction.now,
        CheckpointRow.status == "available",
        ~CheckpointRow.is_pinned,
        ~promotions.is_promoted(),
        CheckpointRow.id.not_in(_needed()),
        ~is_resumed_from.exists(),
    )


def expired(transaction: Transaction) -> Sequence[tuple[str, str, str]]:
    """Project, job and id of each checkpoint that is to be removed as it is past its time."""
    columns = (JobRow.project_id, CheckpointRow.job_id, CheckpointRow.id)
    found = transaction.execute(
        select(*columns)
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(_is_expired(transaction))
        .order_by(CheckpointRow.expires_at)
    ).all()
    return [(project_id, job_id, id_) for project_id, job_id, id_ in found]


def mark_inspected(transaction: Transaction) -> int:
    """Mark for removal what was damaged a week ago; returns how many."""
    marked = transaction.scalars(
        update(CheckpointRow)
        .where(_is_inspected(transaction))
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


def with_files(
    transaction: Transaction, job_ids: Collection[str]
) -> frozenset[tuple[str, int, int]]:
    """Job, attempt and step of those checkpoints of some jobs that have files, or may get some."""
    columns = (CheckpointRow.job_id, CheckpointRow.attempt, CheckpointRow.step)
    found = transaction.execute(
        select(*columns).where(CheckpointRow.job_id.in_(job_ids), CheckpointRow.status != "deleted")
    ).all()
    return frozenset((job_id, attempt, step) for job_id, attempt, step in found)


def mark_removed(transaction: Transaction, checkpoint_id: str) -> None:
    """Note that the files of a checkpoint were removed."""
    transaction.execute(
        update(CheckpointRow)
        .where(CheckpointRow.id == checkpoint_id, CheckpointRow.status == "deleting")
        .values(status="deleted")
    )


# --- damage ------------------------------------------------------------------------------------


def due_for_scrub(transaction: Transaction, period: timedelta) -> CheckpointRow | None:
    """The stored checkpoint, whole or set aside, that has been unverified for longest.

    None: all were verified within ``period``.
    """
    is_due = or_(
        CheckpointRow.verified_at.is_(None), CheckpointRow.verified_at < transaction.now - period
    )
    return transaction.scalars(
        select(CheckpointRow)
        .where(CheckpointRow.status == "available", is_due)
        .order_by(CheckpointRow.verified_at.is_not(None), CheckpointRow.verified_at)
        .limit(1)
    ).one_or_none()


def _locked(
    transaction: Transaction, checkpoint: CheckpointRow
) -> tuple[JobRow, CheckpointRow] | None:
    """A checkpoint as it is now, with its job locked; None: both were removed.

    Deletions lock in this order too: first the job, then its checkpoints.
    """
    job = transaction.scalars(
        select(JobRow)
        .where(JobRow.id == checkpoint.job_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one_or_none()
    now = transaction.scalars(
        select(CheckpointRow)
        .where(CheckpointRow.id == checkpoint.id)
        .execution_options(populate_existing=True)
    ).one_or_none()
    return None if job is None or now is None else (job, now)


def set_aside(transaction: Transaction, checkpoint: CheckpointRow, damage: str) -> bool:
    """Keep a damaged checkpoint from being used; returns whether it was in use until now.

    The job then resumes from the next older one that is whole.
    """
    locked = _locked(transaction, checkpoint)
    if locked is None:
        return False
    job, checkpoint = locked
    marked = transaction.execute(
        update(CheckpointRow)
        .where(CheckpointRow.id == checkpoint.id, CheckpointRow.is_whole)
        .values(damage=damage, damaged_at=transaction.now, verified_at=transaction.now)
        .returning(CheckpointRow.id)
    ).one_or_none()
    if marked is None:
        return False
    older = newest(transaction, job.id)
    point_to(transaction, job, older)
    message = f"checkpoint of step {checkpoint.step} is damaged and was set aside: {damage}"
    if job.status == "succeeded":
        message += "; restore its files from a backup"
    elif older is None:
        message += "; there is no older one, so the job begins again at step 0"
    else:
        message += f"; the newest whole one is that of step {older.step}"
    _tell(transaction, checkpoint, "checkpoint_damaged", message, "error", damage=damage)
    return True


def note_whole(transaction: Transaction, checkpoint: CheckpointRow) -> None:
    """Note that every byte of a checkpoint is right; one that was set aside is used again."""
    locked = _locked(transaction, checkpoint)
    if locked is None:
        return
    job, checkpoint = locked
    was_damaged = checkpoint.damage is not None
    marked = transaction.execute(
        update(CheckpointRow)
        .where(CheckpointRow.id == checkpoint.id, CheckpointRow.status == "available")
        .values(verified_at=transaction.now, damage=None, damaged_at=None)
        .returning(CheckpointRow.id)
    ).one_or_none()
    if marked is None or not was_damaged:
        return
    point_to(transaction, job, newest(transaction, job.id))
    message = f"checkpoint of step {checkpoint.step} is whole again"
    _tell(transaction, checkpoint, "checkpoint_whole", message, "info")


def note_still_damaged(transaction: Transaction, checkpoint: CheckpointRow) -> None:
    """Note that a checkpoint that was set aside has been read again, and is damaged."""
    transaction.execute(
        update(CheckpointRow)
        .where(CheckpointRow.id == checkpoint.id)
        .values(verified_at=transaction.now)
    )


def resume_from_newest(transaction: Transaction, held: Held) -> CheckpointRow | None:
    """Let an attempt that has not begun resume from its job's newest whole checkpoint."""
    found = newest(transaction, held.job.id)
    step = 0 if found is None else found.step
    transaction.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == held.job.id, AttemptRow.number == held.attempt.number)
        .values(start_step=step, resume_checkpoint_id=None if found is None else found.id)
    )
    tokens = 0 if found is None else trained_tokens(found)
    transaction.execute(
        update(JobRow)
        .where(JobRow.id == held.job.id)
        .values(step=step, tokens=tokens, metrics_event_step=step)
    )
    return found


def point_to(transaction: Transaction, job: JobRow, newest: CheckpointRow | None) -> None:
    """Note which checkpoint of a job is the newest, and which the best.

    The newest of a job that has succeeded stays what it was: an older one is another model.
    """
    best = best_checkpoint.choose(transaction, job)
    values = {"best_checkpoint_id": None if best is None else best.id}
    if job.status != "succeeded":
        values["latest_checkpoint_id"] = None if newest is None else newest.id
    transaction.execute(update(JobRow).where(JobRow.id == job.id).values(values))


def _tell(
    transaction: Transaction,
    checkpoint: CheckpointRow,
    kind: str,
    message: str,
    level: Level,
    **facts: str,
) -> None:
    data = {
        "kind": kind,
        "checkpoint_id": checkpoint.id,
        "step": checkpoint.step,
        "attempt": checkpoint.attempt,
        **facts,
    }
    event = events.NewEvent(message, level=level, data=data)
    events.append(transaction, checkpoint.job_id, [event])
