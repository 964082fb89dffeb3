"""The states of a job and all moves between them. Nothing else writes ``jobs.status``.

A move is one conditional UPDATE, with its event in the same transaction. If the job is not in one
of the move's sources, nothing is changed and `move` returns None. ``cancel_requested_at`` also
decides which moves are open: a job that is being cancelled never goes back into the queue.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, or_, update

from dar.protocol.events import Level
from dar.protocol.status import TERMINAL, JobStatus, StatusDetail
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
    "stop_requested",
    "limit_reached",
    "stopped",
    "reward_paused",
    "reward_ready",
    "resumed",
    "restarted",
]


@dataclass(frozen=True, slots=True)
class Move:
    """A row of the state table."""

    sources: tuple[JobStatus, ...]
    target: JobStatus
    detail: StatusDetail | None = None
    is_cancelling: bool | None = None
    """Guard: whether a cancellation must have been requested, or must not; None: either."""
    level: Level = "info"
    is_last_in_queue: bool = False
    """Whether the job then waits behind all jobs that are in the queue already."""


MOVES: Mapping[MoveName, Move] = {
    "claimed": Move(("queued",), "running", "starting"),
    # Reported by an attempt.
    "succeeded": Move(("running", "pausing"), "succeeded"),
    "failed": Move(("running", "pausing"), "failed", "user_error", level="error"),
    "retried": Move(("running",), "queued", "backoff", is_cancelling=False, level="warn"),
    "drained": Move(("running",), "queued", is_cancelling=False),
    "reward_paused": Move(("running",), "paused", "reward", is_cancelling=False, level="warn"),
    "reward_down": Move(
        ("running",), "queued", "waiting_for_reward", is_cancelling=False, level="warn"
    ),
    # Found by the service.
    "lost": Move(("running",), "queued", is_cancelling=False, level="warn"),
    "reward_ready": Move(("queued",), "queued", is_last_in_queue=True),
    "poisoned": Move(
        ("running", "pausing"), "failed", "poison", is_cancelling=False, level="error"
    ),
    # Requested by a user.
    "cancelled": Move(("queued", "paused"), "cancelled"),
    "cancel_requested": Move(("running", "pausing"), "running", "cancelling", is_cancelling=False),
    "cancel_confirmed": Move(("running",), "cancelled", is_cancelling=True),
    "pause_requested": Move(("running",), "pausing", is_cancelling=False),
    "pause_withdrawn": Move(("pausing",), "running", is_cancelling=False),
    # Also when the attempt of a pausing job ends in any way that does not end the job.
    "paused": Move(("queued", "pausing"), "paused", "by_user", is_cancelling=False),
    "stop_requested": Move(("running", "pausing"), "running", "stopping", is_cancelling=False),
    "limit_reached": Move(
        ("running", "pausing"), "running", "stopping", is_cancelling=False, level="warn"
    ),
    # With its newest checkpoint, without a worker or when its attempt ends otherwise than asked.
    "stopped": Move(("queued", "paused", "running", "pausing"), "succeeded", is_cancelling=False),
    "resumed": Move(("paused",), "queued", is_last_in_queue=True),
    "restarted": Move(("failed", "cancelled"), "queued", is_last_in_queue=True),
}


def has_waited(
    job: type[JobRow], now: datetime, longer: timedelta = timedelta(0)
) -> ColumnElement[bool]:
    """Whether the wait of a job ended at least ``longer`` ago.

    A wait that seems to begin later than now was set before the clock was set back. It is over too:
    nobody knows how much of it is left, and it must not wait until the clock catches up.
    """
    return or_(job.not_before <= now - longer, job.not_before_set_at > now)


def move(
    transaction: Transaction,
    name: MoveName,
    job: ColumnElement[bool],
    message: str,
    *,
    values: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> JobRow | None:
    """Make a move, if the job is in one of its sources.

    Args:
        transaction: The transaction to write in.
        name: Row of `MOVES`.
        job: Selects the job, with any further guards.
        message: The event's message and the job's ``status_message``.
        values: Other columns to set. ``status_detail`` replaces that of the row of `MOVES`, and
            ``error`` is null without them: a job has an error only in the state that the error
            led to.
        facts: Added to the event's data.

    Returns:
        The job after the move; None if it was in no source of the move and nothing was changed.
    """
    row = MOVES[name]
    is_over = row.target in TERMINAL
    place = {"queued_at": transaction.now} if row.is_last_in_queue else {}
    if values is not None and "not_before" in values:
        place["not_before_set_at"] = transaction.now
    statement = (
        update(JobRow)
        .where(job, JobRow.status.in_(row.sources))
        .values(
            {
                "status": row.target,
                "status_detail": row.detail,
                "status_message": message,
                "finished_at": transaction.now if is_over else None,
                "error": None,
                "event_seq": JobRow.event_seq + 1,
                **place,
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
