"""Events of a job: only appended, and numbered from 1 without gaps."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from sqlalchemy import ColumnElement, and_, false, func, not_, or_, select, update

from dar.protocol.events import EventType, Level
from dar.protocol.ids import new_id
from dar.protocol.status import JobStatus
from dar.protocol.stream import STREAM_TYPES, StreamType
from service.store import rewinds
from service.store.database import Transaction
from service.store.paging import Cursor, Slice, page
from service.store.tables import JobEventRow, JobRow

LISTED: frozenset[StreamType] = frozenset(STREAM_TYPES) - {"sample"}
"""What OpenAI's list of events has: clients of earlier versions know no other."""
CHECKPOINT_KINDS = (
    "checkpoint",
    "checkpoint_deleted",
    "checkpoint_damaged",
    "checkpoint_whole",
    "checkpoint_expired",
    "checkpoint_promoted",
)
"""``data.kind`` of events about checkpoints."""
SAMPLES_KIND = "samples"
"""``data.kind`` of a trainer's event about stored samples, whose type is ``sample`` for clients.

The stored type is ``message``, as replicas of earlier versions can show no other.
"""


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event without its number yet. Without ``at`` its time is now."""

    message: str
    level: Level = "info"
    type: EventType = "message"
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
    transaction.news.add(job_id)
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
    transaction: Transaction,
    job_id: str,
    cursor: Cursor,
    *,
    rewound: bool,
    types: Collection[StreamType] = LISTED,
) -> Slice[JobEventRow]:
    """One page of a job's events.

    Args:
        transaction: Where they are read.
        job_id: The job.
        cursor: The page. Its edge may be a rewound event.
        rewound: Whether to list rewound events too.
        types: Which events.
    """
    every = select(JobEventRow).where(JobEventRow.job_id == job_id)
    wanted = every.where(_is_of(types))
    kept = rewinds.is_kept(job_id, JobEventRow.attempt, JobEventRow.step)
    return page(
        transaction,
        wanted if rewound else wanted.where(kept),
        JobEventRow.id,
        (JobEventRow.seq,),
        cursor,
        edges=every,
    )


def read_after(
    transaction: Transaction,
    job_id: str,
    seq: int,
    limit: int,
    *,
    rewound: bool = True,
    types: Collection[StreamType] = STREAM_TYPES,
) -> Sequence[JobEventRow]:
    """The first ``limit`` events of a job after the one with the number ``seq``, oldest first."""
    statement = select(JobEventRow).where(JobEventRow.job_id == job_id, JobEventRow.seq > seq)
    if len(types) < len(STREAM_TYPES):
        statement = statement.where(_is_of(types))
    if not rewound:
        kept = rewinds.is_kept(job_id, JobEventRow.attempt, JobEventRow.step)
        statement = statement.where(kept)
    return transaction.scalars(statement.order_by(JobEventRow.seq).limit(limit)).all()


def request_of(transaction: Transaction, job_id: str) -> str | None:
    """The id of the request that submitted a job; None: its first event does not have it."""
    first = transaction.get(JobEventRow, (job_id, 1))
    found = None if first is None else (first.data or {}).get("request_id")
    return found if isinstance(found, str) else None


def newest_seqs(
    transaction: Transaction, job_ids: Sequence[str]
) -> Mapping[str, tuple[int, JobStatus]]:
    """The number of the newest event of each job, and its status, without deleted jobs."""
    found = transaction.execute(
        select(JobRow.id, JobRow.event_seq, JobRow.status).where(
            JobRow.id.in_(job_ids), JobRow.deleted_at.is_(None)
        )
    )
    return {row.id: (row.event_seq, cast("JobStatus", row.status)) for row in found}


def stream_type(event: JobEventRow) -> StreamType:
    """What a stream calls an event. `_is_of` is the same as a condition."""
    if event.type == "metrics":
        return "metrics"
    kind = (event.data or {}).get("kind")
    if event.attempt is not None and kind == SAMPLES_KIND:
        return "sample"
    if event.attempt is None and kind == "status":
        return "status"
    return "checkpoint" if event.attempt is None and kind in CHECKPOINT_KINDS else "event"


def _is_of(types: Collection[StreamType]) -> ColumnElement[bool]:
    message, kind = JobEventRow.type == "message", JobEventRow.data["kind"].as_string()
    is_own = and_(message, JobEventRow.attempt.is_(None))
    is_sample = and_(
        message, JobEventRow.attempt.is_not(None), func.coalesce(kind == SAMPLES_KIND, false())
    )
    is_status, is_checkpoint = (
        and_(is_own, kind == "status"),
        and_(is_own, kind.in_(CHECKPOINT_KINDS)),
    )
    other = func.coalesce(kind.in_(("status", *CHECKPOINT_KINDS)), false())
    conditions: dict[StreamType, ColumnElement[bool]] = {
        "metrics": JobEventRow.type == "metrics",
        "sample": is_sample,
        "status": is_status,
        "checkpoint": is_checkpoint,
        "event": and_(message, not_(is_sample), or_(JobEventRow.attempt.is_not(None), not_(other))),
    }
    if frozenset(types) == LISTED:
        return not_(is_sample)
    return or_(*(conditions[name] for name in types))
