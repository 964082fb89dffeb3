"""Poison: when a job is given up, because its attempts fail by its own fault.

Only failures that the job itself causes count: three in a row without a newer checkpoint. Failures
of a worker, of storage, of the database and of a reward service never count, and neither do drains.
A newer checkpoint resets every count, so there is no limit on attempts.

One thing is evidence against a job although its worker is gone: it was lost on three nodes, or five
times on one node whose self-check passes. Some failures of a worker may be caused by the job as
well (`MAYBE_OF_JOB`), so those on three nodes count too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select, update

from dar.protocol.status import AttemptStatus
from dar.protocol.worker import FailureOwner
from service.store import workers
from service.store.database import Transaction
from service.store.fence import Held
from service.store.tables import AttemptRow, JobRow

MAX_OWN_FAILURES = 3
MAX_NODES = 3
MAX_LOSSES = 5
MAYBE_OF_JOB = frozenset({"trainer_crashed", "device_failed", "process_failed"})
"""Codes of failures of a worker that a job may cause on every machine."""
MOST_ATTEMPTS = 100
"""Newest attempts that are examined."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt ended that is followed by another one."""

    status: AttemptStatus
    code: str
    message: str
    owner: FailureOwner | None = None
    counts: bool | None = None
    """As reported; None: by its owner."""

    @property
    def is_of_job(self) -> bool:
        """Whether the job itself caused it."""
        if self.status != "failed":
            return False
        return self.owner in {None, "user", "service"} if self.counts is None else self.counts


@dataclass(frozen=True, slots=True)
class Tally:
    """The counts of a job after a failure."""

    own: int
    """`JobRow.fruitless_attempts`."""
    failed: int
    """`JobRow.failed_attempts`."""
    verdict: str | None
    """Why the job is given up; None: it is tried again."""


def tally(transaction: Transaction, held: Held, failure: Failure) -> Tally:
    """Count a failure, and decide whether the job is given up."""
    job = held.job
    if job.counts_from > held.attempt.number:
        return Tally(own=0, failed=job.failed_attempts + 1, verdict=None)
    own = job.fruitless_attempts + failure.is_of_job
    verdict = None
    if own >= MAX_OWN_FAILURES:
        verdict = f"{own} attempts in a row failed without a newer checkpoint"
    elif not failure.is_of_job:
        verdict = _verdict_on_losses(transaction, held, failure)
    return Tally(own, job.failed_attempts + 1, verdict)


def note_progress(transaction: Transaction, job_id: str, attempt: int, step: int) -> None:
    """Reset every count of a job, if an attempt has published a checkpoint after its first step."""
    has_begun_before = (
        select(AttemptRow.number)
        .where(
            AttemptRow.job_id == JobRow.id,
            AttemptRow.number == attempt,
            AttemptRow.start_step < step,
        )
        .exists()
    )
    transaction.execute(
        update(JobRow)
        .where(JobRow.id == job_id, has_begun_before)
        .values(fruitless_attempts=0, failed_attempts=0, counts_from=attempt + 1)
        .execution_options(synchronize_session=False)
    )


def _verdict_on_losses(transaction: Transaction, held: Held, failure: Failure) -> str | None:
    """Whether so many workers were lost with the job that the job must be the cause."""
    attempt = held.attempt
    earlier = transaction.scalars(
        select(AttemptRow)
        .where(
            AttemptRow.job_id == attempt.job_id,
            AttemptRow.number >= held.job.counts_from,
            AttemptRow.number < attempt.number,
            AttemptRow.status.in_(("lost", "failed")),
        )
        .order_by(AttemptRow.number.desc())
        .limit(MOST_ATTEMPTS)
    ).all()
    ends = [(one.node, one.status, (one.failure or {}).get("code", "")) for one in earlier]
    ends.append((attempt.node, failure.status, failure.code))
    verdict = _on_many_nodes(ends)
    if verdict is None and failure.status == "lost":
        losses = Counter(node for node, how, _ in ends if how == "lost")[attempt.node]
        if losses >= MAX_LOSSES and workers.passes_check(transaction, attempt.node):
            verdict = (
                f"it was lost {losses} times on {attempt.node}, whose self-check passes, without a "
                "newer checkpoint"
            )
    return verdict


_End = tuple[str, str, str]
"""Node, status and code of an attempt that was lost or failed."""


def _on_many_nodes(ends: Sequence[_End]) -> str | None:
    nodes = {node for node, status, code in ends if status == "lost" or code in MAYBE_OF_JOB}
    if len(nodes) < MAX_NODES:
        return None
    return (
        f"it was lost on {len(nodes)} nodes ({', '.join(sorted(nodes))}) without a newer checkpoint"
    )
