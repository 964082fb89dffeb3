"""Registered reward endpoints and the jobs that name them."""

from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy import func, select, update

from dar.errors import ConflictError, NotFoundError
from dar.protocol.status import TERMINAL
from service.store import reward_secrets
from service.store.database import Transaction
from service.store.paging import Cursor, Slice, page
from service.store.reward_tables import JobEndpointRow, RewardEndpointRow
from service.store.tables import AttemptRow, JobRow

State = Literal["ok", "misconfigured"]
Lock = Literal["keep", "change"]
COMPARING = frozenset({3, 4})
"""Steps of a probe that request the same rewards again, and in another order."""


def get(
    transaction: Transaction, project_id: str, endpoint_id: str, *, lock: Lock | None = None
) -> RewardEndpointRow:
    """An endpoint of the project.

    Args:
        transaction: The current transaction.
        project_id: The project.
        endpoint_id: The endpoint.
        lock: Until the transaction ends, ``keep`` blocks changes and removal; ``change`` also
            blocks other locks.

    Raises:
        NotFoundError: The project has no such endpoint, or has deleted it.
    """
    statement = select(RewardEndpointRow).where(
        RewardEndpointRow.project_id == project_id,
        RewardEndpointRow.id == endpoint_id,
        RewardEndpointRow.deleted_at.is_(None),
    )
    if lock is not None:
        statement = statement.with_for_update(read=lock == "keep")
    found = transaction.scalars(statement).one_or_none()
    if found is None:
        raise NotFoundError(
            f"there is no reward endpoint {endpoint_id!r}; GET /v1/reward_endpoints lists the existing ones"
        )
    return found


def keep(transaction: Transaction, revisions: Mapping[str, int]) -> bool:
    """Keep endpoints from being changed until the transaction ends.

    Returns:
        Whether each of them still has its revision in ``revisions``.
    """
    if not revisions:
        return True
    kept = transaction.execute(
        select(RewardEndpointRow.id, RewardEndpointRow.revision)
        .where(RewardEndpointRow.id.in_(revisions), RewardEndpointRow.deleted_at.is_(None))
        .order_by(RewardEndpointRow.id)
        .with_for_update(read=True)
    ).all()
    return {row.id: row.revision for row in kept} == revisions


def list_page(
    transaction: Transaction, project_id: str, cursor: Cursor
) -> Slice[RewardEndpointRow]:
    """One page of the project's endpoints."""
    statement = select(RewardEndpointRow).where(
        RewardEndpointRow.project_id == project_id, RewardEndpointRow.deleted_at.is_(None)
    )
    keys = (RewardEndpointRow.created_at, RewardEndpointRow.id)
    return page(transaction, statement, RewardEndpointRow.id, keys, cursor)


def add(transaction: Transaction, endpoint: RewardEndpointRow) -> None:
    """Store a new endpoint."""
    endpoint.revision, endpoint.state = 1, "ok"
    endpoint.created_at = endpoint.updated_at = transaction.now
    transaction.add(endpoint)
    transaction.flush()


def touch(transaction: Transaction, endpoint: RewardEndpointRow, *, is_revised: bool) -> None:
    """Store a change. With ``is_revised`` it is a new revision, whose state is ``ok``."""
    endpoint.updated_at = transaction.now
    if is_revised:
        endpoint.revision += 1
        endpoint.state = "ok"
    transaction.flush()


def purge(transaction: Transaction, endpoint: RewardEndpointRow) -> None:
    """Make cached rewards of the endpoint unusable.

    The last probe does not count for the new revision: a purge suggests that the service changed.
    """
    endpoint.updated_at = transaction.now
    endpoint.revision += 1
    transaction.flush()


def is_deterministic(endpoint: RewardEndpointRow) -> bool:
    """Whether, by the last probe of this revision, repeats and reordering change no reward."""
    probe = endpoint.last_probe
    if probe is None or not probe.get("ok") or probe.get("revision") != endpoint.revision:
        return False
    differences = probe.get("determinism") or {}
    is_changing = any(warning.get("step") in COMPARING for warning in probe.get("warnings", ()))
    return (
        differences.get("max_abs_diff") == 0
        and all(difference in (0, None) for difference in differences.values())
        and not is_changing
    )


def remove(transaction: Transaction, project_id: str, endpoint_id: str) -> None:
    """Delete an endpoint and its secrets.

    Raises:
        NotFoundError: The project has no such endpoint.
        ConflictError: An unfinished job names it.
    """
    # A submission holds the lock ``keep`` until its job is visible here.
    endpoint = get(transaction, project_id, endpoint_id, lock="change")
    needed_by = transaction.scalars(
        select(func.min(JobRow.id))
        .join(JobEndpointRow, JobEndpointRow.job_id == JobRow.id)
        .where(JobEndpointRow.endpoint_id == endpoint_id, JobRow.status.not_in(list(TERMINAL)))
    ).one()
    if needed_by is not None:
        raise ConflictError(
            f"job {needed_by} still needs reward endpoint {endpoint_id}; "
            "cancel the job or wait until it ends",
            code="endpoint_in_use",
        )
    reward_secrets.remove_all(transaction, endpoint_id)
    endpoint.deleted_at = transaction.now
    transaction.flush()


def set_state(transaction: Transaction, endpoint_id: str, revision: int, state: State) -> None:
    """Store the result of a check of ``revision``; a newer revision keeps its state."""
    transaction.execute(
        update(RewardEndpointRow)
        .where(
            RewardEndpointRow.id == endpoint_id,
            RewardEndpointRow.revision == revision,
            RewardEndpointRow.state != state,
        )
        .values(state=state)
    )


def note_requests(
    transaction: Transaction, job_id: str, attempt: int, states: Mapping[str, State]
) -> None:
    """Store the endpoint states that an attempt's requests showed, by component.

    An attempt uses the endpoints as they were when it started, so the state of an endpoint
    that has changed since is not touched.
    """
    started_at = select(AttemptRow.started_at).where(
        AttemptRow.job_id == job_id, AttemptRow.number == attempt
    )
    for state in ("ok", "misconfigured"):  # if two components share an endpoint, a rejection wins
        names = [name for name, found in states.items() if found == state]
        if not names:
            continue
        named = select(JobEndpointRow.endpoint_id).where(
            JobEndpointRow.job_id == job_id, JobEndpointRow.component.in_(names)
        )
        transaction.execute(
            update(RewardEndpointRow)
            .where(
                RewardEndpointRow.id.in_(named),
                RewardEndpointRow.state != state,
                RewardEndpointRow.updated_at <= started_at.scalar_subquery(),
            )
            .values(state=state)
            .execution_options(synchronize_session=False)
        )


def note_probe(
    transaction: Transaction,
    endpoint_id: str,
    report: Mapping[str, Any],
    *,
    revision: int,
    state: State | None,
) -> None:
    """Store the report of a probe, unless the endpoint has changed since.

    Args:
        transaction: The current transaction.
        endpoint_id: The probed endpoint.
        report: The report as JSON.
        revision: The probed revision.
        state: The endpoint's new state; None: unchanged.
    """
    endpoint = transaction.get(RewardEndpointRow, endpoint_id, with_for_update=True)
    if endpoint is None or endpoint.revision != revision:
        return
    endpoint.last_probe = {"at": int(transaction.now.timestamp()), "revision": revision, **report}
    if state is not None:
        endpoint.state = state
    transaction.flush()


def link(transaction: Transaction, job_id: str, components: Mapping[str, str]) -> None:
    """Store which endpoints a job's components name: ids by component."""
    transaction.add_all(
        JobEndpointRow(job_id=job_id, component=name, endpoint_id=endpoint_id)
        for name, endpoint_id in components.items()
    )
    transaction.flush()


def of_job(transaction: Transaction, job_id: str) -> dict[str, RewardEndpointRow]:
    """The endpoints of a job by component, deleted ones included."""
    rows = transaction.execute(
        select(JobEndpointRow.component, RewardEndpointRow)
        .join(RewardEndpointRow, RewardEndpointRow.id == JobEndpointRow.endpoint_id)
        .where(JobEndpointRow.job_id == job_id)
        .order_by(JobEndpointRow.component)
    )
    return {row[0]: row[1] for row in rows}


def usage(transaction: Transaction, endpoint_id: str) -> tuple[dict[str, int], int, str | None]:
    """Counts by status of the jobs that name an endpoint, the sum of their steps, the newest id."""
    named = (
        select(JobEndpointRow.job_id)
        .join(JobRow, JobRow.id == JobEndpointRow.job_id)
        .where(JobEndpointRow.endpoint_id == endpoint_id, JobRow.deleted_at.is_(None))
        .correlate(None)
    )
    rows = transaction.execute(
        select(JobRow.status, func.count(), func.sum(JobRow.step))
        .where(JobRow.id.in_(named))
        .group_by(JobRow.status)
        .order_by(JobRow.status)
    ).all()
    newest = transaction.scalars(
        select(JobRow.id)
        .where(JobRow.id.in_(named))
        .order_by(JobRow.created_at.desc(), JobRow.id.desc())
        .limit(1)
    ).first()
    by_status = {row[0]: row[1] for row in rows}
    return by_status, sum(int(row[2]) for row in rows), newest
