"""Metrics: one row for each attempt and step, with all values as JSON."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from sqlalchemy import Select, and_, func, select
from sqlalchemy.orm import aliased

from dar.protocol.base import MAX_COUNT
from dar.protocol.metrics import current_name, current_values
from dar.protocol.worker import MetricsRow
from service.store import rewinds
from service.store.database import Transaction
from service.store.tables import AttemptRow, JobRow, MetricRow

NEWEST_ROWS = 2


@dataclass(slots=True)
class Points:
    """One series: the i-th value belongs to the i-th step."""

    step: list[int] = field(default_factory=list)
    value: list[float | None] = field(default_factory=list)
    at: list[float] = field(default_factory=list)


def add(transaction: Transaction, job_id: str, attempt: int, rows: Sequence[MetricsRow]) -> None:
    """Store the metrics of some steps."""
    if not rows:
        return
    transaction.insert_rows(
        MetricRow,
        [
            {
                "job_id": job_id,
                "attempt": attempt,
                "seq": row.seq,
                "step": row.step,
                "at": row.at,
                "values_json": orjson.dumps(row.values).decode(),
            }
            for row in rows
        ],
    )


def last_id(transaction: Transaction, job_id: str) -> int:
    """Cursor after the newest row of a job; 0 if it has none."""
    newest = select(func.max(MetricRow.id)).where(MetricRow.job_id == job_id)
    return transaction.scalars(newest).one() or 0


def read(
    transaction: Transaction,
    job_id: str,
    *,
    names: Collection[str] | None = None,
    after: int = 0,
    from_step: int | None = None,
    to_step: int | None = None,
) -> dict[str, Points]:
    """The series of a job by the present name, each in the order of its steps.

    Rewound rows (`service.store.rewinds`) are left out. With ``after``, only steps with a row after
    that cursor are returned, replayed steps included.
    """
    last = rewinds.last_steps(transaction, job_id)
    rows = transaction.execute(_rows(job_id, after, from_step, to_step)).all()
    kept = [row for row in rows if row.step <= last.get(row.attempt, MAX_COUNT)]
    if after:
        new = {row.step for row in kept if row.id > after}
        kept = [row for row in kept if row.step in new]
    return series_of(kept, names)


def first_step_after(transaction: Transaction, job_id: str, after: int) -> int | None:
    """The lowest step with a row after the cursor ``after``; None: there is no such row."""
    found = select(func.min(MetricRow.step)).where(MetricRow.job_id == job_id, MetricRow.id > after)
    return transaction.scalars(found).one()


def read_rewound(
    transaction: Transaction,
    job_id: str,
    *,
    names: Collection[str] | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
) -> dict[int, dict[str, Points]]:
    """The series of rewound rows, by the number of their attempt."""
    last = rewinds.last_steps(transaction, job_id)
    by_attempt: dict[int, list[Any]] = {}
    for row in transaction.execute(_rows(job_id, 0, from_step, to_step)).all():
        if row.step > last.get(row.attempt, MAX_COUNT):
            by_attempt.setdefault(row.attempt, []).append(row)
    return {attempt: series_of(rows, names) for attempt, rows in sorted(by_attempt.items())}


def rewound_to(transaction: Transaction, job: JobRow, after: int) -> int | None:
    """The step that a client with the cursor ``after`` has to go back to; None: it need not.

    It is the lowest start of the attempts of which the client has seen no row, or the end of the
    job if the client has seen later steps.
    """
    seen = transaction.get(MetricRow, after)
    if seen is None or seen.job_id != job.id:
        return None
    was_shown = and_(MetricRow.job_id == job.id, MetricRow.id <= after)
    newest = seen.attempt
    if newest < job.attempt:  # that row may be a late one of an earlier attempt
        newest = transaction.scalars(select(func.max(MetricRow.attempt)).where(was_shown)).one()
    last = rewinds.last_step(transaction, job.id, newest)
    if last == MAX_COUNT:
        return None
    later = select(MetricRow.id).where(was_shown, MetricRow.step > last).limit(1)
    is_behind = newest < job.attempt or transaction.scalars(later).first() is not None
    return last if is_behind else None


def unfinished_step(transaction: Transaction, job_id: str) -> tuple[int, dict[str, float]] | None:
    """The step in which the newest attempt ended, and its reward counts.

    None: it reported none, or it runs.
    """
    found = transaction.scalars(
        select(AttemptRow.unfinished)
        .where(AttemptRow.job_id == job_id)
        .order_by(AttemptRow.number.desc())
        .limit(1)
    ).first()
    return None if found is None else (found["step"], current_values(found["values"]))


def newest_step(transaction: Transaction, job_id: str, attempt: int) -> int:
    """The last step with metrics of an attempt; 0 if it has none."""
    found = select(func.max(MetricRow.step)).where(
        MetricRow.job_id == job_id, MetricRow.attempt == attempt
    )
    return transaction.scalars(found).one() or 0


def newest_of_running(transaction: Transaction, limit: int) -> dict[str, dict[str, float | None]]:
    """The newest metrics of each running job, of at most ``limit`` jobs, the newest first.

    They are those of the present attempt. Several rows are merged, because a row of an evaluation
    has no training metrics.
    """
    running = transaction.execute(
        select(JobRow.id, JobRow.attempt)
        .where(JobRow.status == "running")
        .order_by(JobRow.id.desc())
        .limit(limit)
    ).all()
    found: dict[str, dict[str, float | None]] = {}
    for job_id, attempt in running:
        texts = transaction.scalars(
            select(MetricRow.values_json)
            .where(MetricRow.job_id == job_id, MetricRow.attempt == attempt)
            .order_by(MetricRow.id.desc())
            .limit(NEWEST_ROWS)
        ).all()
        found[job_id] = {}
        for text in reversed(texts):
            found[job_id] |= current_values(orjson.loads(text))
    return found


def series_of(rows: Sequence[Any], names: Collection[str] | None = None) -> dict[str, Points]:
    """The series in some rows, which are in the order of their steps.

    A later row of the same step replaces the values of an earlier one.
    """
    series: dict[str, Points] = {}
    wanted = None if names is None else frozenset(names)
    stored: dict[str, Points | None] = {}
    for row in rows:
        step, at = row.step, row.at
        for name, value in orjson.loads(row.values_json).items():
            if name not in stored:
                shown = current_name(name)
                is_wanted = wanted is None or shown in wanted
                stored[name] = series.setdefault(shown, Points()) if is_wanted else None
            points = stored[name]
            if points is None:
                continue
            if points.step and points.step[-1] == step:
                points.at[-1], points.value[-1] = at, value
            else:
                points.step.append(step)
                points.value.append(value)
                points.at.append(at)
    return series


def _rows(
    job_id: str, after: int, from_step: int | None, to_step: int | None
) -> Select[int, int, int, float, str]:
    statement = select(
        MetricRow.id, MetricRow.attempt, MetricRow.step, MetricRow.at, MetricRow.values_json
    ).where(MetricRow.job_id == job_id)
    if from_step is not None:
        statement = statement.where(MetricRow.step >= from_step)
    if to_step is not None:
        statement = statement.where(MetricRow.step <= to_step)
    if after:
        new = aliased(MetricRow)
        touched = select(new.step).where(new.job_id == job_id, new.id > after)
        statement = statement.where(MetricRow.step.in_(touched))
    return statement.order_by(MetricRow.step, MetricRow.attempt, MetricRow.id)
