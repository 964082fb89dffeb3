"""The end of an attempt, and what follows for its job.

A worker that lost the reply calls again: the same call of the same attempt gets the same reply.
"""

import random
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import and_, update

from dar.errors import ConflictError, RewardBudgetError
from dar.protocol.status import AttemptStatus
from dar.protocol.worker import NO_PROGRESS, Complete, Fail, FailureOwner, Outcome, Release
from service.store import checkpoints, poison, reward_pauses, stops, transitions, workers
from service.store.database import Transaction
from service.store.fence import Held, check_fence, lock
from service.store.poison import Failure
from service.store.tables import AttemptRow, JobRow

MAX_BACKOFF_SECONDS = 600.0
PROBE_SECONDS = 5.0
CAUSES: Mapping[FailureOwner | None, str] = {
    None: (
        "Usual causes: the trainer runs out of memory (a smaller batch_size or max_new_tokens "
        "helps), the machine fails, or this job's data or model make the trainer crash."
    ),
    "service": (
        "The cause lies with the service or its trainer; give its operator the id of this job, and "
        "resume the job when the cause is mended."
    ),
}
"""What to do about a job whose last attempt failed, by the owner of the failure; None: unknown."""
UNKNOWN = "unknown"
"""In place of an owner that a worker did not report."""
PAUSED = "paused; resume it to continue from its newest checkpoint."


LOST = "worker_lost"
"""Code of an attempt whose worker is gone."""


def lose(transaction: Transaction, held: Held, why: str) -> None:
    """End an attempt whose worker is gone, and retry its job unless that is given up."""
    _retry(transaction, held, Failure("lost", LOST, why, "worker"), call=None)


def take_back(transaction: Transaction, held: Held, why: str) -> None:
    """End an attempt because of its worker, so that another one goes on; nothing counts."""
    job = held.job
    if job.cancel_requested_at is not None:
        _confirm_cancel(transaction, held, "cancelled", None)
        return
    moved = stops.finish_if_due(transaction, job)
    if moved is None:
        name: transitions.MoveName = "paused" if job.status == "pausing" else "drained"
        values: dict[str, Any] = {} if name == "paused" else {"not_before": transaction.now}
        moved = transitions.move(transaction, name, JobRow.id == job.id, why, values=values)
    _end(transaction, held, "drained", None, moved)


def end(
    transaction: Transaction,
    lease_id: str,
    said: Complete | Fail | Release,
    probe_seconds: float = PROBE_SECONDS,
) -> Outcome:
    """End an attempt as its worker reports it.

    Args:
        transaction: The transaction to write in.
        lease_id: The attempt's lease.
        said: The report.
        probe_seconds: `Settings.reward_probe_seconds`.

    Raises:
        FencedError: The lease has ended.
        ConflictError: The job cannot end this way.
    """
    held = lock(transaction, lease_id)
    call, earlier = type(said).__name__.lower(), held.attempt.outcome
    if held.attempt.number == said.attempt and earlier is not None and earlier["call"] == call:
        return Outcome(status=earlier["status"], status_detail=earlier["status_detail"])
    check_fence(held, said.attempt)
    if isinstance(said, Complete):
        return _complete(transaction, held, said)
    if isinstance(said, Fail):
        return _fail(transaction, held, said)
    return _release(transaction, held, said, probe_seconds)


def _complete(transaction: Transaction, held: Held, said: Complete) -> Outcome:
    """End an attempt that trained to the last step, or to that in which it was stopped.

    Raises:
        ConflictError: Rows are missing (``spool_behind``), or the final checkpoint is missing or
            damaged (``checkpoint_missing``).
    """
    job, attempt = held.job, held.attempt
    if attempt.acked_seq != said.last_seq:
        raise ConflictError(
            f"the attempt has rows up to {said.last_seq}, but {attempt.acked_seq} is the last one "
            "committed; send the rest of the spool first",
            code="spool_behind",
        )
    final = checkpoints.find(transaction, job.id, said.checkpoint_id)
    is_early = final is not None and final.step < job.total_steps
    if final is None or not final.is_whole or (is_early and job.stop_requested_at is None):
        raise ConflictError(
            f"checkpoint {said.checkpoint_id!r} is not available, is damaged, or is not of step "
            f"{job.total_steps}; upload and commit the final checkpoint first",
            code="checkpoint_missing",
        )
    moved = stops.succeed(transaction, "succeeded", job, final)
    return _end(transaction, held, "succeeded", "complete", moved)


def _fail(transaction: Transaction, held: Held, said: Fail) -> Outcome:
    """End a failed attempt: a user's error fails the job, after others it is retried if it may."""
    job = held.job
    status: AttemptStatus = "lost" if said.code == NO_PROGRESS else "failed"
    failure = Failure(status, said.code, said.message, said.owner, said.counts)
    if said.kind == "transient":
        return _retry(transaction, held, failure, call="fail")
    if job.cancel_requested_at is not None:
        return _confirm_cancel(transaction, held, "failed", "fail")
    error = {"code": said.code, "message": said.message, "param": said.param}
    facts = {**error, "owner": said.owner}
    values: dict[str, Any] = {"error": error}
    if said.code == RewardBudgetError.code:
        values["status_detail"] = "reward_budget_exhausted"
    moved = transitions.move(
        transaction, "failed", JobRow.id == job.id, said.message, values=values, facts=facts
    )
    return _end(transaction, held, "failed", "fail", moved, failure)


def _release(transaction: Transaction, held: Held, said: Release, probe_seconds: float) -> Outcome:
    """End an attempt that gives its job back, or that confirms a cancellation or a pause.

    A job that is to stop succeeds with its newest checkpoint. A job that is pausing becomes paused,
    whatever reason the attempt gives. A job whose pause was withdrawn goes back into the queue.

    Raises:
        ConflictError: It confirms a cancellation that was not requested.
    """
    job = held.job
    if job.cancel_requested_at is not None:
        return _confirm_cancel(transaction, held, "cancelled", "release")
    if said.reason == "cancelled":
        raise ConflictError(f"no cancellation of job {job.id} was requested")
    this = JobRow.id == job.id
    failure: Failure | None = None
    if (stopped := stops.finish_if_due(transaction, job)) is not None:
        moved: JobRow | None = stopped
    elif job.status == "pausing":
        message = said.message or PAUSED
        moved = transitions.move(transaction, "paused", this, message)
    elif said.reason == "paused_reward":
        moved = _pause_for_reward(transaction, job, said, probe_seconds)
        failure = Failure("drained", said.code or "reward_error", said.message or "", "reward")
    elif said.reason in {"drained", "paused"}:
        values: dict[str, Any] = {"not_before": transaction.now}
        message = said.message or "the worker was stopped; waiting for another slot"
        moved = transitions.move(transaction, "drained", this, message, values=values)
    else:
        moved = _wait_for_reward(transaction, held, said, probe_seconds)
        failure = Failure("drained", "reward_unavailable", said.message or "", "reward")
    return _end(transaction, held, "drained", "release", moved, failure)


def _wait_for_reward(
    transaction: Transaction, held: Held, said: Release, probe_seconds: float
) -> JobRow | None:
    """Queue a job that had no reward yet; the service probes before a worker may claim it again."""
    job, node = held.job, held.attempt.node
    wait = reward_pauses.wait_after_attempt(transaction, job, probe_seconds, is_outage=True)
    values = {"not_before": transaction.now + wait.until_probe, "reward_waits": wait.waits}
    why = said.message or "the reward service does not respond"
    message = _with_note(f"the worker on {node} got no reward: {why}", wait.note)
    this, facts = JobRow.id == job.id, {"by": "worker", "node": node}
    return transitions.move(transaction, "reward_down", this, message, values=values, facts=facts)


def _pause_for_reward(
    transaction: Transaction, job: JobRow, said: Release, probe_seconds: float
) -> JobRow | None:
    message = said.message or "too many completions got no reward"
    error = {"code": said.code or "reward_error", "message": message, "param": None}
    kept = {**error, "is_outage": said.is_outage}
    wait = reward_pauses.wait_after_attempt(
        transaction, job, probe_seconds, is_outage=said.is_outage
    )
    values = {
        "error": kept,
        "not_before": transaction.now + wait.until_probe,
        "reward_waits": wait.waits,
    }
    message = _with_note(message, wait.note)
    this = JobRow.id == job.id
    return transitions.move(
        transaction, "reward_paused", this, message, values=values, facts={"code": error["code"]}
    )


def _with_note(message: str, note: str) -> str:
    return f"{message.rstrip('.')}; {note}" if note else message


def _retry(transaction: Transaction, held: Held, failure: Failure, *, call: str | None) -> Outcome:
    """End a lost or failed attempt: its job is tried again, unless it is given up."""
    job, status, why = held.job, failure.status, failure.message
    if job.cancel_requested_at is not None:
        return _confirm_cancel(transaction, held, status, call)
    if (stopped := stops.finish_if_due(transaction, job)) is not None:
        return _end(transaction, held, status, call, stopped, failure)
    tally = poison.tally(transaction, held, failure)
    values: dict[str, Any] = {
        "fruitless_attempts": tally.own,
        "failed_attempts": tally.failed,
    }
    facts = {"reason": status, "node": held.attempt.node, "owner": failure.owner}
    name: transitions.MoveName = "lost" if status == "lost" else "retried"
    message = why
    if tally.verdict is not None:
        cause = CAUSES.get(failure.owner, CAUSES[None])
        name, message = "poisoned", f"{tally.verdict}; the last one: {why.rstrip('.')}. {cause}"
        values["error"] = {"code": "poison", "message": message, "param": None}
    elif job.status == "pausing":
        name, message = "paused", f"{PAUSED} Its last attempt was lost or failed: {why}"
    else:
        pause = 0.0 if status == "lost" else _backoff(tally.failed)
        values["not_before"] = transaction.now + timedelta(seconds=pause)
    moved = transitions.move(
        transaction, name, JobRow.id == job.id, message, values=values, facts=facts
    )
    return _end(transaction, held, status, call, moved, failure)


def _backoff(failed: int) -> float:
    """Seconds before the next attempt, after so many in a row that failed."""
    pause = min(MAX_BACKOFF_SECONDS, 2.0 ** min(failed, 16))
    return pause * random.uniform(0.5, 1.0)  # noqa: S311 - spreads retries; no secret depends on it


def _confirm_cancel(
    transaction: Transaction, held: Held, status: AttemptStatus, call: str | None
) -> Outcome:
    where = and_(JobRow.id == held.job.id, JobRow.attempt == held.attempt.number)
    moved = transitions.move(transaction, "cancel_confirmed", where, "cancelled while it ran")
    return _end(transaction, held, status, call, moved)


def _end(
    transaction: Transaction,
    held: Held,
    status: AttemptStatus,
    call: str | None,
    job: JobRow | None,
    failure: Failure | None = None,
) -> Outcome:
    if job is None:
        raise ConflictError(
            f"job {held.job.id} is {held.job.status}; attempt {held.attempt.number} cannot end this way"
        )
    owner = None if failure is None else failure.owner
    outcome = {
        "call": call,
        "status": job.status,
        "status_detail": job.status_detail,
        "owner": owner,
    }
    values: dict[str, Any] = {"status": status, "ended_at": transaction.now, "outcome": outcome}
    if failure is not None:
        values["owner"] = owner
        values["failure"] = {"code": failure.code, "message": failure.message}
        counts = dict(job.failures or {})
        counts[owner or UNKNOWN] = counts.get(owner or UNKNOWN, 0) + 1
        transaction.execute(update(JobRow).where(JobRow.id == job.id).values(failures=counts))
    transaction.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == job.id, AttemptRow.number == held.attempt.number)
        .values(values)
    )
    _note_worker(transaction, held, status, failure)
    return Outcome(status=job.status, status_detail=job.status_detail)


def _note_worker(
    transaction: Transaction, held: Held, status: AttemptStatus, failure: Failure | None
) -> None:
    """Let the worker of a failed attempt wait if it was its fault, else forget earlier faults."""
    if status == "lost":
        return
    is_at_fault = failure is not None and failure.owner == "worker"
    if not is_at_fault or held.job.counts_from > held.attempt.number:
        workers.note_work(transaction, held.attempt)
    if is_at_fault and failure is not None:
        workers.note_fault(transaction, held.attempt, failure.code, failure.message)
