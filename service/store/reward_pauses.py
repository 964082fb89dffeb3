"""Jobs that are paused because they got too few rewards, and the looks at their reward services until these are back."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import and_, select, update

from service.store import transitions
from service.store.database import Transaction
from service.store.tables import JobRow

MAX_WAITS = 16
"""Where ``reward_waits`` stops counting: a wait that has doubled so often is at its bound."""


def due(transaction: Transaction, limit: int) -> list[JobRow]:
    """Jobs that wait for their reward service and are due to be looked at, the longest due first."""
    return list(
        transaction.scalars(
            select(JobRow)
            .where(
                JobRow.status == "paused",
                JobRow.status_detail == "reward",
                JobRow.not_before <= transaction.now,
            )
            .order_by(JobRow.not_before, JobRow.id)
            .limit(limit)
        ).all()
    )


def note_probe(
    transaction: Transaction, job_id: str, attempt: int, *, is_back: bool, base_seconds: float
) -> bool:
    """Note what a look at the reward service of a paused job has shown: it goes on, or is looked at again later.

    Returns:
        Whether the job goes on; not if somebody has moved it meanwhile.
    """
    this = and_(
        JobRow.id == job_id,
        JobRow.attempt == attempt,
        JobRow.status == "paused",
        JobRow.status_detail == "reward",
    )
    if is_back:
        values = {"error": None, "not_before": transaction.now}
        message = "the reward service answers again; going on"
        facts = {"by": "probe"}
        return (
            transitions.move(transaction, "resumed", this, message, values=values, facts=facts)
            is not None
        )
    job = transaction.scalars(select(JobRow).where(this).with_for_update()).one_or_none()
    if job is not None:
        wait = wait_before_probe(job.error, job.reward_waits, base_seconds)
        transaction.execute(
            update(JobRow)
            .where(JobRow.id == job_id)
            .values(
                not_before=transaction.now + wait, reward_waits=min(job.reward_waits + 1, MAX_WAITS)
            )
        )
    return False


def wait_before_probe(
    error: Mapping[str, Any] | None, waits: int, base_seconds: float
) -> timedelta:
    """How long a job that is paused for its rewards is left alone before the next look at its reward service.

    After an outage ``base_seconds``, doubling up to 12 times that; where the service refused us or answered wrongly,
    somebody has to change something first, and it is asked 12 times less often.

    Args:
        error: The job's, with ``is_outage``.
        waits: Looks and pauses in a row so far.
        base_seconds: `Settings.reward_probe_seconds`.
    """
    first = base_seconds if (error or {}).get("is_outage") else 12 * base_seconds
    return timedelta(seconds=min(first * 2.0**waits, 12 * first))
