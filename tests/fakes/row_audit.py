"""What must be true of the rows of a job, whatever has happened to its attempts."""

from collections.abc import Callable

from sqlalchemy import select

from service.store import metrics, tables
from service.store.database import Database


def audit_rows(
    database: Database, job_id: str, series: str, value_of: Callable[[int], float]
) -> list[str]:
    """What is wrong with the rows of a job; nothing, if all is well.

    Each attempt has the rows 1 to n without a gap, and each step that the job has done has one
    point of ``series``, with the value of ``value_of``.
    """
    problems = []
    with database.read() as transaction:
        job = transaction.get_one(tables.JobRow, job_id)
        for number, acked in transaction.execute(
            select(tables.AttemptRow.number, tables.AttemptRow.acked_seq).where(
                tables.AttemptRow.job_id == job_id
            )
        ):
            seqs = transaction.scalars(
                select(tables.SpoolRow.seq)
                .where(tables.SpoolRow.job_id == job_id, tables.SpoolRow.attempt == number)
                .order_by(tables.SpoolRow.seq)
            ).all()
            if list(seqs) != list(range(1, acked + 1)):
                problems.append(f"attempt {number}: acknowledged {acked}, but has rows {seqs}")
        points = metrics.read(transaction, job_id).get(series, metrics.Points())
    if points.step != list(range(1, job.step + 1)):
        problems.append(f"{job.step} steps are done, but {series} has steps {points.step}")
    problems += [
        f"{series} of step {step} is {value}"
        for step, value in zip(points.step, points.value, strict=True)
        if value != value_of(step)
    ]
    return problems
