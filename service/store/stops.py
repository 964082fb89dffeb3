"""Stops: a job ends before its last step, and succeeds with the model that it has so far.

A user asks for it, or a limit of the spec is reached. The trainer then finishes its step and writes
a checkpoint. If the attempt ends in another way, the job succeeds with its newest checkpoint. A job
without one is tried again, for one step.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import or_, select, update

from dar.protocol.spec import Limits
from dar.protocol.worker import RewardsRow
from service.store import best_checkpoint, checkpoints, events, transitions
from service.store.database import Transaction
from service.store.tables import AttemptRow, CheckpointRow, JobRow


def request(transaction: Transaction, job: JobRow, message: str) -> JobRow | None:
    """Ask the worker of a running job to stop; None: the job does not run, or is cancelled."""
    return _ask(transaction, "stop_requested", job, message)


def succeed(
    transaction: Transaction, name: transitions.MoveName, job: JobRow, final: CheckpointRow
) -> JobRow | None:
    """End a job with the model of its newest checkpoint, or with ``keep_best`` of its best.

    Args:
        transaction: The transaction to write in.
        name: ``succeeded``, or ``stopped`` if no attempt reports it.
        job: The job.
        final: Its newest checkpoint.
    """
    is_early = final.step < job.total_steps
    what = (
        f"stopped after step {final.step} of {job.total_steps}"
        if is_early
        else f"trained {job.total_steps} steps"
    )
    result = best_checkpoint.result_of(transaction, job, final)
    which = "" if result.id == final.id else f" of step {result.step}, the best checkpoint"
    values: dict[str, object] = {
        "step": final.step,
        "latest_checkpoint_id": final.id,
        "result_checkpoint_id": result.id,
    }
    if name == "stopped":  # steps after the checkpoint are not part of the model
        values["tokens"] = checkpoints.trained_tokens(final)
        values["stop_requested_at"] = job.stop_requested_at or transaction.now
    return transitions.move(
        transaction,
        name,
        JobRow.id == job.id,
        f"{what}; the result is the model {job.model_name}{which}",
        values=values,
        facts={"fine_tuned_model": job.model_name, "step": final.step},
    )


def finish(transaction: Transaction, job: JobRow) -> JobRow | None:
    """End a job with its newest checkpoint; None: it has none."""
    final = checkpoints.newest(transaction, job.id)
    return None if final is None else succeed(transaction, "stopped", job, final)


def finish_if_due(transaction: Transaction, job: JobRow) -> JobRow | None:
    """`finish` for a job that is to stop, whose attempt has ended otherwise."""
    return None if job.stop_requested_at is None else finish(transaction, job)


# --- limits ------------------------------------------------------------------------------------


def count_reward_calls(
    transaction: Transaction, job: JobRow, reports: Sequence[RewardsRow]
) -> None:
    """Count the requests in new reports of a trainer, and stop the job at its limit.

    Those of a rewound step count too, also if they arrive late: they were sent, and paid for.
    """
    calls = sum(one.count + one.retries for row in reports for one in row.requests)
    if not calls:
        return
    total = job.reward_calls + calls
    transaction.execute(update(JobRow).where(JobRow.id == job.id).values(reward_calls=total))
    limit = _limits(job).max_reward_calls
    if limit is not None and total >= limit:
        _reach(transaction, job, f"limits.max_reward_calls: {total} of {limit} requests were sent")


def over_time(transaction: Transaction) -> Sequence[str]:
    """Jobs to stop by `check_time`: those that run, or wait with a model to end with."""
    limit = JobRow.spec[("method", "dar", "limits", "max_seconds")].as_float()
    limits = transaction.execute(
        select(JobRow.id, limit).where(
            JobRow.status.in_(("running", "pausing", "queued")),
            or_(JobRow.status != "queued", JobRow.latest_checkpoint_id.is_not(None)),
            JobRow.started_at.is_not(None),
            JobRow.stop_requested_at.is_(None),
            JobRow.cancel_requested_at.is_(None),
            limit.is_not(None),
        )
    ).all()
    if not limits:
        return ()
    ran = _seconds_run(transaction, [job_id for job_id, _ in limits])
    return [job_id for job_id, seconds in limits if ran.get(job_id, 0.0) >= seconds]


def check_time(transaction: Transaction, job_id: str) -> bool:
    """Stop a job if its attempts have run for as long as they may; returns whether they have."""
    job = transaction.scalars(select(JobRow).where(JobRow.id == job_id).with_for_update()).one()
    limit = _limits(job).max_seconds
    seconds = _seconds_run(transaction, [job_id]).get(job_id, 0.0)
    if limit is None or seconds < limit:
        return False
    return _reach(transaction, job, f"limits.max_seconds: it ran for {seconds:.0f} of {limit:g} s")


def starts(transaction: Transaction) -> Mapping[str, datetime]:
    """When each running attempt has started, by its lease."""
    rows = transaction.execute(
        select(AttemptRow.lease_id, AttemptRow.started_at).where(AttemptRow.status == "running")
    ).all()
    return {lease_id: started_at for lease_id, started_at in rows}  # noqa: C416 - `dict(rows)` has no type that fits


def shift_starts(
    transaction: Transaction, forward: timedelta, before: Mapping[str, datetime]
) -> None:
    """Move the starts of running attempts along with a clock that was set ``forward``.

    Args:
        transaction: The transaction to write in.
        forward: By how much the clock was set.
        before: `starts` before that. One that has changed was moved by another replica.
    """
    for lease_id, started_at in sorted(before.items()):
        transaction.execute(
            update(AttemptRow)
            .where(
                AttemptRow.lease_id == lease_id,
                AttemptRow.status == "running",
                AttemptRow.started_at == started_at,
            )
            .values(started_at=started_at + forward)
            .execution_options(synchronize_session=False)
        )


def _seconds_run(transaction: Transaction, job_ids: Collection[str]) -> Mapping[str, float]:
    """For how long all attempts of some jobs have run."""
    attempts = transaction.execute(
        select(AttemptRow.job_id, AttemptRow.started_at, AttemptRow.ended_at).where(
            AttemptRow.job_id.in_(job_ids)
        )
    ).all()
    ran: dict[str, float] = {}
    for job_id, start, end in attempts:
        ran[job_id] = ran.get(job_id, 0.0) + ((end or transaction.now) - start).total_seconds()
    return ran


def _reach(transaction: Transaction, job: JobRow, what: str) -> bool:
    """Stop a job because of a limit; returns whether it is stopped by that."""
    if job.stop_requested_at is not None:
        return False
    message = f"a limit of the job is reached, so it ends with its present step; {what}"
    if _ask(transaction, "limit_reached", job, message) is not None:
        return True
    if job.status != "queued" or checkpoints.newest(transaction, job.id) is None:
        return False
    data = {"kind": "limit", "attempt": job.attempt}
    events.append(transaction, job.id, [events.NewEvent(message, level="warn", data=data)])
    return finish(transaction, job) is not None


def _ask(
    transaction: Transaction, name: transitions.MoveName, job: JobRow, message: str
) -> JobRow | None:
    values = {"stop_requested_at": transaction.now}
    return transitions.move(transaction, name, JobRow.id == job.id, message, values=values)


def _limits(job: JobRow) -> Limits:
    return job.parsed_spec.dar.limits
