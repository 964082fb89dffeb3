"""Jobs that are paused for missing rewards, and the schedule of checks of their services."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import and_, select

from service.store import transitions
from service.store.database import Transaction
from service.store.tables import JobRow

MAX_WAITS = 16
"""Upper bound of ``reward_waits``: the wait has long reached its limit by then."""


IS_PAUSED = and_(JobRow.status == "paused", JobRow.status_detail == "reward")


def due(transaction: Transaction, limit: int) -> Sequence[JobRow]:
    """Paused jobs whose reward services are due for a check, the longest due first."""
    return transaction.scalars(
        select(JobRow)
        .where(IS_PAUSED, JobRow.not_before <= transaction.now)
        .order_by(JobRow.not_before, JobRow.id)
        .limit(limit)
    ).all()


def note_probe(
    transaction: Transaction, job_id: str, attempt: int, *, is_back: bool, base_seconds: float
) -> bool:
    """Store a check of a paused job's reward services: the job resumes, or the next check is set.

    Returns:
        Whether the job resumes; False if its status changed meanwhile.
    """
    this = and_(JobRow.id == job_id, JobRow.attempt == attempt, IS_PAUSED)
    if is_back:
        values = {"not_before": transaction.now}
        message = "the reward service answers again; resuming"
        facts = {"by": "probe"}
        moved = transitions.move(transaction, "resumed", this, message, values=values, facts=facts)
        return moved is not None
    job = transaction.scalars(select(JobRow).where(this).with_for_update()).one_or_none()
    if job is not None:
        wait = wait_before_probe(job.error, job.reward_waits, base_seconds)
        job.not_before = transaction.now + wait
        job.reward_waits = min(job.reward_waits + 1, MAX_WAITS)
        transaction.flush()
    return False


def wait_before_probe(
    error: Mapping[str, Any] | None, waits: int, base_seconds: float
) -> timedelta:
    """The wait before the next check of a paused job's reward services.

    After an outage it is ``base_seconds`` at first, and doubles up to 12 times that. If the service
    rejected requests or broke the contract, a person has to change something, and all waits are 12
    times longer.

    Args:
        error: The job's error, with ``is_outage``.
        waits: Checks and pauses in a row so far.
        base_seconds: `Settings.reward_probe_seconds`.
    """
    first = base_seconds if (error or {}).get("is_outage") else 12 * base_seconds
    return timedelta(seconds=min(first * 2.0**waits, 12 * first))
