"""The ends of trainers' logs, of the newest attempts of each job."""

from sqlalchemy import delete, select

from dar.errors import NotFoundError
from dar.protocol.worker import TrainerLog
from service.store.database import Transaction
from service.store.fence import Held
from service.store.tables import JobRow, TrainerLogRow

MOST_ATTEMPTS = 20
"""Logs that are kept of a job; those of its oldest attempts are deleted."""


def put(transaction: Transaction, held: Held, log: TrainerLog) -> None:
    """Store the end of an attempt's log in place of the one before.

    The job of ``held`` is locked, so two of these do not meet.
    """
    key = (held.job.id, held.attempt.number)
    found = transaction.get(TrainerLogRow, key)
    if found is None:
        found = TrainerLogRow(job_id=key[0], attempt=key[1])
        transaction.add(found)
        surplus = (
            select(TrainerLogRow.attempt)
            .where(TrainerLogRow.job_id == held.job.id)
            .order_by(TrainerLogRow.attempt.desc())
            .offset(MOST_ATTEMPTS - 1)
        )
        oldest = transaction.scalars(surplus).all()
        transaction.execute(
            delete(TrainerLogRow).where(
                TrainerLogRow.job_id == held.job.id, TrainerLogRow.attempt.in_(oldest)
            )
        )
    found.updated_at, found.bytes, found.text = transaction.now, log.bytes, log.text


def get(transaction: Transaction, job: JobRow, attempt: int | None) -> TrainerLogRow:
    """The end of the log of an attempt, by default of the newest that has one.

    Raises:
        NotFoundError: There is none.
    """
    statement = select(TrainerLogRow).where(TrainerLogRow.job_id == job.id)
    if attempt is not None:
        statement = statement.where(TrainerLogRow.attempt == attempt)
    found = transaction.scalars(
        statement.order_by(TrainerLogRow.attempt.desc()).limit(1)
    ).one_or_none()
    if found is None:
        which = f"job {job.id}" if attempt is None else f"attempt {attempt} of job {job.id}"
        raise NotFoundError(
            f"{which} has sent no log; a trainer's log comes with its first lines, and the newest "
            f"{MOST_ATTEMPTS} of a job are kept"
        )
    return found
