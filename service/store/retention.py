"""What is older or larger than the settings allow, and the rows of deleted jobs.

Every function that deletes takes one small transaction and deletes at most `CHUNK` rows, so that it
never holds up a worker for long. The caller repeats it until there is nothing left.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    LargeBinary,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    literal,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.orm import InstrumentedAttribute, aliased

from dar.settings import Settings
from service.store import checkpoints, events
from service.store.database import Transaction
from service.store.tables import (
    AttemptRow,
    Base,
    CheckpointRow,
    JobEventRow,
    JobInputRow,
    JobRow,
    MetricRollupRow,
    MetricRow,
    ModelAliasRow,
    RewardFailureRow,
    SampleRow,
    SpoolRow,
    TrainerLogRow,
)

CHUNK = 1000
"""Rows that one transaction deletes at most."""
OWNERS = 50
"""Jobs or attempts whose rows one transaction deletes at most."""


Owner = tuple[Any, ...]
"""Id of a job, or id of a job and number of an attempt."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Rows that go some days after the end of their job, or of their attempt."""

    what: str
    """What the rows are, as a preview names them."""
    setting: str
    """Field of the settings with the number of days; 0: they are kept."""
    table: type[Base]
    owner: tuple[InstrumentedAttribute[Any], ...]
    """Columns of the table that name the job, or the job and the attempt."""

    def cutoff(self, transaction: Transaction, settings: Settings) -> datetime | None:
        """The end of a job or attempt before which the rows go; None: they are kept."""
        days: float = getattr(settings, self.setting)
        return transaction.now - timedelta(days=days) if days else None

    def ended(self, cutoff: datetime) -> Select[*tuple[Any, ...]]:
        """The jobs or attempts that ended before ``cutoff``."""
        if len(self.owner) == 1:
            return select(JobRow.id).where(JobRow.finished_at < cutoff)
        return select(AttemptRow.job_id, AttemptRow.number).where(AttemptRow.ended_at < cutoff)


RULES = (
    Rule("events", "events_kept_days", JobEventRow, (JobEventRow.job_id,)),
    Rule("reward_failures", "events_kept_days", RewardFailureRow, (RewardFailureRow.job_id,)),
    Rule("trainer_logs", "events_kept_days", TrainerLogRow, (TrainerLogRow.job_id,)),
    Rule("samples", "samples_kept_days", SampleRow, (SampleRow.job_id,)),
    Rule("metric_rollups", "metrics_kept_days", MetricRollupRow, (MetricRollupRow.job_id,)),
    Rule("metrics", "metrics_kept_days", MetricRow, (MetricRow.job_id,)),
    Rule("digests", "digests_kept_days", SpoolRow, (SpoolRow.job_id, SpoolRow.attempt)),
)


@dataclass(frozen=True, slots=True)
class Surplus:
    """What would go now by one setting."""

    what: str
    setting: str
    rows: int
    bytes: int | None = None
    """None: it is not measured."""


def aged_owners(
    transaction: Transaction, settings: Settings, rule: Rule, after: Owner | None
) -> Sequence[Owner]:
    """Some jobs or attempts, in the order of their ids, whose rows are too old.

    Args:
        transaction: Where they are read.
        settings: Ages.
        rule: Which rows.
        after: The last one of the call before; None: begin.
    """
    cutoff = rule.cutoff(transaction, settings)
    if cutoff is None:
        return []
    ended = rule.ended(cutoff)
    names = list(ended.selected_columns)
    same = and_(*(column == name for column, name in zip(rule.owner, names, strict=True)))
    ended = ended.where(exists(select(literal(1)).select_from(rule.table).where(same)))
    if after is not None:
        ended = ended.where(tuple_(*names) > tuple_(*after))
    found = transaction.execute(ended.order_by(*names).limit(OWNERS)).all()
    return [tuple(one) for one in found]


def delete_of(transaction: Transaction, rule: Rule, owners: Sequence[Owner]) -> int:
    """Delete some rows of jobs or attempts; returns how many."""
    is_of_owner = or_(
        *(
            and_(*(column == value for column, value in zip(rule.owner, one, strict=True)))
            for one in owners
        )
    )
    return _delete_rows(transaction, rule.table.__table__, is_of_owner)


def _delete_rows(transaction: Transaction, table: Any, which: ColumnElement[bool]) -> int:  # noqa: ANN401 - a Table, which the class types as FromClause
    """Delete at most `CHUNK` rows; returns how many."""
    keys: Sequence[Column[Any]] = list(table.primary_key)
    doomed = transaction.execute(select(*keys).where(which).limit(CHUNK)).all()
    if not doomed:
        return 0
    if table is SampleRow.__table__:
        _take_off_sizes(transaction, [key for (key,) in doomed])
    matching = and_(*(key == bindparam(f"key_{key.name}") for key in keys))
    transaction.connection().execute(
        delete(table).where(matching),
        [
            {f"key_{key.name}": value for key, value in zip(keys, one, strict=True)}
            for one in doomed
        ],
    )
    return len(doomed)


# --- the size of all samples ---


def _size(transaction: Transaction) -> ColumnElement[int]:
    """Bytes of a sample."""
    if transaction.is_postgresql:
        return func.octet_length(cast(SampleRow.body, Text))
    return func.length(cast(SampleRow.body, LargeBinary))


def _take_off_sizes(transaction: Transaction, ids: Sequence[int]) -> None:
    sizes = transaction.execute(
        select(SampleRow.job_id, func.sum(_size(transaction)))
        .where(SampleRow.id.in_(ids))
        .group_by(SampleRow.job_id)
    ).all()
    for job_id, size in sizes:
        left = case((JobRow.samples_bytes > size, JobRow.samples_bytes - size), else_=0)
        transaction.execute(
            update(JobRow)
            .where(JobRow.id == job_id)
            .values(samples_bytes=left)
            .execution_options(synchronize_session=False)
        )


def samples_bytes(transaction: Transaction) -> int:
    """Bytes of the samples of all jobs."""
    return int(transaction.scalars(select(func.coalesce(func.sum(JobRow.samples_bytes), 0))).one())


def oversized_jobs(transaction: Transaction, limit: int) -> Mapping[str, int]:
    """The jobs whose samples have more than ``limit`` bytes, and by how much."""
    found = transaction.execute(
        select(JobRow.id, (JobRow.samples_bytes - limit).label("surplus"))
        .where(JobRow.samples_bytes > limit, JobRow.deleted_at.is_(None))
        .order_by(JobRow.id)
    )
    return {row.id: row.surplus for row in found}


def count_samples(transaction: Transaction, job_id: str) -> tuple[int, int]:
    """How many samples a job has, and the last of their steps."""
    found = select(func.count(), func.coalesce(func.max(SampleRow.step), 0))
    count, step = transaction.execute(found.where(SampleRow.job_id == job_id)).one()
    return count, step


def note_thinned(transaction: Transaction, job_id: str, count: int, step: int) -> None:
    """Add an event to a job whose samples were too large."""
    message = (
        f"{count} samples of steps up to {step} were deleted, because a job may have "
        "DAR_JOB_SAMPLES_BYTES of them; the best and worst of each step are kept longest"
    )
    data = {"kind": "samples_thinned", "count": count, "step": step}
    events.append(transaction, job_id, [events.NewEvent(message, data=data)])


def delete_oldest_samples(
    transaction: Transaction, surplus: int, after: int, job_id: str | None = None
) -> int | None:
    """Delete the oldest samples that are neither best nor worst of their step.

    Args:
        transaction: The transaction to write in.
        surplus: Bytes that are to be deleted; no more samples than that takes are deleted.
        after: Where the last call has ended; 0 at first.
        job_id: The only job whose samples may be deleted; None: any.

    Returns:
        Where the next call is to begin. None: only the best and worst of each step were left, and
        the oldest of those were deleted.
    """
    found = _oldest(transaction, after, job_id, is_ordinary=True)
    last = found[-1][0] if found else None
    if last is None:
        found = _oldest(transaction, 0, job_id, is_ordinary=False)
    doomed: list[int] = []
    total = 0
    for sample_id, size in found:
        if total >= surplus:
            last = doomed[-1] if last is not None else None
            break
        doomed.append(sample_id)
        total += size
    if doomed:
        _delete_rows(transaction, SampleRow.__table__, SampleRow.id.in_(doomed))
    return last


def _oldest(
    transaction: Transaction, after: int, job_id: str | None, *, is_ordinary: bool
) -> Sequence[tuple[int, int]]:
    """Ids and sizes of the oldest samples after ``after``."""
    statement = select(SampleRow.id, _size(transaction)).where(SampleRow.id > after)
    if job_id is not None:
        statement = statement.where(SampleRow.job_id == job_id)
    if is_ordinary:
        other = aliased(SampleRow)
        same_step = select(literal(1)).where(
            other.job_id == SampleRow.job_id, other.step == SampleRow.step
        )
        is_equal_and_older = and_(other.reward == SampleRow.reward, other.id < SampleRow.id)
        better = same_step.where(or_(other.reward > SampleRow.reward, is_equal_and_older))
        worse = same_step.where(or_(other.reward < SampleRow.reward, is_equal_and_older))
        is_between = and_(better.exists(), worse.exists())
        statement = statement.where(or_(SampleRow.reward.is_(None), is_between))
    rows = transaction.execute(statement.order_by(SampleRow.id).limit(CHUNK)).all()
    return [(sample_id, size or 0) for sample_id, size in rows]


# --- idempotency keys and whole jobs ---


def _old_keys(cutoff: datetime) -> ColumnElement[bool]:
    return and_(JobRow.idempotency_key.is_not(None), JobRow.created_at < cutoff)


def forget_keys(transaction: Transaction, settings: Settings) -> int:
    """Forget idempotency keys that are too old; returns how many."""
    if not settings.idempotency_keys_kept_days:
        return 0
    cutoff = transaction.now - timedelta(days=settings.idempotency_keys_kept_days)
    ids = transaction.scalars(select(JobRow.id).where(_old_keys(cutoff)).limit(CHUNK)).all()
    if ids:
        transaction.execute(
            update(JobRow)
            .where(JobRow.id.in_(ids))
            .values(idempotency_key=None)
            .execution_options(synchronize_session=False)
        )
    return len(ids)


def old_jobs(
    transaction: Transaction, settings: Settings, after: str = ""
) -> Sequence[tuple[str, str]]:
    """Project and id of jobs that ended too long ago, in the order of their ids."""
    if not settings.jobs_kept_days:
        return []
    found = transaction.execute(
        select(JobRow.project_id, JobRow.id)
        .where(_is_old(transaction, settings), JobRow.id > after)
        .order_by(JobRow.id)
        .limit(OWNERS)
    ).all()
    return [(project_id, job_id) for project_id, job_id in found]


def _is_old(transaction: Transaction, settings: Settings) -> ColumnElement[bool]:
    """Whether a job ended too long ago, and has no checkpoint that a user keeps."""
    cutoff = transaction.now - timedelta(days=settings.jobs_kept_days)
    kept = select(CheckpointRow.job_id).where(checkpoints.is_kept_by_user()).correlate(None)
    return and_(JobRow.finished_at < cutoff, JobRow.deleted_at.is_(None), JobRow.id.not_in(kept))


# --- deleted jobs ---


def deleted_jobs(transaction: Transaction) -> Sequence[str]:
    """Ids of jobs that were deleted and still have rows."""
    return transaction.scalars(
        select(JobRow.id).where(JobRow.deleted_at.is_not(None)).order_by(JobRow.deleted_at)
    ).all()


def unremoved_checkpoints(
    transaction: Transaction, job_ids: Collection[str]
) -> Sequence[CheckpointRow]:
    """The checkpoints of deleted jobs whose files may still be there."""
    return transaction.scalars(
        select(CheckpointRow).where(
            CheckpointRow.job_id.in_(job_ids), CheckpointRow.status != "deleted"
        )
    ).all()


def purge(transaction: Transaction, job_ids: Collection[str]) -> bool:
    """Delete some rows of deleted jobs, at last their own; returns whether all are gone.

    Rows of every table that belongs to jobs are deleted, in an order in which no row refers to one
    that is gone.
    """
    deleted = select(JobRow.id).where(JobRow.id.in_(job_ids), JobRow.deleted_at.is_not(None))
    ids = transaction.scalars(deleted.order_by(JobRow.id).with_for_update()).all()
    of_job = select(CheckpointRow.id).where(CheckpointRow.job_id.in_(ids))
    inputs, aliases = JobInputRow.__table__, ModelAliasRow.__table__
    if _delete_rows(transaction, inputs, JobInputRow.checkpoint_id.in_(of_job)) >= CHUNK:
        return False
    _delete_rows(transaction, aliases, ModelAliasRow.checkpoint_id.in_(of_job))
    for table in reversed(Base.metadata.sorted_tables):
        column = _job_column(table)
        if column is not None and _delete_rows(transaction, table, column.in_(ids)) >= CHUNK:
            return False
    transaction.execute(delete(JobRow).where(JobRow.id.in_(ids)))
    return True


def _job_column(table: Table) -> Column[Any] | None:
    """The column of a table that names the job of a row."""
    for key in table.foreign_keys:
        if key.column is JobRow.__table__.c.id:
            column: Column[Any] = key.parent
            return column
    return None


# --- what would go, and what there is ---


def surpluses(transaction: Transaction, settings: Settings) -> Sequence[Surplus]:
    """What would go now by each setting. Nothing is changed."""
    found = []
    for rule in RULES:
        cutoff = rule.cutoff(transaction, settings)
        rows = 0 if cutoff is None else _count(transaction, rule, cutoff)
        found.append(Surplus(rule.what, rule.setting, rows))
    over = max(0, samples_bytes(transaction) - settings.samples_bytes)
    found.append(Surplus("samples", "samples_bytes", _count_oldest(transaction, over), over))
    keys = 0
    if settings.idempotency_keys_kept_days:
        cutoff = transaction.now - timedelta(days=settings.idempotency_keys_kept_days)
        keys = _rows_of(transaction, JobRow, _old_keys(cutoff))
    found.append(Surplus("idempotency_keys", "idempotency_keys_kept_days", keys))
    found.append(_jobs_that_go(transaction, settings))
    return found


def _count(transaction: Transaction, rule: Rule, cutoff: datetime) -> int:
    ended = rule.ended(cutoff).subquery()
    pairs = zip(rule.owner, ended.c, strict=True)
    statement = select(func.count()).select_from(rule.table)
    joined = statement.join(ended, and_(*(column == name for column, name in pairs)))
    return transaction.scalars(joined).one()


def _count_oldest(transaction: Transaction, surplus: int) -> int:
    """About how many samples have ``surplus`` bytes."""
    if surplus == 0:
        return 0
    rows = _rows_of(transaction, SampleRow, literal(True))
    return min(rows, -(-rows * surplus // max(1, samples_bytes(transaction))))


def _jobs_that_go(transaction: Transaction, settings: Settings) -> Surplus:
    rows = size = 0
    if settings.jobs_kept_days:
        old = _is_old(transaction, settings)
        rows = _rows_of(transaction, JobRow, old)
        weights = (
            select(func.coalesce(func.sum(CheckpointRow.bytes), 0))
            .join(JobRow, JobRow.id == CheckpointRow.job_id)
            .where(old, CheckpointRow.status == "available")
        )
        size = int(transaction.scalars(weights).one())
    return Surplus("jobs", "jobs_kept_days", rows, size)


def _rows_of(transaction: Transaction, table: type[Base], which: ColumnElement[bool]) -> int:
    return transaction.scalars(select(func.count()).select_from(table).where(which)).one()


def row_counts(transaction: Transaction) -> Mapping[str, int]:
    """Number of rows of each table that belongs to jobs, and of the jobs themselves."""
    tables = [table for table in Base.metadata.sorted_tables if _job_column(table) is not None]
    return {
        table.name: transaction.scalars(select(func.count()).select_from(table)).one()
        for table in (Base.metadata.tables["jobs"], *tables)
    }
