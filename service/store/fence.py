"""The fence: only the attempt that runs a job may write its state.

A worker's call names its attempt. `hold` locks the job's row and checks that this attempt still
runs it, in the same transaction as the write. A process that was frozen and continues late is
rejected, and nothing that it reports about the job's state is stored.
"""

from dataclasses import dataclass

from sqlalchemy import select

from dar.errors import FencedError, NotFoundError
from dar.protocol.status import TERMINAL
from service.store.database import Transaction
from service.store.tables import AttemptRow, JobRow


@dataclass(frozen=True, slots=True)
class Held:
    """A job and an attempt of it."""

    job: JobRow
    attempt: AttemptRow


def find(transaction: Transaction, lease_id: str) -> AttemptRow:
    """The attempt of a lease, running or ended.

    Raises:
        NotFoundError: There is no such lease.
    """
    found = transaction.scalars(
        select(AttemptRow).where(AttemptRow.lease_id == lease_id)
    ).one_or_none()
    if found is None:
        raise NotFoundError(f"there is no lease {lease_id!r}")
    return found


def look(transaction: Transaction, lease_id: str) -> Held:
    """The attempt of a lease and its job, without locks: for reading.

    Raises:
        NotFoundError: There is no such lease.
    """
    attempt = find(transaction, lease_id)
    return Held(transaction.get_one(JobRow, attempt.job_id), attempt)


def lock(transaction: Transaction, lease_id: str) -> Held:
    """Lock the job of a lease, whether or not the lease is still valid.

    Raises:
        NotFoundError: There is no such lease, or its job was deleted.
    """
    attempt = find(transaction, lease_id)
    job = transaction.scalars(
        select(JobRow)
        .where(JobRow.id == attempt.job_id, JobRow.deleted_at.is_(None))
        .with_for_update()
    ).one_or_none()
    if job is None:
        raise NotFoundError(f"the job of lease {lease_id!r} was deleted")
    # Read the attempt again under the lock: it may have changed before the lock was granted.
    transaction.refresh(attempt)
    return Held(job, attempt)


def hold(transaction: Transaction, lease_id: str, number: int) -> Held:
    """Lock the job of a lease for its attempt ``number``.

    Raises:
        NotFoundError: There is no such lease.
        FencedError: The lease has ended, or belongs to another attempt.
    """
    held = lock(transaction, lease_id)
    check_fence(held, number)
    return held


def check_fence(held: Held, number: int) -> None:
    """Raise unless attempt ``number`` still runs the job.

    Raises:
        FencedError: It does not; its process must stop.
    """
    attempt = held.attempt
    is_mine = attempt.number == number == held.job.attempt
    if not is_mine or attempt.status != "running":
        raise FencedError(
            f"attempt {number} no longer holds job {attempt.job_id} "
            f"(attempt {attempt.number} is {attempt.status}); stop the trainer"
        )


def is_live(attempt: AttemptRow, job: JobRow) -> bool:
    """Whether the attempt still runs the job."""
    is_current = attempt.status == "running" and attempt.number == job.attempt
    return is_current and job.status not in TERMINAL
