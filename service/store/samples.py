"""Samples: completions kept for viewing."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import orjson
from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute

from dar.errors import InvalidRequestError
from dar.protocol.worker import SamplesRow
from service.store import rewinds
from service.store.database import Transaction
from service.store.tables import JobRow, SampleRow

Order = Literal["asc", "desc", "reward", "-reward", "advantage", "-advantage"]


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


def read(
    transaction: Transaction,
    job_id: str,
    *,
    step: int | None,
    order: Order,
    limit: int,
    after: int | None,
    rewound: bool = False,
) -> Sequence[SampleRow]:
    """Samples of a job after the one with the id ``after``, with or without the rewound ones.

    Raises:
        InvalidRequestError: The job has no sample ``after``.
    """
    statement = select(SampleRow).where(SampleRow.job_id == job_id)
    if not rewound:
        statement = statement.where(rewinds.is_kept(job_id, SampleRow.attempt, SampleRow.step))
    if step is not None:
        statement = statement.where(SampleRow.step == step)
    key, is_descending = _key(order)
    if after is not None:
        edge = transaction.get(SampleRow, after)
        if edge is None or edge.job_id != job_id:
            raise InvalidRequestError(
                f"after=sample-{after} is not in this list", param="after", code="invalid_cursor"
            )
        statement = statement.where(_behind(key, _value(order, edge), after, is_descending))
    ordering: list[ColumnElement[Any]] = [key.desc() if is_descending else key.asc()]
    if key is not SampleRow.id:
        # A missing value comes last in both orders; of equal values the older sample comes first.
        ordering = [key.is_(None), *ordering, SampleRow.id.asc()]
    return transaction.scalars(statement.order_by(*ordering).limit(limit)).all()


def _key(order: Order) -> tuple[InstrumentedAttribute[Any], bool]:
    if order in {"asc", "desc"}:
        return SampleRow.id, order == "desc"
    key = SampleRow.reward if order.endswith("reward") else SampleRow.advantage
    return key, order.startswith("-")


def _value(order: Order, edge: SampleRow) -> float | None:
    if order in {"asc", "desc"}:
        return edge.id
    return edge.reward if order.endswith("reward") else edge.advantage


def _behind(
    key: InstrumentedAttribute[Any], value: float | None, after: int, is_descending: bool
) -> ColumnElement[bool]:
    if key is SampleRow.id:
        return key < after if is_descending else key > after
    later = SampleRow.id > after
    if value is None:
        return and_(key.is_(None), later)
    beyond = key < value if is_descending else key > value
    return or_(beyond, key.is_(None), and_(key == value, later))
