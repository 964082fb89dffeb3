"""Rows of a trainer: numbered within one attempt, each stored once.

Rows of an attempt that has lost its job are stored too, with the attempt's number: they report
what happened. Those after the step from which a later attempt started, or with which the job has
ended, are rewound (`service.store.rewinds`): they change nothing that the job shows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select, update

from dar.errors import ConflictError
from dar.protocol.base import MAX_COUNT
from dar.protocol.jobs import Forecast
from dar.protocol.metrics import current_values
from dar.protocol.worker import EventRow, MetricsRow, RewardsRow, Row, SamplesRow
from service.store import (
    events,
    metric_rollups,
    metrics,
    pace,
    reward_failures,
    rewinds,
    samples,
    stops,
)
from service.store.database import Transaction
from service.store.fence import Held, is_live
from service.store.tables import AttemptRow, JobRow, SpoolRow

DIGEST_BYTES = 16
HEADLINE = ("dar/loss", "dar/rewards_mean")
"""Metrics named in the message of a step's event."""


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A row that was sent again with other content."""

    seq: int


def add(transaction: Transaction, held: Held, rows: Sequence[Row]) -> int | Contradiction:
    """Store the rows that are new.

    Returns:
        The ``seq`` up to which all rows are stored; or a contradiction, and then nothing is stored.

    Raises:
        ConflictError: Rows are missing before these (``seq_gap``).
    """
    job, attempt = held.job, held.attempt
    acked = attempt.acked_seq
    if not rows:
        return acked
    if rows[0].seq > acked + 1:
        raise ConflictError(
            f"the rows start at {rows[0].seq}, but {acked} is the last one committed; send from "
            f"{acked + 1}",
            code="seq_gap",
        )
    digests = {row.seq: _digest(row) for row in rows}
    if (seq := _contradicted(transaction, held, digests)) is not None:
        return Contradiction(seq)
    fresh = [row for row in rows if row.seq > acked]
    if not fresh:
        return acked
    transaction.insert_rows(
        SpoolRow,
        [
            {
                "job_id": job.id,
                "attempt": attempt.number,
                "seq": row.seq,
                "digest": digests[row.seq],
            }
            for row in fresh
        ],
    )
    progress = _progress(transaction, held, fresh)
    steps = [row for row in fresh if isinstance(row, MetricsRow)]
    metrics.add(transaction, job.id, attempt.number, steps)
    metric_rollups.add(transaction, held, steps)
    samples.add(
        transaction, job.id, attempt.number, [r for r in fresh if isinstance(r, SamplesRow)]
    )
    reports = [row for row in fresh if isinstance(row, RewardsRow)]
    reward_failures.add(transaction, held, reports)
    stops.count_reward_calls(transaction, job, reports)
    for report in reports:
        if report.unfinished is not None:
            held.attempt.unfinished = {"step": report.step, "values": report.unfinished}
    _append_events(transaction, held, fresh, progress)
    _update_job(transaction, held, steps)
    transaction.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == job.id, AttemptRow.number == attempt.number)
        .values(acked_seq=fresh[-1].seq)
    )
    return fresh[-1].seq


def _digest(row: Row) -> bytes:
    return hashlib.blake2b(row.model_dump_json().encode(), digest_size=DIGEST_BYTES).digest()


def _contradicted(transaction: Transaction, held: Held, digests: dict[int, bytes]) -> int | None:
    first, last = min(digests), min(max(digests), held.attempt.acked_seq)
    if first > last:
        return None
    known = transaction.execute(
        select(SpoolRow.seq, SpoolRow.digest).where(
            SpoolRow.job_id == held.job.id,
            SpoolRow.attempt == held.attempt.number,
            SpoolRow.seq.between(first, last),
        )
    ).all()
    return next((seq for seq, digest in known if digests[seq] != digest), None)


@dataclass(frozen=True, slots=True)
class _Progress:
    """How far an attempt was before some rows, and up to where its rows are the job's."""

    newest: int
    """Last step with an event."""
    last: int
    """Rows of later steps are rewound."""


def _progress(transaction: Transaction, held: Held, rows: Sequence[Row]) -> _Progress:
    number, job = held.attempt.number, held.job
    is_newest = number == job.attempt and job.status != "succeeded"
    if is_newest or not any(isinstance(row, MetricsRow | EventRow) for row in rows):
        return _Progress(job.metrics_event_step, MAX_COUNT)
    return _Progress(
        metrics.newest_step(transaction, job.id, number),
        rewinds.last_step(transaction, job.id, number),
    )


def _append_events(
    transaction: Transaction, held: Held, rows: Sequence[Row], progress: _Progress
) -> None:
    job, number = held.job, held.attempt.number
    newest, forecast = progress.newest, job.forecast
    new: list[events.NewEvent] = []
    for row in rows:
        if isinstance(row, MetricsRow) and newest < row.step <= progress.last:
            newest = row.step
            new.append(_step_event(row, job.total_steps, number))
        elif isinstance(row, SamplesRow) and row.samples:
            new.append(_samples_event(row, number))
        elif isinstance(row, EventRow):
            # A worker of an earlier version does not say the step: it is the one after the last.
            step = min(newest + 1, job.total_steps) if row.step is None else row.step
            data: dict[str, Any] = {"kind": "trainer", **(row.data or {})}
            data["attempt"] = number
            at = datetime.fromtimestamp(row.at, UTC)
            new.append(
                events.NewEvent(
                    row.message, level=row.level, data=data, at=at, attempt=number, step=step
                )
            )
            if step <= progress.last:
                forecast = _forecast(row) or forecast
    events.append(transaction, job.id, new)
    changed: dict[str, Any] = {}
    if number == job.attempt and newest != job.metrics_event_step:
        changed["metrics_event_step"] = newest
    if forecast != job.forecast:
        changed["forecast"] = forecast
    if changed:
        transaction.execute(update(JobRow).where(JobRow.id == job.id).values(**changed))


def _forecast(row: EventRow) -> dict[str, Any] | None:
    """The forecast in an event of a calibration; None: it has none that this version can read."""
    if row.data is None or row.data.get("kind") != "calibration":
        return None
    try:
        return Forecast.model_validate(
            {name: value for name, value in row.data.items() if name in Forecast.model_fields}
        ).model_dump(mode="json")
    except ValidationError:
        return None


def _step_event(row: MetricsRow, total_steps: int, attempt: int) -> events.NewEvent:
    headline = ", ".join(
        f"{name.removeprefix('dar/')}={value:.4g}"
        for name in HEADLINE
        if (value := row.values.get(name)) is not None
    )
    message = f"Step {row.step}/{total_steps}" + (f": {headline}" if headline else "")
    return events.NewEvent(
        message,
        type="metrics",
        data={"step": row.step, **current_values(row.values)},
        at=datetime.fromtimestamp(row.at, UTC),
        attempt=attempt,
        step=row.step,
    )


def _samples_event(row: SamplesRow, attempt: int) -> events.NewEvent:
    rewards = [sample.reward for sample in row.samples if sample.reward is not None]
    return events.NewEvent(
        f"Step {row.step}: {len(row.samples)} samples are stored",
        data={
            "kind": events.SAMPLES_KIND,
            "step": row.step,
            "attempt": attempt,
            "count": len(row.samples),
            "min_reward": min(rewards, default=None),
            "max_reward": max(rewards, default=None),
        },
        at=datetime.fromtimestamp(row.at, UTC),
        attempt=attempt,
        step=row.step,
    )


def _update_job(transaction: Transaction, held: Held, steps: Sequence[MetricsRow]) -> None:
    if not steps or not is_live(held.attempt, held.job):
        return
    # Neither decreases within an attempt; a heartbeat may have reported later steps before.
    tokens = int(steps[-1].values.get("train/tokens") or 0)
    values: dict[str, Any] = {
        "step": max(held.job.step, steps[-1].step),
        "tokens": max(held.job.tokens, tokens),
        "reward_waits": 0,
        "pace": pace.after(held.job.pace, held.attempt.number, steps, transaction.now),
    }
    transaction.execute(update(JobRow).where(JobRow.id == held.job.id).values(values))
