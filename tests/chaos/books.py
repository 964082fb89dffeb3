"""What the database and the files say at the end of a row."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import func, select

from chaos.stack import Stack, until
from dar.protocol.status import TERMINAL
from fakes.scripted_states import state_after, weights
from service.audit import Acknowledged, audit
from service.store.tables import AttemptRow, CheckpointRow, JobEventRow, JobRow, MetricRow


@dataclass(slots=True)
class Books:
    """The sums of a row. Each of the first five must be zero."""

    lost: int
    """Submissions that were acknowledged and are gone, or jobs that did not succeed."""
    doubled: int
    """Jobs beyond one for each submission, and successes beyond one for each job."""
    unequal: int
    """Jobs whose weights are not those of an undisturbed run."""
    poisoned: int
    findings: list[str]
    jobs: int
    attempts: int
    ends: dict[str, int] = field(default_factory=dict)
    """How many attempts ended in each way."""

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.doubled or self.unequal or self.poisoned or self.findings)


def close(
    stack: Stack, acknowledged: Sequence[Acknowledged] = (), *, is_over: bool = True
) -> Books:
    """Add up a row.

    Args:
        stack: Its installation.
        acknowledged: What clients saw accepted; empty: not judged.
        is_over: Whether all jobs were to succeed; otherwise they were only submitted.
    """
    report = audit(stack.database, stack.artifacts, acknowledged, is_quiet=is_over)
    with stack.database.read() as transaction:
        jobs = transaction.scalars(select(JobRow)).all()
        attempts = Counter(transaction.scalars(select(AttemptRow.status)))
        finals = {
            row.id: row for row in transaction.scalars(select(CheckpointRow)) if row is not None
        }
    numbers = Counter((job.labels or {})["number"] for job in jobs)
    lost = len({one.key for one in acknowledged} - set(numbers))
    unequal = poisoned = 0
    if is_over:
        lost += sum(job.status != "succeeded" for job in jobs)
        poisoned = sum(job.status_detail == "poison" for job in jobs)
        for job in jobs:
            if job.status == "succeeded":
                unequal += not _is_equal(stack, job, finals[str(job.latest_checkpoint_id)])
    doubled = sum(count - 1 for count in numbers.values()) + _successes_too_many(stack)
    said = [f"{one.rule}: {one.job_id}: {one.message}" for one in report.findings]
    return Books(
        lost=lost,
        doubled=doubled,
        unequal=unequal,
        poisoned=poisoned,
        findings=said,
        jobs=len(jobs),
        attempts=sum(attempts.values()),
        ends=dict(attempts),
    )


def _successes_too_many(stack: Stack) -> int:
    with stack.database.read() as transaction:
        of_attempts = select(AttemptRow.job_id, func.count()).where(
            AttemptRow.status == "succeeded"
        )
        counts = transaction.execute(of_attempts.group_by(AttemptRow.job_id)).all()
        events = transaction.execute(
            select(JobEventRow.job_id, JobEventRow.data).where(JobEventRow.type == "message")
        ).all()
    said = Counter(
        job_id
        for job_id, data in events
        if data and data.get("kind") == "status" and data.get("status") == "succeeded"
    )
    return sum(count - 1 for _, count in counts) + sum(count - 1 for count in said.values())


def _is_equal(stack: Stack, job: JobRow, final: CheckpointRow) -> bool:
    folder = stack.artifacts.checkpoint(job.id, final.attempt, final.step)
    content = b"".join(stack.artifacts.storage.read(f"{folder}/model.safetensors"))
    expected = weights(state_after(job.seed, job.total_steps))
    return hashlib.sha256(content).digest() == hashlib.sha256(expected).digest()


def until_all_ended(stack: Stack, seconds: float) -> None:
    """Wait until every job has ended.

    Raises:
        TimeoutError: Some have not in time.
    """

    until(lambda: have_all_ended(stack), seconds, "the end of all jobs")


def have_all_ended(stack: Stack) -> bool:
    """Whether no job can go on by itself."""
    with stack.database.read() as transaction:
        return set(transaction.scalars(select(JobRow.status).distinct())) <= TERMINAL


@dataclass(frozen=True, slots=True)
class Running:
    """An attempt under way."""

    job_id: str
    attempt: int
    slot: str
    checkpoints: int
    """How many it has published."""


def running(stack: Stack) -> list[Running]:
    """Every attempt under way."""
    published = (
        select(func.count())
        .select_from(CheckpointRow)
        .where(
            CheckpointRow.job_id == AttemptRow.job_id,
            CheckpointRow.attempt == AttemptRow.number,
            CheckpointRow.status != "pending",
        )
        .scalar_subquery()
    )
    query = select(AttemptRow.job_id, AttemptRow.number, AttemptRow.slot, published)
    with stack.database.read() as transaction:
        found = transaction.execute(query.where(AttemptRow.status == "running")).all()
    return [Running(*row) for row in found]


def next_start(stack: Stack, job_id: str, attempt: int) -> datetime | None:
    """When the attempt after ``attempt`` was claimed; None: it was not."""
    with stack.database.read() as transaction:
        row = transaction.get(AttemptRow, (job_id, attempt + 1))
        return None if row is None else row.started_at


def reported_steps(stack: Stack, job_id: str) -> list[int]:
    """Steps with metrics, of all attempts: a step that was done again stands there twice."""
    with stack.database.read() as transaction:
        return list(transaction.scalars(select(MetricRow.step).where(MetricRow.job_id == job_id)))
