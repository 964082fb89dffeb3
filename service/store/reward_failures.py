"""Failed requests to reward services, and the state of endpoints that they show."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import delete, insert, select

from dar.protocol.ids import new_id
from dar.protocol.worker import RewardsRow
from service.store import reward_endpoints, rewinds
from service.store.database import Transaction
from service.store.fence import Held, is_live
from service.store.paging import Cursor, Slice, page
from service.store.tables import RewardFailureRow

MOST_KEPT = 10_000
"""Per job; older ones are deleted. The job's metrics count all failures."""
REJECTION = re.compile(r"config\.|tls\.|egress|http_4(?!00|08|13|22|25|29)")
"""Codes of failures that pause a job at once, as no retry can help."""


def add(transaction: Transaction, held: Held, rows: Sequence[RewardsRow]) -> None:
    """Store the failures in some reports, and the state of the endpoints that they show.

    An attempt that has lost its job changes no state: its requests may be older than the state.
    """
    job_id, attempt = held.job.id, held.attempt.number
    states: dict[str, reward_endpoints.State] = {}
    for row in rows:
        states |= {one.component: "ok" for one in row.requests if one.outcome == "ok"}
        states |= {
            one.component: "misconfigured" for one in row.failures if REJECTION.match(one.code)
        }
    if is_live(held.attempt, held.job):
        reward_endpoints.note_requests(transaction, job_id, attempt, states)
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
    transaction: Transaction, job_id: str, step: int | None, cursor: Cursor, *, rewound: bool
) -> Slice[RewardFailureRow]:
    """One page of a job's failures, with or without the rewound ones."""
    every = select(RewardFailureRow).where(RewardFailureRow.job_id == job_id)
    if step is not None:
        every = every.where(RewardFailureRow.step == step)
    kept = rewinds.is_kept(job_id, RewardFailureRow.attempt, RewardFailureRow.step)
    statement = every if rewound else every.where(kept)
    keys = (RewardFailureRow.created_at, RewardFailureRow.id)
    return page(transaction, statement, RewardFailureRow.id, keys, cursor, edges=every)
