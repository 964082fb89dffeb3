"""Samples: completions kept for viewing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import orjson
from sqlalchemy import ColumnElement, and_, false, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute

from dar.errors import InvalidRequestError, NotFoundError
from dar.protocol.samples import SampleFlag, prompt_id_of
from dar.protocol.worker import SamplesRow
from service.store import rewinds
from service.store.database import Transaction
from service.store.tables import JobRow, SampleRow

Order = Literal["asc", "desc", "reward", "-reward", "advantage", "-advantage", "group"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which samples of a job; None: any."""

    step: int | None = None
    group: int | None = None
    prompt_id: str | None = None
    flag: SampleFlag | None = None
    min_reward: float | None = None
    max_reward: float | None = None

    def conditions(self) -> Iterator[ColumnElement[bool]]:
        if self.step is not None:
            yield SampleRow.step == self.step
        if self.group is not None:
            yield SampleRow.group_number == self.group
        if self.prompt_id is not None:
            yield SampleRow.prompt_id == self.prompt_id
        if self.flag is not None:
            yield _has(self.flag)
        if self.min_reward is not None:
            yield SampleRow.reward >= self.min_reward
        if self.max_reward is not None:
            yield SampleRow.reward <= self.max_reward


def add(transaction: Transaction, job_id: str, attempt: int, rows: Sequence[SamplesRow]) -> None:
    """Store the samples of some steps."""
    values = [
        {
            "job_id": job_id,
            "attempt": attempt,
            "step": row.step,
            "created_at": datetime.fromtimestamp(row.at, UTC),
            "reward": sample.reward,
            "advantage": sample.advantage,
            "body": sample.model_dump(mode="json"),
            "prompt_id": prompt_id_of(sample.prompt),
            "group_number": sample.group,
            "group_index": sample.index,
        }
        for row in rows
        for sample in row.samples
    ]
    if values:
        transaction.insert_rows(SampleRow, values)
        size = sum(len(orjson.dumps(one["body"])) for one in values)
        transaction.execute(
            update(JobRow)
            .where(JobRow.id == job_id)
            .values(samples_bytes=JobRow.samples_bytes + size)
            .execution_options(synchronize_session=False)
        )


@dataclass(frozen=True, slots=True)
class _Key:
    """A column of an order. A missing value comes last, in both directions."""

    column: InstrumentedAttribute[Any]
    is_descending: bool = False

    def ordering(self) -> tuple[ColumnElement[Any], ...]:
        column = self.column
        return column.is_(None), column.desc() if self.is_descending else column.asc()

    def beyond(self, value: Any) -> ColumnElement[bool]:  # noqa: ANN401 - of any column
        if value is None:
            return false()
        column = self.column
        later = column < value if self.is_descending else column > value
        return or_(later, column.is_(None))

    def same(self, value: Any) -> ColumnElement[bool]:  # noqa: ANN401 - of any column
        return self.column.is_(None) if value is None else self.column == value


def read(
    transaction: Transaction,
    job_id: str,
    wanted: Wanted,
    *,
    order: Order,
    limit: int,
    after: int | None,
    rewound: bool = False,
) -> Sequence[SampleRow]:
    """Samples of a job after the one with the id ``after``, with or without the rewound ones.

    Raises:
        InvalidRequestError: The job has no sample ``after``.
    """
    statement = select(SampleRow).where(SampleRow.job_id == job_id, *wanted.conditions())
    if not rewound:
        statement = statement.where(rewinds.is_kept(job_id, SampleRow.attempt, SampleRow.step))
    if order in {"asc", "desc"}:
        statement = statement.order_by(SampleRow.id.desc() if order == "desc" else SampleRow.id)
    else:
        ordering = [part for key in _keys(order) for part in key.ordering()]
        # Of equal values the older sample comes first.
        statement = statement.order_by(*ordering, SampleRow.id)
    if after is not None:
        edge = transaction.get(SampleRow, after)
        if edge is None or edge.job_id != job_id:
            raise InvalidRequestError(
                f"after=sample-{after} is not in this list", param="after", code="invalid_cursor"
            )
        statement = statement.where(_behind(transaction, order, after))
    return transaction.scalars(statement.limit(limit)).all()


def get(transaction: Transaction, job_id: str, sample_id: int) -> SampleRow:
    """One sample of a job, also a rewound one.

    Raises:
        NotFoundError: The job has no such sample.
    """
    found = transaction.get(SampleRow, sample_id)
    if found is None or found.job_id != job_id:
        raise NotFoundError(
            f"job {job_id} has no sample 'sample-{sample_id}'; it may be deleted by age or size"
        )
    return found


def flags(row: SampleRow) -> Sequence[SampleFlag]:
    """What is unusual about a sample. `_has` is the same as a condition."""
    status, found = row.body["reward_status"], list[SampleFlag]()
    if row.body["finish_reason"] == "length":
        found.append("truncated")
    if status == "error":
        found.append("error")
    if status == "skip":
        found.append("skipped")
    if row.reward is None:
        found.append("unscored")
    return found


def _has(flag: SampleFlag) -> ColumnElement[bool]:
    values = {
        "truncated": ("finish_reason", "length"),
        "error": ("reward_status", "error"),
        "skipped": ("reward_status", "skip"),
    }
    if flag not in values:
        return SampleRow.reward.is_(None)
    name, value = values[flag]
    condition: ColumnElement[bool] = SampleRow.body[name].as_string() == value
    return condition


def _keys(order: Order) -> Sequence[_Key]:
    if order == "group":
        return [
            _Key(SampleRow.step, is_descending=True),
            _Key(SampleRow.attempt, is_descending=True),
            _Key(SampleRow.group_number),
            _Key(SampleRow.group_index),
        ]
    column = SampleRow.reward if order.endswith("reward") else SampleRow.advantage
    return [_Key(column, is_descending=order.startswith("-"))]


def _behind(transaction: Transaction, order: Order, after: int) -> ColumnElement[bool]:
    """The condition that a sample comes after another in an order."""
    if order in {"asc", "desc"}:
        return SampleRow.id < after if order == "desc" else SampleRow.id > after
    keys = [*_keys(order), _Key(SampleRow.id)]
    columns = [key.column for key in keys]
    values = transaction.execute(select(*columns).where(SampleRow.id == after)).one()
    return or_(
        *(
            and_(*(k.same(v) for k, v in zip(keys[:n], values[:n], strict=True)), key.beyond(value))
            for n, (key, value) in enumerate(zip(keys, values, strict=True))
        )
    )
