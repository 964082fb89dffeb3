"""How fast the steps of a job are, for the time at which it will end.

The time before the first step, in which the model is loaded and alpha and beta are chosen, says
nothing about the steps. A pace is a mean over the steps of one attempt, from the end of its first
step on. Until a second step is reported, the time that the trainer has measured for the first one
counts, and before that the pace of the attempt before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select

from dar.protocol.worker import MetricsRow
from service.store.database import Transaction
from service.store.tables import JobRow

STEP_SECONDS = "time/step_seconds"
MOST_COMPARED = 20
"""Earlier jobs of a model whose pace is looked at."""


@dataclass(frozen=True, slots=True)
class KnownPace:
    """How fast an earlier job was."""

    job_id: str
    seconds: float
    """Of one step."""
    spec: dict[str, Any]
    """The method of that job."""


def after(
    before: dict[str, Any] | None, attempt: int, rows: Sequence[MetricsRow], now: datetime
) -> dict[str, Any]:
    """The pace of a job with further steps.

    Args:
        before: Its pace before them: the ``attempt``, the first ``step`` of it that was reported,
            the time ``at`` which that was by the worker's clock, the ``seconds`` of a step, and
            when its newest step was ``reported``; None: not known yet.
        attempt: Number of the attempt.
        rows: Its steps, in order; at least one.
        now: When they are reported.
    """
    first, last = rows[0], rows[-1]
    if before is None or before["attempt"] != attempt:
        measured = first.values.get(STEP_SECONDS)
        earlier = None if before is None else before["seconds"]
        seconds = earlier if measured is None or measured <= 0 else measured
        before = {"attempt": attempt, "step": first.step, "at": first.at, "seconds": seconds}
    steps, passed = last.step - before["step"], last.at - before["at"]
    if steps > 0 and passed > 0:  # unless a clock was set back
        before = {**before, "seconds": passed / steps}
    return {**before, "reported": now.timestamp()}


def seconds_of(job: JobRow) -> float | None:
    """Seconds of a step of the job; None: not known yet."""
    return None if job.pace is None else job.pace["seconds"]


def of_model(transaction: Transaction, project_id: str, model: str) -> KnownPace | None:
    """The pace of the newest job of a project that trained a model; None: there is none.

    Args:
        transaction: Where it is read.
        project_id: The project.
        model: The model, as specs name it.
    """
    rows = transaction.scalars(
        select(JobRow)
        .where(JobRow.project_id == project_id, JobRow.model == model)
        .where(JobRow.started_at.is_not(None), JobRow.deleted_at.is_(None))
        .order_by(JobRow.created_at.desc(), JobRow.id.desc())
        .limit(MOST_COMPARED)
    ).all()
    for job in rows:
        if (seconds := seconds_of(job)) is not None:
            return KnownPace(job.id, seconds, job.spec["method"]["dar"])
    return None


def estimated_finish(job: JobRow, now: datetime) -> float | None:
    """When a running job will have done its last step, in seconds since 1970; None: not known.

    It changes with each step and not between two, unless a step takes longer than expected.
    """
    seconds = seconds_of(job)
    if job.status != "running" or job.pace is None or seconds is None:
        return None
    is_of_attempt = job.pace["attempt"] == job.attempt
    start = job.pace["reported"] if is_of_attempt else now.timestamp()
    finish: float = start + seconds * max(job.total_steps - job.step, 0)
    return max(finish, now.timestamp())
