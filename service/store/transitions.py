"""The states of a job and every move between them. Nothing else writes ``jobs.status``.

A move is one conditional UPDATE that appends its event in the same transaction; when the row is no longer in one of the
move's sources, nothing happens and `move` says so. ``cancel_requested_at`` is the one flag that changes what may follow:
a job that is to be cancelled never goes back into the queue.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, update

from dar.protocol.events import Level
from dar.protocol.status import TERMINAL, AttemptStatus, JobStatus, StatusDetail
from service.store import events
from service.store.database import Transaction
from service.store.tables import JobRow

MoveName = Literal[
    "claimed",
    "succeeded",
    "failed",
    "retried",
    "drained",
    "reward_down",
    "lost",
    "poisoned",
    "cancelled",
    "cancel_requested",
    "cancel_confirmed",
    "pause_requested",
    "pause_withdrawn",
    "paused",
    "reward_paused",
    "resumed",
    "restarted",
]


@dataclass(frozen=True, slots=True)
class Move:
    """One row of the state table."""

    sources: frozenset[JobStatus]
    target: JobStatus
    detail: StatusDetail | None = None
    attempt: AttemptStatus | None = None
    """What becomes of the running attempt."""
    is_cancelling: bool | None = None
    """Guard: whether a cancellation must (not) have been asked for; None: either."""
    level: Level = "info"


def _of(*statuses: JobStatus) -> frozenset[JobStatus]:
    return frozenset(statuses)


MOVES: Mapping[MoveName, Move] = {
    "claimed": Move(_of("queued"), "running", "starting"),
    # What an attempt reports.
    "succeeded": Move(_of("running", "pausing"), "succeeded", None, "succeeded"),
    "failed": Move(_of("running", "pausing"), "failed", "user_error", "failed", level="error"),
    "retried": Move(
        _of("running"), "queued", "backoff", "failed", is_cancelling=False, level="warn"
    ),
    "drained": Move(_of("running"), "queued", None, "drained", is_cancelling=False),
    "reward_paused": Move(
        _of("running"), "paused", "reward", "drained", is_cancelling=False, level="warn"
    ),
    "reward_down": Move(
        _of("running"), "queued", "waiting_for_reward", "drained", is_cancelling=False, level="warn"
    ),
    # What the service finds out.
    "lost": Move(_of("running"), "queued", None, "lost", is_cancelling=False, level="warn"),
    "poisoned": Move(
        _of("running", "pausing"), "failed", "poison", is_cancelling=False, level="error"
    ),
    # What a user asks for.
    "cancelled": Move(_of("queued", "paused"), "cancelled"),
    "cancel_requested": Move(
        _of("running", "pausing"), "running", "cancelling", is_cancelling=False
    ),
    "cancel_confirmed": Move(_of("running"), "cancelled", None, "cancelled", is_cancelling=True),
    "pause_requested": Move(_of("running"), "pausing", is_cancelling=False),
    "pause_withdrawn": Move(_of("pausing"), "running", is_cancelling=False),
    # However the attempt of a job in ``pausing`` ends, unless it ends the job.
    "paused": Move(_of("queued", "pausing"), "paused", "by_user", is_cancelling=False),
    "resumed": Move(_of("paused"), "queued"),
    "restarted": Move(_of("failed", "cancelled"), "queued"),
}


def move(
    transaction: Transaction,
    name: MoveName,
    job: ColumnElement[bool],
    message: str,
    *,
    values: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> JobRow | None:
    """Make a move if the job is still where it may start from.

    Args:
        transaction: Where it happens; the event goes into the same one.
        name: Which row of `MOVES`.
        job: Picks the job, and guards it further: ``and_(Job.id == ..., Job.attempt == ...)``.
        message: The move in words: the event's message and the job's ``status_message``.
        values: Other columns to set at once. ``status_detail`` replaces the table's.
        facts: Added to the event's data.

    Returns:
        The job after the move; None when it was elsewhere, so that nothing was changed.
    """
    row = MOVES[name]
    is_over = row.target in TERMINAL
    statement = (
        update(JobRow)
        .where(job, JobRow.status.in_(row.sources))
        .values(
            {
                "status": row.target,
                "status_detail": row.detail,
                "status_message": message,
                "finished_at": transaction.now if is_over else None,
                "event_seq": JobRow.event_seq + 1,
                **(values or {}),
            }
        )
        .returning(JobRow)
        .execution_options(synchronize_session=False, populate_existing=True)
    )
    if row.is_cancelling is not None:
        asked = JobRow.cancel_requested_at.is_not(None)
        statement = statement.where(asked if row.is_cancelling else ~asked)
    moved = transaction.scalars(statement).one_or_none()
    if moved is None:
        return None
    data = {
        "kind": "status",
        "status": moved.status,
        "status_detail": moved.status_detail,
        "attempt": moved.attempt,
        **(facts or {}),
    }
    event = events.NewEvent(message, level=row.level, data=data)
    events.insert_at(transaction, moved.id, moved.event_seq, [event])
    return moved
