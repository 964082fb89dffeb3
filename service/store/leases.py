"""Leases: who may write for a job, since when and until when.

A worker's call names its attempt. `hold` locks the job's row and checks that this attempt still runs it, in the same
transaction as the write: a process that was frozen and wakes up late is turned away, and nothing that it says about the
job's state is stored.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import and_, or_, select, update
from sqlalchemy.orm import aliased

from dar.errors import ConflictError, FencedError, NotFoundError
from dar.protocol.status import TERMINAL, AttemptStatus
from dar.protocol.worker import AttemptProgress, Claim, Complete, Fail, Outcome, Release
from service.store import checkpoints, transitions
from service.store.database import Transaction
from service.store.tables import Attempt, Job

MAX_FRUITLESS_ATTEMPTS = 3
MAX_FAILED_ATTEMPTS = 20
MAX_BACKOFF_SECONDS = 600.0
FIRST_REWARD_WAIT_SECONDS, MAX_REWARD_WAIT_SECONDS = 5.0, 60.0
POISON = (
    "usual causes: the trainer runs out of memory (a smaller batch_size or max_new_tokens helps), the machine fails, "
    "or this job's data or model make the trainer crash"
)


Ending = Callable[[Transaction], Outcome]
"""One of `complete`, `fail` and `release`, with what the worker said."""


@dataclass(frozen=True, slots=True)
class Credential:
    """Id of a new lease, and the digest of the token that its attempt shows."""

    lease_id: str
    token_sha256: str


@dataclass(frozen=True, slots=True)
class Held:
    """A job and the attempt that runs it, both locked for the rest of the transaction."""

    job: Job
    attempt: Attempt


def find(transaction: Transaction, lease_id: str) -> Attempt:
    """The attempt of a lease, running or not.

    Raises:
        NotFoundError: There is no such lease.
    """
    found = transaction.scalars(select(Attempt).where(Attempt.lease_id == lease_id)).one_or_none()
    if found is None:
        raise NotFoundError(f"there is no lease {lease_id!r}")
    return found


def look(transaction: Transaction, lease_id: str) -> Held:
    """The attempt of a lease and its job, as they are just now: for reading.

    Raises:
        NotFoundError: There is no such lease.
    """
    attempt = find(transaction, lease_id)
    return Held(transaction.scalars(select(Job).where(Job.id == attempt.job_id)).one(), attempt)


def lock(transaction: Transaction, lease_id: str) -> Held:
    """The attempt of a lease and its job, locked, whether the lease still holds or not.

    Raises:
        NotFoundError: There is no such lease.
    """
    attempt = find(transaction, lease_id)
    job = transaction.scalars(select(Job).where(Job.id == attempt.job_id).with_for_update()).one()
    # Read again under the lock: what was read before it may be a moment old.
    transaction.refresh(attempt)
    return Held(job, attempt)


def hold(transaction: Transaction, lease_id: str, number: int) -> Held:
    """Lock the job of a lease for its attempt ``number``.

    Raises:
        NotFoundError: There is no such lease.
        FencedError: The lease has ended or is another attempt's.
    """
    held = lock(transaction, lease_id)
    check_fence(held, number)
    return held


def check_fence(held: Held, number: int) -> None:
    """Raise unless attempt ``number`` still runs the job.

    Raises:
        FencedError: It does not: its process must stop.
    """
    attempt = held.attempt
    is_mine = attempt.number == number == held.job.attempt
    if not is_mine or attempt.status != "running":
        raise FencedError(
            f"attempt {number} no longer holds job {attempt.job_id} "
            f"(attempt {attempt.number} is {attempt.status}); stop the trainer"
        )


def claim(
    transaction: Transaction, claim: Claim, credential: Credential, ttl: timedelta
) -> Held | None:
    """Give the oldest queued job to a slot.

    First whatever a former life of the slot, or of its machine, still held goes back into the queue.

    Args:
        transaction: Where it happens.
        claim: Who asks.
        credential: Of the new lease.
        ttl: How long the lease holds without a heartbeat.

    Returns:
        The job and its new attempt, or None when nothing is due.
    """
    _free_former_lives(transaction, claim)
    waiting = aliased(Job)
    oldest = (
        select(waiting.id)
        .where(waiting.status == "queued", waiting.not_before <= transaction.now)
        .order_by(waiting.created_at, waiting.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    job = transitions.move(
        transaction,
        "claimed",
        Job.id == oldest,
        f"starting on {claim.node}",
        values={"attempt": Job.attempt + 1},
        facts={"node": claim.node, "slot": claim.slot},
    )
    if job is None:
        return None
    resume = checkpoints.newest(transaction, job.id)
    start_step = 0 if resume is None else resume.step
    transaction.execute(
        update(Job)
        .where(Job.id == job.id)
        .values(step=start_step, started_at=job.started_at or transaction.now)
    )
    attempt = Attempt(
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


def _free_former_lives(transaction: Transaction, claim: Claim) -> None:
    # A slot that asks for work runs nothing: even a lease of its present life is one whose reply was lost.
    former = select(Attempt.lease_id).where(
        Attempt.status == "running",
        Attempt.node == claim.node,
        or_(Attempt.slot == claim.slot, Attempt.boot_id != claim.boot_id),
    )
    for lease_id in transaction.scalars(former.order_by(Attempt.job_id)).all():
        held = lock(transaction, lease_id)
        if held.attempt.status == "running":
            lose(transaction, held, f"the worker on {claim.node} started anew")


def renew(
    transaction: Transaction, held: Held, ttl: timedelta, progress: AttemptProgress | None
) -> bool:
    """Renew a lease and note what the attempt does. Returns whether the user sees a change."""
    transaction.execute(
        update(Attempt)
        .where(Attempt.job_id == held.job.id, Attempt.number == held.attempt.number)
        .values(lease_until=transaction.now + ttl)
    )
    return progress is not None and note_progress(transaction, held.job, progress)


def note_progress(transaction: Transaction, job: Job, progress: AttemptProgress) -> bool:
    """Show what the attempt does as the job's detail; a pending cancellation stays on show."""
    seen = (job.step, job.status_detail, job.status_message)
    said: tuple[int, str | None, str | None] = (progress.step, progress.phase, progress.message)
    if job.cancel_requested_at is not None:
        said = (progress.step, job.status_detail, job.status_message)
    if seen == said:
        return False
    transaction.execute(
        update(Job)
        .where(Job.id == job.id)
        .values(step=said[0], status_detail=said[1], status_message=said[2])
    )
    return True


def expired(transaction: Transaction) -> list[str]:
    """Leases whose time is up, by id."""
    return list(
        transaction.scalars(
            select(Attempt.lease_id)
            .where(Attempt.status == "running", Attempt.lease_until < transaction.now)
            .order_by(Attempt.job_id)
        ).all()
    )


def expire(transaction: Transaction, lease_id: str) -> bool:
    """End a lease whose time is up, unless its worker was faster. Returns whether it was ended."""
    held = lock(transaction, lease_id)
    attempt = held.attempt
    if attempt.status != "running" or attempt.lease_until >= transaction.now:
        return False
    lose(transaction, held, f"the worker on {attempt.node} has not been heard of")
    return True


def lose(transaction: Transaction, held: Held, why: str) -> None:
    """End an attempt that cannot report any more; its job goes back into the queue."""
    _retry(transaction, held, "lost", why, not_before=0.0)


def complete(transaction: Transaction, lease_id: str, said: Complete) -> Outcome:
    """The attempt trained to the end. The same call again gets the same answer.

    Raises:
        FencedError: The lease has ended.
        ConflictError: Rows are missing (``spool_behind``), or the final checkpoint is (``checkpoint_missing``).
    """
    held = lock(transaction, lease_id)
    if (told := _told_before(held, said.attempt, "complete")) is not None:
        return told
    check_fence(held, said.attempt)
    job, attempt = held.job, held.attempt
    if attempt.acked_seq != said.last_seq:
        raise ConflictError(
            f"rows up to {said.last_seq} were said but {attempt.acked_seq} is the last one committed; "
            "send the rest of the spool first",
            code="spool_behind",
        )
    final = checkpoints.find(transaction, job.id, said.checkpoint_id)
    if final is None or final.status != "available" or final.step != job.total_steps:
        raise ConflictError(
            f"checkpoint {said.checkpoint_id!r} is not an available one of step {job.total_steps}; "
            "upload and commit the final checkpoint first",
            code="checkpoint_missing",
        )
    values = {"step": job.total_steps, "latest_checkpoint_id": final.id}
    moved = transitions.move(
        transaction,
        "succeeded",
        Job.id == job.id,
        f"trained {job.total_steps} steps; the result is the model {job.model_name}",
        values=values,
        facts={"fine_tuned_model": job.model_name},
    )
    return _end(transaction, held, "succeeded", "complete", moved)


def fail(transaction: Transaction, lease_id: str, said: Fail) -> Outcome:
    """The attempt ended badly: a user's error ends the job, anything else is tried again after a pause.

    Raises:
        FencedError: The lease has ended.
    """
    held = lock(transaction, lease_id)
    if (told := _told_before(held, said.attempt, "fail")) is not None:
        return told
    check_fence(held, said.attempt)
    job = held.job
    if said.kind == "transient":
        pause = min(MAX_BACKOFF_SECONDS, 2.0 ** min(job.fruitless_attempts + 1, 16))
        pause *= random.uniform(0.5, 1.0)  # noqa: S311 - spreads retries; nothing secret hangs on it
        return _retry(transaction, held, "failed", said.message, not_before=pause, call="fail")
    if job.cancel_requested_at is not None:
        return _confirm_cancel(transaction, held, "failed", "fail")
    error = {"code": said.code, "message": said.message, "param": said.param}
    moved = transitions.move(
        transaction, "failed", Job.id == job.id, said.message, values={"error": error}, facts=error
    )
    return _end(transaction, held, "failed", "fail", moved)


def release(transaction: Transaction, lease_id: str, said: Release) -> Outcome:
    """The attempt gives its job back, or confirms that it was cancelled.

    Raises:
        FencedError: The lease has ended.
        ConflictError: It confirms a cancellation that nobody asked for.
    """
    held = lock(transaction, lease_id)
    if (told := _told_before(held, said.attempt, "release")) is not None:
        return told
    check_fence(held, said.attempt)
    job = held.job
    if job.cancel_requested_at is not None:
        return _confirm_cancel(transaction, held, "cancelled", "release")
    if said.reason == "cancelled":
        raise ConflictError(f"nobody has asked to cancel job {job.id}")
    if said.reason == "drained":
        values: dict[str, Any] = {"not_before": transaction.now}
        message = said.message or "the worker was stopped; waiting for another slot"
        moved = transitions.move(transaction, "drained", Job.id == job.id, message, values=values)
    else:
        wait = min(FIRST_REWARD_WAIT_SECONDS * 2.0**job.reward_waits, MAX_REWARD_WAIT_SECONDS)
        values = {
            "not_before": transaction.now + timedelta(seconds=wait),
            "reward_waits": min(job.reward_waits + 1, 16),
        }
        message = said.message or "the reward service does not answer"
        moved = transitions.move(
            transaction, "reward_down", Job.id == job.id, message, values=values
        )
    return _end(transaction, held, "drained", "release", moved)


def _retry(
    transaction: Transaction,
    held: Held,
    status: AttemptStatus,
    why: str,
    *,
    not_before: float,
    call: str | None = None,
) -> Outcome:
    job = held.job
    if job.cancel_requested_at is not None:
        return _confirm_cancel(transaction, held, status, call)
    fruitless, failed = job.fruitless_attempts + 1, job.failed_attempts + 1
    values: dict[str, Any] = {"fruitless_attempts": fruitless, "failed_attempts": failed}
    facts = {"reason": status, "node": held.attempt.node}
    if fruitless >= MAX_FRUITLESS_ATTEMPTS or failed >= MAX_FAILED_ATTEMPTS:
        count = f"{fruitless} attempts in a row ended without a newer checkpoint"
        if fruitless < MAX_FRUITLESS_ATTEMPTS:
            count = f"{failed} attempts have ended badly"
        message = f"{count}; the last one: {why}. {POISON}"
        values["error"] = {"code": "poison", "message": message, "param": None}
        moved = transitions.move(
            transaction, "poisoned", Job.id == job.id, message, values=values, facts=facts
        )
        return _end(transaction, held, status, call, moved)
    values["not_before"] = transaction.now + timedelta(seconds=not_before)
    name: transitions.MoveName = "lost" if status == "lost" else "retried"
    moved = transitions.move(transaction, name, Job.id == job.id, why, values=values, facts=facts)
    return _end(transaction, held, status, call, moved)


def _confirm_cancel(
    transaction: Transaction, held: Held, status: AttemptStatus, call: str | None
) -> Outcome:
    where = and_(Job.id == held.job.id, Job.attempt == held.attempt.number)
    moved = transitions.move(transaction, "cancel_confirmed", where, "cancelled while it ran")
    return _end(transaction, held, status, call, moved)


def _end(
    transaction: Transaction, held: Held, status: AttemptStatus, call: str | None, job: Job | None
) -> Outcome:
    if job is None:
        raise ConflictError(
            f"job {held.job.id} is {held.job.status}; attempt {held.attempt.number} cannot end it so"
        )
    outcome = {"call": call, "status": job.status, "status_detail": job.status_detail}
    transaction.execute(
        update(Attempt)
        .where(Attempt.job_id == job.id, Attempt.number == held.attempt.number)
        .values(status=status, ended_at=transaction.now, outcome=outcome)
    )
    return Outcome(status=job.status, status_detail=job.status_detail)


def _told_before(held: Held, number: int, call: str) -> Outcome | None:
    outcome = held.attempt.outcome
    if held.attempt.number != number or outcome is None or outcome["call"] != call:
        return None
    return Outcome(status=outcome["status"], status_detail=outcome["status_detail"])


def unattended_cancellations(transaction: Transaction) -> list[str]:
    """Jobs that are to be cancelled and that no attempt runs."""
    return list(
        transaction.scalars(
            select(Job.id).where(
                Job.status == "running",
                Job.cancel_requested_at.is_not(None),
                ~select(Attempt.job_id)
                .where(Attempt.job_id == Job.id, Attempt.status == "running")
                .exists(),
            )
        ).all()
    )


def is_live(attempt: Attempt, job: Job) -> bool:
    """Whether the attempt still runs the job."""
    return (
        attempt.status == "running"
        and attempt.number == job.attempt
        and (job.status not in TERMINAL)
    )
