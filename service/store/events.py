"""Events of a job: only appended, and numbered from 1 without gaps."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import select, update

from dar.protocol.events import Level
from dar.protocol.ids import new_id
from service.store import rewinds
from service.store.database import Transaction
from service.store.paging import Cursor, Slice, page
from service.store.tables import JobEventRow, JobRow


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event without its number yet. Without ``at`` its time is now."""

    message: str
    level: Level = "info"
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None
    at: datetime | None = None
    attempt: int | None = None
    """Of a trainer's event: the attempt, and the step that it belongs to."""
    step: int | None = None


def append(transaction: Transaction, job_id: str, events: Sequence[NewEvent]) -> None:
    """Append ``events``. Updating ``event_seq`` locks the job, so that numbers are consecutive."""
    if not events:
        return
    last = transaction.execute(
        update(JobRow)
        .where(JobRow.id == job_id)
        .values(event_seq=JobRow.event_seq + len(events))
        .returning(JobRow.event_seq)
        .execution_options(synchronize_session=False)
    ).scalar_one()
    insert_at(transaction, job_id, last - len(events) + 1, events)


def insert_at(
    transaction: Transaction, job_id: str, first_seq: int, events: Sequence[NewEvent]
) -> None:
    """Insert ``events``. The caller has already added their number to the job's ``event_seq``."""
    transaction.insert_rows(
        JobEventRow,
        [
            {
                "id": new_id("ftevent-"),
                "job_id": job_id,
                "seq": first_seq + offset,
                "created_at": item.at or transaction.now,
                "level": item.level,
                "type": item.type,
                "message": item.message,
                "data": item.data,
                "attempt": item.attempt,
                "step": item.step,
            }
            for offset, item in enumerate(events)
        ],
    )


def list_page(
    transaction: Transaction, job_id: str, cursor: Cursor, *, rewound: bool
) -> Slice[JobEventRow]:
    """One page of a job's events.

    Args:
        transaction: Where they are read.
        job_id: The job.
        cursor: The page. Its edge may be a rewound event.
        rewound: Whether to list rewound events too.
    """
    every = select(JobEventRow).where(JobEventRow.job_id == job_id)
    kept = rewinds.is_kept(job_id, JobEventRow.attempt, JobEventRow.step)
    return page(
        transaction,
        every if rewound else every.where(kept),
        JobEventRow.id,
        (JobEventRow.seq,),
        cursor,
        edges=every,
    )
