"""Which checkpoint of a job is the best.

It is the one with the highest reward: that of the newest evaluation since the checkpoint before, or
in a job without evaluation the mean reward of the training steps since then. With ``kl_budget``
only those within `BUDGET_FACTOR` times of it compete; if there are none, the one nearest to the
reference is the best.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import defer

from dar.protocol.metrics import EVALUATION
from service.store import metrics
from service.store.database import Transaction
from service.store.tables import CheckpointRow, JobRow

BUDGET_FACTOR = 1.3
REWARD, KL = "dar/rewards_mean", "dar/kl_ref"


@dataclass(frozen=True, slots=True)
class Standing:
    """How good a checkpoint is."""

    ordinal: int = 0
    """Number of the checkpoint in its job, from 1; one that is replayed has its old number."""
    reward: float | None = None
    """Null: there is none, as in a job that trains on stored completions without evaluation."""
    kl: float | None = None


def measure(transaction: Transaction, job: JobRow, checkpoint: CheckpointRow) -> Standing:
    """How good a checkpoint is, from the metrics that its attempt has sent."""
    step, ordinal = transaction.execute(
        select(func.max(CheckpointRow.step), func.max(CheckpointRow.ordinal)).where(
            CheckpointRow.job_id == job.id,
            CheckpointRow.step < checkpoint.step,
            CheckpointRow.manifest_bytes > 0,  # it was committed, also if it is removed by now
        )
    ).one()
    spec = _dar(job)
    has_evaluation = spec.get("evaluation") is not None
    if not has_evaluation and spec.get("rewards") is None:
        return Standing((ordinal or 0) + 1)
    prefix = EVALUATION if has_evaluation else ""
    names = {f"{prefix}{REWARD}", f"{prefix}{KL}"}
    series = metrics.read(
        transaction, job.id, names=names, from_step=(step or 0) + 1, to_step=checkpoint.step
    )
    found = {name: [v for v in points.value if v is not None] for name, points in series.items()}
    reward, kl = (found.get(f"{prefix}{name}", []) for name in (REWARD, KL))
    summary = _last if has_evaluation else _mean
    return Standing((ordinal or 0) + 1, summary(reward), summary(kl))


def choose(transaction: Transaction, job: JobRow) -> CheckpointRow | None:
    """The best of a job's whole checkpoints, or None; the newest one if none has a reward."""
    whole = transaction.scalars(
        select(CheckpointRow)
        .where(CheckpointRow.job_id == job.id, CheckpointRow.is_whole)
        .order_by(CheckpointRow.step.desc(), CheckpointRow.attempt.desc())
        .options(defer(CheckpointRow.manifest))
        .execution_options(populate_existing=True)
    ).all()
    measured = [row for row in whole if row.reward is not None]
    budget = _dar(job)["hyperparameters"].get("kl_budget")
    if budget is not None and any(row.kl is not None for row in measured):
        by_kl = sorted((row.kl, n) for n, row in enumerate(measured) if row.kl is not None)
        within = [n for kl, n in by_kl if kl <= BUDGET_FACTOR * budget] or [by_kl[0][1]]
        measured = [measured[n] for n in within]
    if measured:
        return max(measured, key=lambda row: (row.reward, row.step))
    return next(iter(whole), None)


def result_of(transaction: Transaction, job: JobRow, final: CheckpointRow) -> CheckpointRow:
    """The checkpoint whose weights are the job's result: the last, with ``keep_best`` the best."""
    if not _dar(job).get("checkpointing", {}).get("keep_best"):
        return final
    return choose(transaction, job) or final


def _dar(job: JobRow) -> dict[str, Any]:
    found: dict[str, Any] = job.spec["method"]["dar"]
    return found


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None
