"""Jobs without rewards, and the schedule of the service's probes of their reward services.

A job that had no reward before the end of its first step is queued, and waits for its reward
service. A job that missed them later is paused. Both go on when a probe gets rewards.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import and_, func, or_, select

from service.store import events, transitions
from service.store.database import Transaction
from service.store.tables import AttemptRow, JobEventRow, JobRow

MAX_WAITS = 16
"""Upper bound of ``reward_waits``: the wait has long reached its limit by then."""
MAX_AFTER_ATTEMPT = 120
"""Longest wait after an attempt without a reward, in units of `Settings.reward_probe_seconds`."""
WORKER_TRIES_AFTER = timedelta(minutes=10)
"""A worker tries this long after the last attempt where the service itself cannot connect."""

IS_PAUSED = and_(JobRow.status == "paused", JobRow.status_detail == "reward")
IS_WAITING = and_(JobRow.status == "queued", JobRow.status_detail == "waiting_for_reward")


@dataclass(frozen=True, slots=True)
class RewardCheck:
    """What a probe of a job's reward services has found."""

    is_back: bool
    """Whether the job can get the rewards that it needs."""
    reason: str = ""
    """If they are not back: the component and its failure."""
    is_undecided: bool = False
    """Whether only a worker can find out, as the service cannot connect to the reward services."""


def due(transaction: Transaction, limit: int, without: Collection[str] = ()) -> Sequence[JobRow]:
    """Jobs whose reward services are due for a probe, the longest due first.

    Args:
        transaction: The transaction.
        limit: Most jobs.
        without: Ids of jobs that are probed already.
    """
    return transaction.scalars(
        select(JobRow)
        .where(or_(IS_PAUSED, IS_WAITING), transitions.has_waited(JobRow, transaction.now))
        .where(JobRow.id.not_in(sorted(without)))
        .order_by(JobRow.not_before, JobRow.id)
        .limit(limit)
    ).all()


def note_probe(
    transaction: Transaction, job_id: str, attempt: int, check: RewardCheck, base_seconds: float
) -> bool:
    """Store a probe of a job's reward services: a worker may claim it, or the next probe is set.

    Returns:
        Whether a worker may claim the job now; False also if its status changed meanwhile.
    """
    this = and_(JobRow.id == job_id, JobRow.attempt == attempt, or_(IS_PAUSED, IS_WAITING))
    job = transaction.scalars(select(JobRow).where(this).with_for_update()).one_or_none()
    if job is None:
        return False
    if job.status == "paused":
        return _note_of_paused(transaction, job, check, base_seconds)
    return _note_of_waiting(transaction, job, check, base_seconds)


@dataclass(frozen=True, slots=True)
class AttemptWait:
    """What follows an attempt that got no reward."""

    until_probe: timedelta
    waits: int
    """The new ``reward_waits`` of the job."""
    note: str
    """What its event adds; empty: nothing."""


def wait_after_attempt(
    transaction: Transaction, job: JobRow, base_seconds: float, *, is_outage: bool
) -> AttemptWait:
    """The wait before the next probe, after an attempt that got no reward.

    A service may answer each probe and then fail at the first step: the wait becomes four times as
    long with each attempt that followed a probe that passed, up to 120 times ``base_seconds``.
    """
    wait = wait_before_probe(job.reward_waits, base_seconds, is_outage=is_outage)
    count = _passed_in_vain(transaction, job)
    if count:
        longer = base_seconds * min(4.0 ** min(count, 8), MAX_AFTER_ATTEMPT)
        wait = max(wait, timedelta(seconds=longer))
    note = (
        f"the reward service answers the service's probe, but not training ({count} times so far); "
        f"the next probe follows in {wait.total_seconds():.0f} s"
    )
    return AttemptWait(wait, min(job.reward_waits + 1, MAX_WAITS), note if count else "")


def _passed_in_vain(transaction: Transaction, job: JobRow) -> int:
    """How many probes have passed since the last step; 0 at the first attempt after one."""
    if job.reward_waits == 0:
        return 0
    of_job = JobEventRow.job_id == job.id
    step = select(func.max(JobEventRow.seq)).where(of_job, JobEventRow.type == "metrics")
    since = func.coalesce(step.scalar_subquery(), 0)
    passed = select(func.count()).where(
        of_job, JobEventRow.seq > since, JobEventRow.data["by"].as_string() == "probe"
    )
    return transaction.scalars(passed).one()


def _note_of_paused(
    transaction: Transaction, job: JobRow, check: RewardCheck, base_seconds: float
) -> bool:
    if check.is_back:
        values = {"not_before": transaction.now}
        message = "the reward service answers again; resuming"
        this, facts = JobRow.id == job.id, {"by": "probe"}
        moved = transitions.move(transaction, "resumed", this, message, values=values, facts=facts)
        return moved is not None
    if check.is_undecided:
        message = f"{_unreachable(check)}. Resume the job when the workers can reach it."
        _append_once(transaction, job, message)
    is_outage = bool((job.error or {}).get("is_outage"))
    _set_next(
        transaction, job, wait_before_probe(job.reward_waits, base_seconds, is_outage=is_outage)
    )
    return False


def _note_of_waiting(
    transaction: Transaction, job: JobRow, check: RewardCheck, base_seconds: float
) -> bool:
    ended_at = transaction.scalars(
        select(AttemptRow.ended_at).where(
            AttemptRow.job_id == job.id, AttemptRow.number == job.attempt
        )
    ).one_or_none()
    until_try = (ended_at or transaction.now) + WORKER_TRIES_AFTER - transaction.now
    if until_try > WORKER_TRIES_AFTER:  # the clock was set back since then
        until_try = timedelta(0)
    is_try = check.is_undecided and until_try <= timedelta(0)
    if check.is_back or is_try:
        message = "the reward service answers; waiting for a worker"
        if is_try:
            message = f"{_unreachable(check)}. A worker tries now, as it may reach it."
        this, facts = JobRow.id == job.id, {"by": "worker" if is_try else "probe"}
        values = {"not_before": transaction.now}
        moved = transitions.move(
            transaction, "reward_ready", this, message, values=values, facts=facts
        )
        return moved is not None
    wait = wait_before_probe(job.reward_waits, base_seconds, is_outage=True)
    message = f"the service got no reward from the reward service: {check.reason}"
    if check.is_undecided:
        wait = min(wait, until_try)
        minutes = WORKER_TRIES_AFTER // timedelta(minutes=1)
        message = (
            f"{_unreachable(check)}. It tries again; a worker, which may reach it, tries once in "
            f"{minutes} minutes."
        )
    _append_once(transaction, job, message)
    job.status_message = message
    _set_next(transaction, job, wait)
    return False


def _append_once(transaction: Transaction, job: JobRow, message: str) -> None:
    """Append an event about a probe, unless it is the job's newest one already."""
    newest = select(JobEventRow.message).where(JobEventRow.job_id == job.id)
    newest = newest.order_by(JobEventRow.seq.desc()).limit(1)
    if transaction.scalars(newest).one_or_none() != message:
        data = {"kind": "reward_probe", "by": "service", "attempt": job.attempt}
        events.append(transaction, job.id, [events.NewEvent(message, level="warn", data=data)])


def _unreachable(check: RewardCheck) -> str:
    return f"the service cannot connect to the reward service: {check.reason}"


def _set_next(transaction: Transaction, job: JobRow, wait: timedelta) -> None:
    job.not_before, job.not_before_set_at = transaction.now + wait, transaction.now
    job.reward_waits = min(job.reward_waits + 1, MAX_WAITS)
    transaction.flush()


def wait_before_probe(waits: int, base_seconds: float, *, is_outage: bool) -> timedelta:
    """The wait before the next probe of a job's reward services.

    After an outage it is ``base_seconds`` at first, and doubles up to 12 times that. If the service
    rejected requests or broke the contract, a person has to change something, and all waits are 12
    times longer.

    Args:
        waits: Probes, pauses and attempts without a reward in a row so far.
        base_seconds: `Settings.reward_probe_seconds`.
        is_outage: Whether the failure may pass by itself.
    """
    first = base_seconds if is_outage else 12 * base_seconds
    return timedelta(seconds=min(first * 2.0**waits, 12 * first))
