"""Which rows of an attempt are the job's, and which ones were rewound.

An attempt starts from a checkpoint. What earlier attempts did after the checkpoint's step is done
again. A job that is stopped may end with a checkpoint too, and then what came after its step is not
part of the model. So those rows are rewound: they are kept, and shown only to a reader that asks
for them. That depends on steps alone, so it does not matter when a row arrives.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import InstrumentedAttribute, aliased

from dar.protocol.base import MAX_COUNT
from service.store.database import Transaction
from service.store.tables import AttemptRow, JobRow

Column = InstrumentedAttribute[Any]


def last_steps(transaction: Transaction, job_id: str) -> Mapping[int, int]:
    """The last step of each attempt that is the job's: the start of a later one, or the job's end.

    The earliest start of all later attempts counts, because an attempt may start from an older
    checkpoint than the attempt before it.
    """
    starts = transaction.execute(
        select(AttemptRow.number, AttemptRow.start_step)
        .where(AttemptRow.job_id == job_id)
        .order_by(AttemptRow.number.desc())
    ).all()
    found, last = {}, end_of(transaction, job_id)
    for number, start in starts:
        found[number] = last
        last = min(last, start)
    return found


def end_of(transaction: Transaction, job_id: str) -> int:
    """The step of the checkpoint that a job has ended with; without one there is no limit.

    A job that was cancelled or has failed has no such step: it may be resumed.
    """
    end = transaction.scalars(
        select(JobRow.step).where(JobRow.id == job_id, JobRow.status == "succeeded")
    ).one_or_none()
    return MAX_COUNT if end is None else end


def is_rewound(last: Mapping[int, int], attempt: int | None, step: int | None) -> bool:
    """Whether a row is rewound; ``last`` is the result of `last_steps`."""
    return attempt is not None and step is not None and step > last.get(attempt, MAX_COUNT)


def last_step(transaction: Transaction, job_id: str, attempt: int) -> int:
    """The last step of one attempt that is the job's; see `last_steps`."""
    earliest = func.coalesce(func.min(AttemptRow.start_step), MAX_COUNT)
    start = transaction.scalars(
        select(earliest).where(AttemptRow.job_id == job_id, AttemptRow.number > attempt)
    ).one()
    return min(start, end_of(transaction, job_id))


def is_kept(job_id: str, attempt: Column, step: Column) -> ColumnElement[bool]:
    """The condition that a row with these columns is the job's; a row without a step is."""
    later = aliased(AttemptRow)
    rewinding = select(later.number).where(
        later.job_id == job_id, later.number > attempt, later.start_step < step
    )
    ended = select(JobRow.id).where(
        JobRow.id == job_id, JobRow.status == "succeeded", JobRow.step < step
    )
    return ~rewinding.exists() & ~ended.correlate_except(JobRow).exists()
