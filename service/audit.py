"""The auditor: checks afterwards that nothing was lost, doubled or damaged.

It reads the database and the artifacts folder, changes nothing, and may run beside a service. Each
job is read in one snapshot. What it checks is named in `RULES`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import orjson
from sqlalchemy import func, select, text

from dar.errors import ConfigurationError
from dar.protocol.status import TERMINAL
from service.artifacts import Artifacts
from service.store import checkpoints
from service.store.database import Database, Transaction
from service.store.tables import (
    AttemptRow,
    CheckpointRow,
    JobEventRow,
    JobRow,
    MetricRow,
    SpoolRow,
)
from service.store.transitions import MOVES

Rule = Literal["acknowledged", "ended", "attempts", "rows", "checkpoints", "events"]

RULES: Mapping[Rule, str] = {
    "acknowledged": "every acknowledged submission is one job, and each key one job",
    "ended": "a job runs while one attempt runs, and succeeds with one attempt and a checkpoint",
    "attempts": "the attempts of a job are numbered without gaps and never overlap",
    "rows": "the rows of an attempt and the steps of a job have no gaps",
    "checkpoints": "every checkpoint that is not set aside has the bytes that its manifest names",
    "events": "the events are numbered without gaps and lead to the job's status by allowed moves",
}

PAGE = 200
_STEPS = frozenset((source, move.target) for move in MOVES.values() for source in move.sources)


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that does not hold."""

    rule: Rule
    message: str
    job_id: str | None = None


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A submission that a client saw accepted."""

    job_id: str
    key: str
    """What the client meant as one submission: every try of it has the same key."""


@dataclass(slots=True)
class Report:
    """What the auditor has read and found."""

    jobs: int
    attempts: int
    checkpoints: int
    findings: list[Finding]


def audit(
    database: Database,
    artifacts: Artifacts,
    acknowledged: Sequence[Acknowledged] = (),
    *,
    is_quiet: bool = False,
    is_hashing: bool = True,
) -> Report:
    """Check every rule on every job.

    Args:
        database: What is checked; only read.
        artifacts: The files of its checkpoints.
        acknowledged: What clients saw accepted; the database must have all of it.
        is_quiet: Whether every job must have ended, as after a test.
        is_hashing: Whether the files of checkpoints are read; otherwise only their sizes count.
    """
    report = Report(0, 0, 0, list(_check_acknowledged(database, acknowledged)))
    for job_id in _job_ids(database):
        with database.read() as transaction:
            if transaction.is_postgresql:
                transaction.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            job = transaction.get(JobRow, job_id)
            if job is None or job.deleted_at is not None:
                continue  # its files and rows are being removed
            attempts = transaction.scalars(
                select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.number)
            ).all()
            kept = transaction.scalars(
                select(CheckpointRow).where(CheckpointRow.job_id == job_id, checkpoints.is_whole())
            ).all()
            problems = [
                *_check_ended(job, attempts, is_quiet=is_quiet),
                *_check_result(transaction, job),
                *_check_attempts(job, attempts),
                *_check_rows(transaction, job, attempts),
                *_check_events(transaction, job),
            ]
        # Files are read outside the transaction: hashing them may take minutes.
        for checkpoint in kept:
            wrong = _wrong_file(artifacts, checkpoint, is_hashing=is_hashing)
            if wrong is not None and _is_still_available(database, checkpoint.id):
                problems.append(Finding("checkpoints", f"checkpoint {checkpoint.id}: {wrong}"))
        report.jobs += 1
        report.attempts += len(attempts)
        report.checkpoints += len(kept)
        report.findings += [Finding(item.rule, item.message, job_id) for item in problems]
    report.findings += _check_orphans(database, artifacts)
    return report


def read_acknowledged(path: Path) -> list[Acknowledged]:
    """Submissions that clients saw accepted, one JSON object ``{"job_id", "key"}`` a line.

    Raises:
        ConfigurationError: The file cannot be read, or a line is something else.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--acknowledged: {path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            found += [Acknowledged(**orjson.loads(line))] if line else []
        except (TypeError, ValueError):
            raise ConfigurationError(
                f'--acknowledged: line {number} of {path} is no object like {{"job_id": "ftjob-…", '
                '"key": "…"}'
            ) from None
    return found


def lines(report: Report) -> list[str]:
    """The report for people: each rule, then what breaks it."""
    said = [
        f"read {report.jobs} jobs, {report.attempts} attempts and {report.checkpoints} checkpoints"
    ]
    for rule, promise in RULES.items():
        broken = [finding for finding in report.findings if finding.rule == rule]
        said.append(f"{'ok' if not broken else 'BROKEN':6} {rule}: {promise}")
        said += [f"       {finding.job_id or 'database'}: {finding.message}" for finding in broken]
    return said


def _job_ids(database: Database) -> Iterator[str]:
    last = ""
    while True:
        with database.read() as transaction:
            page = transaction.scalars(
                select(JobRow.id).where(JobRow.id > last).order_by(JobRow.id).limit(PAGE)
            ).all()
        if not page:
            return
        yield from page
        last = page[-1]


def _check_acknowledged(
    database: Database, acknowledged: Sequence[Acknowledged]
) -> Iterator[Finding]:
    by_key: dict[str, set[str]] = {}
    for one in acknowledged:
        by_key.setdefault(one.key, set()).add(one.job_id)
    for key, job_ids in by_key.items():
        if len(job_ids) > 1:
            named = ", ".join(sorted(job_ids))
            yield Finding("acknowledged", f"the submission {key!r} made several jobs: {named}")
    wanted = sorted({one.job_id for one in acknowledged})
    for start in range(0, len(wanted), PAGE):
        some = wanted[start : start + PAGE]
        with database.read() as transaction:
            found = set(transaction.scalars(select(JobRow.id).where(JobRow.id.in_(some))))
        for job_id in some:
            if job_id not in found:
                yield Finding("acknowledged", "it was acknowledged and is gone", job_id)


def _check_ended(
    job: JobRow, attempts: Sequence[AttemptRow], *, is_quiet: bool
) -> Iterator[Finding]:
    running = [attempt.number for attempt in attempts if attempt.status == "running"]
    succeeded = [attempt.number for attempt in attempts if attempt.status == "succeeded"]
    is_attended = job.status in {"running", "pausing"} and job.cancel_requested_at is None
    if is_attended and running != [job.attempt]:
        yield Finding("ended", f"it is {job.status}, but its running attempts are {running}")
    if not is_attended and job.cancel_requested_at is None and running:
        yield Finding("ended", f"it is {job.status}, but attempt {running[0]} runs")
    if job.status in TERMINAL and running:
        yield Finding("ended", f"it is {job.status}, but attempt {running[0]} runs")
    if job.status == "succeeded":
        # A stopped job may succeed with its newest checkpoint, whatever its last attempt did.
        if succeeded != [job.attempt] and (succeeded or job.stop_requested_at is None):
            yield Finding("ended", f"it succeeded with attempt {job.attempt}, not {succeeded}")
    elif succeeded:
        yield Finding("ended", f"it is {job.status}, but attempt {succeeded[0]} succeeded")
    if is_quiet and job.status not in TERMINAL:
        yield Finding("ended", f"it is still {job.status}")


def _check_result(transaction: Transaction, job: JobRow) -> Iterator[Finding]:
    if job.status != "succeeded":
        return
    # A job of an earlier version has no result of its own: it is the newest checkpoint.
    result_id = job.result_checkpoint_id or job.latest_checkpoint_id
    result = None if result_id is None else checkpoints.find(transaction, job.id, result_id)
    # One that was set aside has an event; one that is gone was deleted by a user.
    if result is None or result.status == "pending":
        yield Finding("ended", "it succeeded, and the checkpoint of its result is not available")


def _check_attempts(job: JobRow, attempts: Sequence[AttemptRow]) -> Iterator[Finding]:
    numbers = [attempt.number for attempt in attempts]
    if numbers != list(range(1, job.attempt + 1)):
        yield Finding("attempts", f"its attempts are {numbers}, and the last one is {job.attempt}")
    for earlier, later in pairwise(attempts):
        if earlier.ended_at is None or earlier.ended_at > later.started_at:
            yield Finding(
                "attempts",
                f"attempt {later.number} began before attempt {earlier.number} had ended",
            )


def _check_rows(
    transaction: Transaction, job: JobRow, attempts: Sequence[AttemptRow]
) -> Iterator[Finding]:
    known = transaction.execute(
        select(SpoolRow.attempt, func.min(SpoolRow.seq), func.max(SpoolRow.seq), func.count())
        .where(SpoolRow.job_id == job.id)
        .group_by(SpoolRow.attempt)
    ).all()
    acked = {attempt.number: attempt.acked_seq for attempt in attempts}
    for number, first, last, count in known:
        if last != acked.get(number) or count != last - first + 1:
            yield Finding(
                "rows",
                f"attempt {number} has {count} rows from {first} to {last}, and acknowledged "
                f"{acked.get(number)}",
            )
    if job.status != "succeeded":
        return
    steps = set(
        transaction.scalars(select(MetricRow.step).where(MetricRow.job_id == job.id).distinct())
    )
    last = job.total_steps if job.stop_requested_at is None else job.step
    missing = sorted(set(range(1, last + 1)) - steps)
    if missing and steps:  # none at all: they were removed for their age
        yield Finding("rows", f"{len(missing)} steps have no metrics; the first is {missing[0]}")
    if strange := sorted(step for step in steps if not 0 <= step <= job.total_steps):
        yield Finding("rows", f"it has {job.total_steps} steps, and metrics of step {strange[0]}")


def _check_events(transaction: Transaction, job: JobRow) -> Iterator[Finding]:
    events = transaction.execute(
        select(JobEventRow.seq, JobEventRow.data)
        .where(JobEventRow.job_id == job.id)
        .order_by(JobEventRow.seq)
    ).all()
    if not events:
        return  # removed for their age
    seqs = [seq for seq, _ in events]
    if seqs != list(range(seqs[0], job.event_seq + 1)):
        yield Finding("events", f"its events up to {job.event_seq} have gaps")
    statuses = [data["status"] for _, data in events if data and data.get("kind") == "status"]
    for before, after in pairwise(statuses):
        if (before, after) not in _STEPS:
            yield Finding("events", f"it went from {before} to {after}, which no move allows")
    if statuses and statuses[-1] != job.status:
        yield Finding("events", f"it is {job.status}, and its events end with {statuses[-1]}")


def _is_still_available(database: Database, checkpoint_id: str) -> bool:
    with database.read() as transaction:
        row = transaction.get(CheckpointRow, checkpoint_id)
        return row is not None and row.status == "available" and row.damage is None


def _wrong_file(artifacts: Artifacts, row: CheckpointRow, *, is_hashing: bool) -> str | None:
    """What is wrong with the files of a checkpoint; None if all is as its manifest says."""
    folder = artifacts.checkpoint(row.job_id, row.attempt, row.step)
    take = (lambda _size: None) if is_hashing else None
    return artifacts.damage_of(folder, checkpoints.files_of(row), take=take)


def _check_orphans(database: Database, artifacts: Artifacts) -> Iterator[Finding]:
    """Folders of checkpoints that are older than any upload in progress and have no row."""
    for folder in artifacts.old_checkpoints():
        job_id, attempt, step = folder
        with database.read() as transaction:
            is_known = folder in checkpoints.with_files(transaction, [job_id])
        if not is_known:
            place = f"{artifacts.storage.where}/{artifacts.checkpoint(job_id, attempt, step)}"
            yield Finding("checkpoints", f"{place} belongs to no checkpoint", job_id)
