"""Requests to reward services that were given up: the newest ones of each job."""

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import delete, insert, select

from dar.protocol.ids import new_id
from dar.protocol.worker import RewardsRow
from service.store.database import Transaction
from service.store.paging import Cursor, Slice, page
from service.store.tables import RewardFailureRow

MOST_KEPT = 10_000
"""Per job; what is older goes. All failures are counted in the job's metrics."""


def add(transaction: Transaction, job_id: str, attempt: int, rows: Sequence[RewardsRow]) -> None:
    """Store the failures of some reports."""
    values = [
        {
            "id": new_id("rwf_"),
            "job_id": job_id,
            "attempt": attempt,
            "step": row.step,
            "created_at": datetime.fromtimestamp(row.at, UTC),
            **failed.model_dump(),
        }
        for row in rows
        for failed in row.failures
    ]
    if not values:
        return
    transaction.execute(insert(RewardFailureRow), values)
    surplus = (
        select(RewardFailureRow.id)
        .where(RewardFailureRow.job_id == job_id)
        .order_by(RewardFailureRow.created_at.desc(), RewardFailureRow.id.desc())
        .offset(MOST_KEPT)
        .limit(MOST_KEPT)
    )
    transaction.execute(
        delete(RewardFailureRow)
        .where(RewardFailureRow.id.in_(surplus))
        .execution_options(synchronize_session=False)
    )


def list_page(
    transaction: Transaction, job_id: str, step: int | None, cursor: Cursor
) -> Slice[RewardFailureRow]:
    """One page of a job's failures."""
    statement = select(RewardFailureRow).where(RewardFailureRow.job_id == job_id)
    if step is not None:
        statement = statement.where(RewardFailureRow.step == step)
    keys = (RewardFailureRow.created_at, RewardFailureRow.id)
    return page(transaction, statement, RewardFailureRow.id, keys, cursor)
