"""Workers: who they are, whether they can run jobs, and what an operator has ordered.

A worker is a slot of a node. Its name must be unique: two machines with one name would end each
other's leases. So a claim of a stranger is refused while the worker that has the name is alive, and
a process that was replaced never claims again.

A worker whose attempts fail by its own fault gets no job for a while, which doubles each time.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, cast

from sqlalchemy import ColumnElement, Select, and_, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from dar.errors import ConflictError, NotFoundError
from dar.protocol.worker import NAME_TAKEN, Claim, ModelInventory
from dar.protocol.workers import WorkerState
from service.store.database import Transaction
from service.store.tables import AttemptRow, JobRow, WorkerModelRow, WorkerRow

USUAL_INTERVAL = 20.0
"""`WorkerReport.interval_seconds` of a worker that reports none."""
MISSED_INTERVALS = 3
SLACK_SECONDS = 5.0
LATEST_SEEN = timedelta(seconds=SLACK_SECONDS)
"""How far ahead of a transaction's time a worker may have been seen: it may have waited for the
lock of a later one. What is further ahead was written before the clock was set back."""
MOST_EARLIER = 16
"""Replaced incarnations that are remembered."""
FIRST_BACKOFF_SECONDS = 10.0
MAX_BACKOFF_SECONDS = 600.0
KEPT = timedelta(days=7)
"""How long a worker that is gone is listed."""
Duty = Literal["work", "drain", "ban"]


def check_in(transaction: Transaction, claim: Claim) -> WorkerRow:
    """Note a claim, with what the worker reports.

    Raises:
        ConflictError: Another worker has its name (``worker_name_taken``).
    """
    now, report = transaction.now, claim.report
    values = {
        "node": claim.node,
        "slot": claim.slot,
        "incarnation": claim.incarnation,
        "earlier": {"incarnations": []},
        "boot_id": claim.boot_id,
        "is_fit": True,
        "started_at": now,
        "seen_at": now,
        "alive_until": now,
        "duty": "work",
        "faults": 0,
    }
    # Two first claims of one name may come at once.
    insert_first = postgresql.insert if transaction.is_postgresql else sqlite.insert
    transaction.execute(insert_first(WorkerRow).values(values).on_conflict_do_nothing())
    mine = select(WorkerRow).where(WorkerRow.node == claim.node, WorkerRow.slot == claim.slot)
    row = transaction.scalars(
        mine.with_for_update().execution_options(populate_existing=True)
    ).one()
    _refuse_stranger(transaction, claim, row)
    if row.incarnation != claim.incarnation:
        replaced = [*row.earlier["incarnations"], row.incarnation]
        row.earlier = {"incarnations": replaced[-MOST_EARLIER:]}
        row.incarnation = claim.incarnation
        row.started_at = now
    _note_models(transaction, row, None if report is None else report.models)
    row.boot_id = claim.boot_id
    row.machine = None if report is None else report.machine
    row.report = None if report is None else report.model_dump(mode="json")
    row.is_fit = report is None or report.fault is None
    row.seen_at = now
    row.alive_until = _alive_until(row, now)
    transaction.flush()
    return row


def _note_models(transaction: Transaction, row: WorkerRow, models: ModelInventory | None) -> None:
    """Store which models a worker has, before its report is replaced."""
    before = ((row.report or {}).get("models") or {}).get("names") or []
    names = [] if models is None else models.names
    if set(names) == set(before):
        return
    mine = and_(WorkerModelRow.node == row.node, WorkerModelRow.slot == row.slot)
    transaction.execute(delete(WorkerModelRow).where(mine))
    if names:
        rows = [{"node": row.node, "slot": row.slot, "name": name} for name in dict.fromkeys(names)]
        transaction.execute(insert(WorkerModelRow), rows)


def has_model(row: type[WorkerRow], name: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether a worker has a model."""
    found = select(WorkerModelRow.name).where(
        WorkerModelRow.node == row.node,
        WorkerModelRow.slot == row.slot,
        WorkerModelRow.name == name,
    )
    # `name` may be of a job that stands further out than SQLAlchemy looks by itself.
    return found.correlate_except(WorkerModelRow).exists()


def _alive_until(row: WorkerRow, now: datetime) -> datetime:
    report = row.report or {}
    if report.get("is_leaving"):
        return now
    seconds = MISSED_INTERVALS * report.get("interval_seconds", USUAL_INTERVAL) + SLACK_SECONDS
    return now + timedelta(seconds=seconds)


def _refuse_stranger(transaction: Transaction, claim: Claim, mine: WorkerRow) -> None:
    if claim.incarnation in mine.earlier["incarnations"]:
        raise _taken(mine, "was started after this one", transaction.now)
    if mine.incarnation != claim.incarnation and _is_stranger(mine, claim):
        _refuse_if_alive(transaction, mine)
    others = select(WorkerRow).where(
        WorkerRow.node == claim.node,
        WorkerRow.slot != claim.slot,
        WorkerRow.boot_id != claim.boot_id,
    )
    for other in transaction.scalars(others.order_by(WorkerRow.slot)):
        if not _is_same_machine(other, claim):
            _refuse_if_alive(transaction, other)


def _is_stranger(row: WorkerRow, claim: Claim) -> bool:
    """Whether a claim for the same slot comes from another machine than the worker's."""
    if row.machine is not None and claim.report is not None:
        return row.machine != claim.report.machine
    return row.boot_id != claim.boot_id


def _is_same_machine(row: WorkerRow, claim: Claim) -> bool:
    """Whether a claim after another boot comes from the same machine."""
    return claim.report is not None and row.machine == claim.report.machine


def _refuse_if_alive(transaction: Transaction, row: WorkerRow) -> None:
    running = select(AttemptRow.job_id).where(
        AttemptRow.status == "running", AttemptRow.node == row.node, AttemptRow.slot == row.slot
    )
    if _is_alive(row, transaction.now) or transaction.scalars(running).first() is not None:
        raise _taken(row, "is alive", transaction.now)


def _is_alive(row: WorkerRow, now: datetime) -> bool:
    """Whether a worker was seen lately. A clock that was set back ends that too."""
    return row.seen_at <= now + LATEST_SEEN and row.alive_until > now


def _taken(row: WorkerRow, what: str, now: datetime) -> ConflictError:
    seconds = max(0, round((now - row.seen_at).total_seconds()))
    return ConflictError(
        f"another worker with the name node {row.node!r}, slot {row.slot!r} {what} (its last sign "
        f"of life came {seconds} s ago); give each machine a name of its own (DAR_NODE), and each "
        "worker on it a slot (DAR_SLOT)",
        code=NAME_TAKEN,
    )


def may_claim(row: WorkerRow, now: datetime) -> bool:
    """Whether a worker gets a job."""
    return row.duty == "work" and row.is_fit and not _is_backing_off(row, now)


def _is_backing_off(row: WorkerRow, now: datetime) -> bool:
    """Whether a wait after own faults has not ended. A clock that was set back ends it too."""
    if row.retry_at is None:
        return False
    return now < row.retry_at <= now + timedelta(seconds=MAX_BACKOFF_SECONDS)


def is_able(row: type[WorkerRow], now: datetime) -> ColumnElement[bool]:
    """`may_claim` of workers that are alive, as a condition."""
    return and_(
        row.duty == "work",
        row.is_fit,
        row.seen_at <= now + LATEST_SEEN,
        row.alive_until > now,
        or_(
            row.retry_at.is_(None),
            row.retry_at <= now,
            row.retry_at > now + timedelta(seconds=MAX_BACKOFF_SECONDS),
        ),
    )


def able(transaction: Transaction) -> Sequence[WorkerRow]:
    """Workers that are alive and may claim."""
    return transaction.scalars(select(WorkerRow).where(is_able(WorkerRow, transaction.now))).all()


def passes_check(transaction: Transaction, node: str) -> bool:
    """Whether the workers of a node report no fault."""
    unfit = select(WorkerRow.slot).where(WorkerRow.node == node, ~WorkerRow.is_fit)
    return transaction.scalars(unfit).first() is None


def note_heartbeat(
    transaction: Transaction, attempt: AttemptRow, models: ModelInventory | None
) -> None:
    """Note that the worker of an attempt is alive, unless another claim of it is under way.

    Args:
        transaction: The transaction to write in.
        attempt: Its attempt.
        models: The models that it has; None: the same as before.
    """
    # A claim locks the worker before jobs, a heartbeat the job before the worker.
    row = transaction.scalars(_worker_of(attempt).with_for_update(skip_locked=True)).one_or_none()
    if row is not None:
        row.seen_at = transaction.now
        row.alive_until = _alive_until(row, transaction.now)
        if models is not None and row.report is not None:
            _note_models(transaction, row, models)
            row.report = {**row.report, "models": models.model_dump(mode="json")}
        transaction.flush()


def note_fault(transaction: Transaction, attempt: AttemptRow, code: str, message: str) -> None:
    """Let a worker whose own fault ended an attempt wait before its next job."""
    row = transaction.scalars(_worker_of(attempt).with_for_update()).one_or_none()
    if row is None:
        return
    row.faults += 1
    row.fault = {"code": code, "message": message}
    seconds = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(row.faults - 1, 16))
    row.retry_at = transaction.now + timedelta(seconds=seconds)
    transaction.flush()


def note_work(transaction: Transaction, attempt: AttemptRow) -> None:
    """Forget the faults of a worker whose attempt made progress, or did not end by its fault."""
    this = and_(WorkerRow.node == attempt.node, WorkerRow.slot == attempt.slot)
    transaction.execute(
        update(WorkerRow)
        .where(this, WorkerRow.incarnation == attempt.incarnation, WorkerRow.faults > 0)
        .values(faults=0, fault=None, retry_at=None)
        .execution_options(synchronize_session=False)
    )


def _worker_of(attempt: AttemptRow) -> Select[WorkerRow]:
    """The worker that runs an attempt, if no later process has its name."""
    return select(WorkerRow).where(
        WorkerRow.node == attempt.node,
        WorkerRow.slot == attempt.slot,
        WorkerRow.incarnation == attempt.incarnation,
    )


def is_to_drain() -> ColumnElement[bool]:
    """Whether the worker of an attempt, `AttemptRow`, must give its job back."""
    # A worker of an earlier version does not know the directive; it only gets no further job.
    return _reporting().where(WorkerRow.duty == "drain").exists()


def is_reporting() -> ColumnElement[bool]:
    """`reports` of the worker of an attempt, `AttemptRow`."""
    return _reporting().exists()


def _reporting() -> Select[str]:
    return select(WorkerRow.slot).where(
        WorkerRow.node == AttemptRow.node,
        WorkerRow.slot == AttemptRow.slot,
        WorkerRow.incarnation == AttemptRow.incarnation,
        WorkerRow.report.is_not(None),
    )


def must_drain(transaction: Transaction, attempt: AttemptRow) -> bool:
    """`is_to_drain` of one attempt."""
    row = transaction.scalars(_worker_of(attempt)).one_or_none()
    return row is not None and row.duty == "drain" and row.report is not None


def reports(transaction: Transaction, attempt: AttemptRow) -> bool:
    """Whether the worker of an attempt reports about itself, as earlier versions do not."""
    row = transaction.scalars(_worker_of(attempt)).one_or_none()
    return row is not None and row.report is not None


def order(
    transaction: Transaction, duty: Duty, node: str, slot: str | None, reason: str | None
) -> Sequence[WorkerRow]:
    """Store an operator's order to a worker, or to all workers of a node.

    Raises:
        NotFoundError: There is no such worker.
    """
    wanted = select(WorkerRow).where(WorkerRow.node == node)
    if slot is not None:
        wanted = wanted.where(WorkerRow.slot == slot)
    rows = transaction.scalars(wanted.order_by(WorkerRow.slot).with_for_update()).all()
    if not rows:
        named = f"node {node!r}" if slot is None else f"node {node!r}, slot {slot!r}"
        raise NotFoundError(f"there is no worker with the name {named}; GET /v1/workers lists all")
    for row in rows:
        row.duty, row.duty_reason = duty, reason
        if duty == "work":
            row.faults, row.fault, row.retry_at = 0, None, None
    transaction.flush()
    return rows


def leases_of(transaction: Transaction, rows: Sequence[WorkerRow]) -> Sequence[str]:
    """Ids of the leases that workers hold."""
    names = {(row.node, row.slot) for row in rows}
    running = select(AttemptRow).where(
        AttemptRow.status == "running", AttemptRow.node.in_({row.node for row in rows})
    )
    found = transaction.scalars(running.order_by(AttemptRow.job_id)).all()
    return [one.lease_id for one in found if (one.node, one.slot) in names]


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker, its state and its job."""

    row: WorkerRow
    state: WorkerState
    reason: str | None
    job_id: str | None
    project_id: str | None
    """Of the job."""


def list_all(transaction: Transaction) -> list[WorkerView]:
    """All workers that were seen lately, by node and slot."""
    running = (
        select(AttemptRow.node, AttemptRow.slot, JobRow.id, JobRow.project_id)
        .join(JobRow, JobRow.id == AttemptRow.job_id)
        .where(AttemptRow.status == "running")
    )
    jobs = {(node, slot): (job, of) for node, slot, job, of in transaction.execute(running)}
    rows = transaction.scalars(select(WorkerRow).order_by(WorkerRow.node, WorkerRow.slot)).all()
    found = []
    for row in rows:
        job_id, project_id = jobs.get((row.node, row.slot), (None, None))
        state, reason = state_of(row, transaction.now, is_busy=job_id is not None)
        found.append(WorkerView(row, state, reason, job_id, project_id))
    return found


def state_of(row: WorkerRow, now: datetime, *, is_busy: bool) -> tuple[WorkerState, str | None]:
    """What a worker does, and why it gets no job."""
    if row.duty == "ban":
        return "banned", row.duty_reason or "an operator has banned it"
    if not _is_alive(row, now) and not is_busy:
        if (row.report or {}).get("is_leaving"):
            return "gone", "it was stopped"
        return "gone", "it sends nothing any more: it, its machine or its network has failed"
    if row.duty == "drain":
        reason = row.duty_reason or "an operator drains it"
        return ("draining" if is_busy else "drained"), reason
    fault = fault_of(row, now)
    if fault is not None and not is_busy:
        return "failing", f"{fault['code']}: {fault['message']}"
    return ("busy" if is_busy else "idle"), None


def fault_of(row: WorkerRow, now: datetime) -> Mapping[str, str] | None:
    """The fault because of which a worker gets no job; None: there is none."""
    if not row.is_fit and row.report is not None:
        return cast("Mapping[str, str]", row.report["fault"])
    return row.fault if _is_backing_off(row, now) else None


@dataclass(frozen=True, slots=True)
class Fleet:
    """All workers in numbers."""

    states: Mapping[WorkerState, int]
    failing: Sequence[tuple[str, str, str]]
    """Node, slot and code of each failing worker."""


def fleet(transaction: Transaction) -> Fleet:
    """All workers in numbers."""
    found = list_all(transaction)
    failing = [
        (view.row.node, view.row.slot, fault["code"])
        for view in found
        if view.state == "failing" and (fault := fault_of(view.row, transaction.now)) is not None
    ]
    return Fleet(Counter(view.state for view in found), failing)


def failures_by_owner(transaction: Transaction) -> Mapping[str, int]:
    """Number of failures of all attempts of jobs that were not deleted."""
    counted = (
        select(AttemptRow.owner, func.count())
        .join(JobRow, JobRow.id == AttemptRow.job_id)
        .where(AttemptRow.failure.is_not(None), JobRow.deleted_at.is_(None))
    )
    rows = transaction.execute(counted.group_by(AttemptRow.owner))
    return {owner or "unknown": count for owner, count in rows}


def forget(transaction: Transaction) -> None:
    """Remove workers that were not seen for long; those with an operator's order are kept."""
    old = WorkerRow.seen_at < transaction.now - KEPT
    transaction.execute(delete(WorkerRow).where(old, WorkerRow.duty == "work"))
    listed = select(WorkerRow.slot).where(
        WorkerRow.node == WorkerModelRow.node, WorkerRow.slot == WorkerModelRow.slot
    )
    transaction.execute(delete(WorkerModelRow).where(~listed.exists()))
