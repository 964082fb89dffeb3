"""Leases: which worker may write for a job, and until when."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import aliased

from dar.protocol.worker import AttemptProgress, Claim
from service.store import checkpoints, fence, outcomes, transitions
from service.store.database import Transaction
from service.store.fence import Held
from service.store.tables import AttemptRow, JobRow


@dataclass(frozen=True, slots=True)
class Credential:
    """Id of a new lease, and the digest of its attempt's token."""

    lease_id: str
    token_sha256: str


def claim(
    transaction: Transaction, claim: Claim, credential: Credential, ttl: timedelta
) -> Held | None:
    """Give the job that has been in the queue longest to a slot.

    Leases that an earlier process of the slot, or its machine before a reboot, still holds are
    ended first, and their jobs are retried if they have attempts left.

    Args:
        transaction: The transaction to write in.
        claim: The slot.
        credential: Of the new lease.
        ttl: How long the lease is valid without a heartbeat.

    Returns:
        The job and its new attempt; None if no job is due.
    """
    _end_old_leases(transaction, claim)
    job = _take_oldest(transaction, claim)
    if job is None:
        return None
    resume = checkpoints.newest(transaction, job.id)
    start_step = 0 if resume is None else resume.step
    transaction.execute(
        update(JobRow)
        .where(JobRow.id == job.id)
        .values(
            step=start_step,
            tokens=0 if resume is None else checkpoints.trained_tokens(resume),
            started_at=job.started_at or transaction.now,
            metrics_event_step=start_step,
        )
    )
    attempt = AttemptRow(
        job_id=job.id,
        number=job.attempt,
        lease_id=credential.lease_id,
        status="running",
        node=claim.node,
        slot=claim.slot,
        incarnation=claim.incarnation,
        boot_id=claim.boot_id,
        token_sha256=credential.token_sha256,
        started_at=transaction.now,
        lease_until=transaction.now + ttl,
        start_step=start_step,
        resume_checkpoint_id=None if resume is None else resume.id,
    )
    transaction.add(attempt)
    transaction.flush()
    return Held(job, attempt)


def _take_oldest(transaction: Transaction, claim: Claim) -> JobRow | None:
    waiting = aliased(JobRow)
    oldest = (
        select(waiting.id)
        .where(_is_due(waiting, transaction.now))
        .order_by(waiting.queued_at, waiting.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    return transitions.move(
        transaction,
        "claimed",
        JobRow.id == oldest,
        f"starting on {claim.node}",
        values={"attempt": JobRow.attempt + 1},
        facts={"node": claim.node, "slot": claim.slot},
    )


def _is_due(job: type[JobRow], now: datetime) -> ColumnElement[bool]:
    """Whether a worker may claim a job.

    One that waits for its reward service is claimed only after a probe has passed, which removes
    the detail (`service.store.reward_pauses.note_probe`).
    """
    return and_(
        job.status == "queued",
        job.not_before <= now,
        job.status_detail.is_distinct_from("waiting_for_reward"),
    )


def count_due(transaction: Transaction, older_than: timedelta) -> int:
    """Number of unclaimed jobs in the queue that have been due for ``older_than``."""
    return transaction.scalars(
        select(func.count())
        .select_from(JobRow)
        .where(_is_due(JobRow, transaction.now - older_than))
    ).one()


def _end_old_leases(transaction: Transaction, claim: Claim) -> None:
    # A slot that claims runs nothing: a lease of this same process is one whose reply was lost.
    old = select(AttemptRow.lease_id).where(
        AttemptRow.status == "running",
        AttemptRow.node == claim.node,
        or_(AttemptRow.slot == claim.slot, AttemptRow.boot_id != claim.boot_id),
    )
    for lease_id in transaction.scalars(old.order_by(AttemptRow.job_id)).all():
        held = fence.lock(transaction, lease_id)
        if held.attempt.status == "running":
            outcomes.lose(transaction, held, f"the worker on {claim.node} was restarted")


def renew(
    transaction: Transaction, held: Held, ttl: timedelta, progress: AttemptProgress | None
) -> bool:
    """Renew a lease and store the attempt's progress. Returns whether the job has changed."""
    transaction.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == held.job.id, AttemptRow.number == held.attempt.number)
        .values(lease_until=transaction.now + ttl)
    )
    return progress is not None and note_progress(transaction, held.job, progress)


def note_progress(transaction: Transaction, job: JobRow, progress: AttemptProgress) -> bool:
    """Show progress as the job's detail, unless that shows a pending cancellation or pause.

    Steps and tokens never decrease within an attempt: a trainer that loads its model reports none,
    and a heartbeat may arrive after the rows of a later step.
    """
    said: dict[str, Any] = {
        "step": max(job.step, progress.step),
        "tokens": max(job.tokens, progress.tokens or 0),
    }
    if job.cancel_requested_at is None and job.status != "pausing":
        said |= {"status_detail": progress.phase, "status_message": progress.message}
    if all(getattr(job, name) == value for name, value in said.items()):
        return False
    transaction.execute(update(JobRow).where(JobRow.id == job.id).values(said))
    return True


def expired(transaction: Transaction) -> Sequence[str]:
    """Ids of the leases that have expired."""
    return transaction.scalars(
        select(AttemptRow.lease_id)
        .where(AttemptRow.status == "running", AttemptRow.lease_until < transaction.now)
        .order_by(AttemptRow.job_id)
    ).all()


def expire(transaction: Transaction, lease_id: str) -> bool:
    """End an expired lease, unless it was renewed or ended. Returns whether it was ended."""
    held = fence.lock(transaction, lease_id)
    attempt = held.attempt
    if attempt.status != "running" or attempt.lease_until >= transaction.now:
        return False
    outcomes.lose(transaction, held, f"the worker on {attempt.node} has sent no heartbeat")
    return True


def unattended_cancellations(transaction: Transaction) -> Sequence[str]:
    """Jobs that are being cancelled and that no attempt runs."""
    attempts = select(AttemptRow.job_id).where(
        AttemptRow.job_id == JobRow.id, AttemptRow.status == "running"
    )
    is_cancelling = JobRow.cancel_requested_at.is_not(None)
    return transaction.scalars(
        select(JobRow.id).where(JobRow.status == "running", is_cancelling, ~attempts.exists())
    ).all()


def finish_cancellation(transaction: Transaction, job_id: str) -> None:
    """Cancel a job that `unattended_cancellations` found, unless it has changed since."""
    transitions.move(
        transaction, "cancel_confirmed", JobRow.id == job_id, "cancelled; no worker was left"
    )


def changed(
    transaction: Transaction,
    job_ids: Collection[str],
    *,
    cancel: Collection[str],
    pause: Collection[str],
) -> Sequence[str]:
    """Which jobs have changed for their workers.

    Args:
        transaction: Where they are read.
        job_ids: Jobs to check; a job that no attempt runs any more has changed.
        cancel: Jobs whose worker has not received a cancellation, should there be one.
        pause: Jobs whose worker has not received a pause, should there be one.
    """
    is_running = select(AttemptRow.job_id).where(
        AttemptRow.job_id == JobRow.id,
        AttemptRow.number == JobRow.attempt,
        AttemptRow.status == "running",
    )
    statement = select(JobRow.id).where(
        JobRow.id.in_(job_ids),
        or_(
            and_(JobRow.cancel_requested_at.is_not(None), JobRow.id.in_(cancel)),
            and_(JobRow.status == "pausing", JobRow.id.in_(pause)),
            ~is_running.exists(),
        ),
    )
    return transaction.scalars(statement).all()
