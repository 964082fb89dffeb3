"""Leases: which worker may write for a job, and until when."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, and_, case, cast, func, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, aliased

from dar.protocol.base import MAX_COUNT
from dar.protocol.worker import AttemptProgress, Claim, ModelInventory, WorkerReport
from service.store import checkpoints, fence, outcomes, transitions, workers
from service.store.database import Transaction
from service.store.fence import Held
from service.store.paging import Cursor, Slice, page
from service.store.tables import AttemptRow, CheckpointRow, JobRow, WorkerRow

OTHERS_FIRST = timedelta(seconds=20)
"""How long a due job that has failed on a node is left to idle workers of others."""
HOLDERS_FIRST = timedelta(seconds=20)
"""How long a due job is left to idle workers that have its model. It is two polls."""
LOSSES_OF_NODE = 2
NOT_OF_NODE = ("reward", "storage", "database")
"""Owners of failures that are the same on every node."""
CHECKPOINTS_ON_DISK = 3
"""Checkpoints for which an attempt needs room: the one it resumes from, and two of its own."""
MOST_NOTED = 10
"""Jobs without room for which one claim notes that."""
NO_ROOM = "waiting for a worker with "
"""How the message of a job begins for which no worker has the room."""
PROCESSES = ("method", "dar", "resources", "processes")
"""Place of the number of processes in a spec."""


@dataclass(frozen=True, slots=True)
class Credential:
    """Id of a new lease, and the digest of its attempt's token."""

    lease_id: str
    token_sha256: str


def claim(
    transaction: Transaction, claim: Claim, credential: Credential, ttl: timedelta
) -> Held | None:
    """Give the job that has been in the queue longest to a slot that can run it.

    Leases that an earlier process of the slot, or its machine before a reboot, still holds are
    ended first, and their jobs are retried if they have attempts left.

    A job that failed on the node goes to another one first, if a worker is idle there. One whose
    model the slot would have to download goes first to an idle worker with the model. Jobs that
    need more devices, disk space or memory than the slot has are left to others.

    Args:
        transaction: The transaction to write in.
        claim: The slot.
        credential: Of the new lease.
        ttl: How long the lease is valid without a heartbeat.

    Returns:
        The job and its new attempt; None if no job is due that the slot can run.

    Raises:
        ConflictError: Another worker has the slot's name (``worker_name_taken``).
    """
    worker = workers.check_in(transaction, claim)
    _end_old_leases(transaction, claim, ttl)
    if not claim.wants_job or not workers.may_claim(worker, transaction.now):
        return None
    job = _take_oldest(transaction, claim)
    if job is None:
        _note_missing_room(transaction, claim)
        return None
    resume = checkpoints.newest(transaction, job.id)
    start_step = 0 if resume is None else resume.step
    transaction.execute(
        update(JobRow)
        .where(JobRow.id == job.id)
        .values(
            step=start_step,
            tokens=0 if resume is None else checkpoints.trained_tokens(resume),
            started_at=job.started_at or transaction.now,
            metrics_event_step=start_step,
        )
    )
    attempt = AttemptRow(
        job_id=job.id,
        number=job.attempt,
        lease_id=credential.lease_id,
        status="running",
        node=claim.node,
        slot=claim.slot,
        incarnation=claim.incarnation,
        boot_id=claim.boot_id,
        token_sha256=credential.token_sha256,
        started_at=transaction.now,
        lease_until=transaction.now + ttl,
        start_step=start_step,
        resume_checkpoint_id=None if resume is None else resume.id,
    )
    transaction.add(attempt)
    transaction.flush()
    return Held(job, attempt)


def _take_oldest(transaction: Transaction, claim: Claim) -> JobRow | None:
    waiting = aliased(JobRow)
    oldest = (
        select(waiting.id)
        .where(_is_due(waiting, transaction.now, timedelta(0)), *_fits(transaction, claim, waiting))
        .order_by(waiting.queued_at, waiting.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    return transitions.move(
        transaction,
        "claimed",
        JobRow.id == oldest,
        f"starting on {claim.node}",
        values={"attempt": JobRow.attempt + 1},
        facts={"node": claim.node, "slot": claim.slot},
    )


def _is_due(job: type[JobRow], now: datetime, longer: timedelta) -> ColumnElement[bool]:
    """Whether a worker may claim a job, and could do so ``longer`` ago.

    One that waits for its reward service is claimed only after a probe has passed, which removes
    the detail (`service.store.reward_pauses.note_probe`).
    """
    return and_(
        job.status == "queued",
        transitions.has_waited(job, now, longer),
        job.status_detail.is_distinct_from("waiting_for_reward"),
    )


def _fits(
    transaction: Transaction, claim: Claim, job: type[JobRow]
) -> Sequence[ColumnElement[bool]]:
    """Which jobs a slot may claim."""
    conditions = [~_is_left_to_others(transaction.now, claim.node, job)]
    report = claim.report
    if report is None:
        return conditions
    conditions.append(_room_for(job) <= report.disk_free)
    if report.memory_free is not None:
        conditions.append(_memory_for(job, report) <= report.memory_free)
    if report.models is not None:
        conditions.append(~_is_left_to_holders(transaction.now, report.models.names, job))
    if report.devices:
        mine = len(report.devices)
        most = max((_processes(row) for row in workers.able(transaction)), default=mine)
        wanted = func.coalesce(job.spec[PROCESSES].as_integer(), 1)
        # A job that no slot can run is claimed, and fails with a sentence about both numbers.
        conditions.append(or_(wanted <= mine, wanted > max(most, mine)))
    return conditions


def _room_for(job: type[JobRow]) -> ColumnElement[int]:
    """Bytes on the worker's disk that a job needs for its checkpoints."""
    newest = select(CheckpointRow.bytes).where(CheckpointRow.id == job.latest_checkpoint_id)
    return CHECKPOINTS_ON_DISK * func.coalesce(newest.scalar_subquery(), 0)


def _memory_for(job: type[JobRow], report: WorkerReport) -> ColumnElement[int]:
    """Bytes of memory that a job's trainer needs at least; 0: not known."""
    return func.coalesce(job.loading_bytes if report.devices else job.memory_bytes, 0)


def _note_missing_room(transaction: Transaction, claim: Claim) -> None:
    """Show why jobs wait for which no worker that is alive has the room, not even a busy one."""
    report = claim.report
    if report is None:
        return
    room = _room_for(JobRow)
    lacks = [room > report.disk_free]
    if report.memory_free is not None:
        lacks.append(_memory_for(JobRow, report) > report.memory_free)
    is_due = _is_due(JobRow, transaction.now, timedelta(0))
    short = select(JobRow, room).where(is_due, or_(*lacks)).limit(MOST_NOTED)
    found = transaction.execute(short).all()
    fleet = workers.able(transaction) if found else []
    for job, least in found:
        what = _missing_everywhere(job, least, fleet)
        if what is None and not (job.status_message or "").startswith(NO_ROOM):
            continue
        message = "waiting for a worker" if what is None else f"{NO_ROOM}{what}"
        transaction.execute(
            update(JobRow)
            .where(JobRow.id == job.id, JobRow.status == "queued")
            .where(JobRow.status_message.is_distinct_from(message))
            .values(status_message=message)
            .execution_options(synchronize_session=False)
        )


def _missing_everywhere(job: JobRow, room: int, fleet: Sequence[WorkerRow]) -> str | None:
    """What a job needs that none of these workers has; None: one of them could run it."""
    resources = job.spec["method"]["dar"].get("resources") or {}
    wanted = resources.get("processes") or 1
    if wanted <= max(map(_processes, fleet), default=0):
        fleet = [row for row in fleet if _processes(row) >= wanted]
    reports = [row.report for row in fleet]
    known = [report for report in reports if report is not None]
    if len(known) < len(reports):  # a worker of an earlier version takes any job
        return None
    roomy = [report for report in known if room <= report["disk_free"]]
    if not roomy:
        return f"{room:,} bytes of free disk for its checkpoints"
    needs = []
    for report in roomy:
        least = (job.loading_bytes if report["devices"] else job.memory_bytes) or 0
        free = report["memory_free"]
        if free is None or least <= free:
            return None
        needs.append(least)
    return f"{min(needs):,} bytes of free memory, the least that its trainer needs there"


def _processes(row: WorkerRow) -> float:
    """Number of processes that a worker can run at once; those on a CPU share it."""
    devices = [] if row.report is None else row.report["devices"]
    return len(devices) or MAX_COUNT


def _is_left_to_others(now: datetime, node: str, job: type[JobRow]) -> ColumnElement[bool]:
    """Whether a job has failed on the node, and an idle worker where it has not may claim it."""
    other = aliased(WorkerRow)
    idle = select(other.slot).where(
        other.node != node,
        workers.is_able(other, now),
        ~_is_busy(other),
        _has_room(other, job),
        ~_has_failed_on(other.node, job),
    )
    return and_(
        job.failed_attempts > 0,
        job.not_before > now - OTHERS_FIRST,
        _has_failed_on(node, job),
        idle.exists(),
    )


def _is_left_to_holders(
    now: datetime, names: Collection[str], job: type[JobRow]
) -> ColumnElement[bool]:
    """Whether a worker lacks the model of a job, and an idle holder of it may claim the job."""
    made = job.model_source["checkpoint_id"].as_string()
    model = func.coalesce(made, job.model_source["name"].as_string())
    other = aliased(WorkerRow)
    idle = select(other.slot).where(
        workers.is_able(other, now),
        ~_is_busy(other),
        workers.has_model(other, model),
        _has_room(other, job),
        ~_has_failed_on(other.node, job),
    )
    is_fresh = job.not_before.between(now - HOLDERS_FIRST, now)  # later: the clock was set back
    return and_(is_fresh, model.not_in(names), idle.exists())


def _has_room(worker: type[WorkerRow], job: type[JobRow]) -> ColumnElement[bool]:
    """Whether a worker has the disk space, memory and devices that a job needs.

    One of an earlier version, which reports nothing, takes any job.
    """

    def bytes_of(name: str) -> ColumnElement[int]:
        return cast(worker.report[name].as_string(), BigInteger)  # as_integer has 32 bits

    devices = func.json_array_length(worker.report["devices"])
    memory = case((devices > 0, job.loading_bytes), else_=job.memory_bytes)
    free = bytes_of("memory_free")
    wanted = func.coalesce(job.spec[PROCESSES].as_integer(), 1)
    has_all = and_(
        _room_for(job) <= bytes_of("disk_free"),
        or_(free.is_(None), func.coalesce(memory, 0) <= free),
        or_(devices == 0, wanted <= devices),
    )
    return or_(worker.report.is_(None), has_all)


def _is_busy(worker: type[WorkerRow]) -> ColumnElement[bool]:
    running = select(AttemptRow.job_id).where(
        AttemptRow.status == "running",
        AttemptRow.node == worker.node,
        AttemptRow.slot == worker.slot,
    )
    return running.exists()


def _has_failed_on(
    node: str | InstrumentedAttribute[str], job: type[JobRow]
) -> ColumnElement[bool]:
    """Whether a job has failed on a node, or was lost there twice, since its last progress."""
    ended = aliased(AttemptRow)
    on_node = (
        select(ended.number)
        .where(ended.job_id == job.id, ended.number >= job.counts_from, ended.node == node)
        .correlate_except(ended)  # SQLAlchemy finds the job by itself only one level above
    )
    failed = on_node.where(
        ended.status == "failed",
        or_(ended.owner.is_(None), ended.owner.not_in(NOT_OF_NODE)),
    )
    lost = on_node.where(ended.status == "lost").with_only_columns(func.count())
    return or_(failed.exists(), lost.scalar_subquery() >= LOSSES_OF_NODE)


def count_due(transaction: Transaction, older_than: timedelta) -> int:
    """Number of unclaimed jobs in the queue that have been due for ``older_than``."""
    return transaction.scalars(
        select(func.count()).select_from(JobRow).where(_is_due(JobRow, transaction.now, older_than))
    ).one()


@dataclass(frozen=True, slots=True)
class QueueState:
    """How long jobs wait for workers, and how the leases stand."""

    oldest_seconds: float
    """Since when the oldest job that a worker may claim could have been claimed; 0: there is
    none."""
    leases: int
    """Leases of running attempts."""
    lease_seconds: float | None
    """Time until the first of them ends, unless it is renewed. None: there is none."""


def queue_state(transaction: Transaction) -> QueueState:
    """The queue and the leases in numbers."""
    now = transaction.now
    due = select(JobRow.queued_at, JobRow.not_before).where(
        _is_due(JobRow, now, timedelta(0)), JobRow.deleted_at.is_(None)
    )
    oldest = transaction.execute(due.order_by(JobRow.queued_at, JobRow.id).limit(1)).one_or_none()
    since = now if oldest is None else max(oldest.queued_at, oldest.not_before)
    count, first = transaction.execute(
        select(func.count(), func.min(AttemptRow.lease_until)).where(AttemptRow.status == "running")
    ).one()
    left = (first - now).total_seconds() if count else None
    return QueueState(max(0.0, (now - since).total_seconds()), count, left)


def _end_old_leases(transaction: Transaction, claim: Claim, ttl: timedelta) -> None:
    # A slot that claims runs nothing: a lease of this same process is one whose reply was lost.
    old = select(AttemptRow.lease_id).where(
        AttemptRow.status == "running",
        AttemptRow.node == claim.node,
        or_(AttemptRow.slot == claim.slot, AttemptRow.boot_id != claim.boot_id),
    )
    for lease_id in transaction.scalars(old.order_by(AttemptRow.job_id)).all():
        held = fence.lock(transaction, lease_id)
        attempt = held.attempt
        if attempt.status != "running":
            continue
        process = (claim.slot, claim.incarnation)
        is_of_this_process = (attempt.slot, attempt.incarnation) == process
        if is_of_this_process and attempt.lease_until <= attempt.started_at + ttl:
            why = f"the worker on {claim.node} did not get the job; waiting for another slot"
            outcomes.take_back(transaction, held, why)
        else:
            outcomes.lose(transaction, held, f"the worker on {claim.node} was restarted")


def renew(
    transaction: Transaction,
    held: Held,
    ttl: timedelta,
    progress: AttemptProgress | None,
    models: ModelInventory | None = None,
) -> bool:
    """Renew a lease and store the attempt's progress. Returns whether the job has changed.

    Args:
        transaction: The transaction to write in.
        held: The attempt.
        ttl: How long the lease is valid without a further heartbeat.
        progress: What the attempt does now.
        models: The models that its worker has; None: the same as before.
    """
    transaction.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == held.job.id, AttemptRow.number == held.attempt.number)
        .values(lease_until=transaction.now + ttl)
    )
    workers.note_heartbeat(transaction, held.attempt, models)
    return progress is not None and note_progress(transaction, held.job, progress)


def note_progress(transaction: Transaction, job: JobRow, progress: AttemptProgress) -> bool:
    """Show progress as the job's detail, unless that shows a pending cancellation, pause or stop.

    Steps and tokens never decrease within an attempt: a trainer that loads its model reports none,
    and a heartbeat may arrive after the rows of a later step.
    """
    said: dict[str, Any] = {
        "step": max(job.step, progress.step),
        "tokens": max(job.tokens, progress.tokens or 0),
    }
    if job.cancel_requested_at is None and job.status != "pausing":
        if job.stop_requested_at is None or progress.phase == "blocked: disk":
            said |= {"status_detail": progress.phase, "status_message": progress.message}
        else:
            said["status_detail"] = "stopping"
            if job.status_detail == "blocked: disk":
                said["status_message"] = None
    if all(getattr(job, name) == value for name, value in said.items()):
        return False
    transaction.execute(update(JobRow).where(JobRow.id == job.id).values(said))
    return True


def pin_revisions(
    transaction: Transaction, held: Held, given: Mapping[str, str]
) -> Mapping[str, str]:
    """Fix the commits of hub models for all attempts of a job; those fixed before stay."""
    source = held.job.model_source
    before: dict[str, str] = source.get("revisions") or {}
    pinned = {**given, **before}
    if pinned != before:
        changed_source = {**source, "revisions": pinned}
        transaction.execute(
            update(JobRow).where(JobRow.id == held.job.id).values(model_source=changed_source)
        )
    return pinned


def running(transaction: Transaction) -> Mapping[str, datetime]:
    """Ids of the leases of running attempts, each with the end that its last renewal set."""
    rows = transaction.execute(
        select(AttemptRow.lease_id, AttemptRow.lease_until)
        .where(AttemptRow.status == "running")
        .order_by(AttemptRow.job_id)
    ).all()
    return {lease_id: lease_until for lease_id, lease_until in rows}  # noqa: C416 - `dict(rows)` has no type that fits


def rewrite(transaction: Transaction, lease_ids: Sequence[str]) -> None:
    """Write leases as they are. It fails where a renewal would fail too."""
    transaction.execute(
        update(AttemptRow)
        .where(AttemptRow.lease_id.in_(lease_ids), AttemptRow.status == "running")
        .values(lease_until=AttemptRow.lease_until)
        .execution_options(synchronize_session=False)
    )


def expire(transaction: Transaction, lease_id: str, seen: datetime) -> bool:
    """End a lease, unless it was renewed or ended since it was ``seen`` with this end.

    Returns whether it was ended. Its end is not compared with the clock, which may have been set:
    how long the lease has not been renewed is measured by `service.background.reconciler`.
    """
    held = fence.lock(transaction, lease_id)
    attempt = held.attempt
    if attempt.status != "running" or attempt.lease_until != seen:
        return False
    outcomes.lose(transaction, held, f"the worker on {attempt.node} has sent no heartbeat")
    return True


def unattended_cancellations(transaction: Transaction) -> Sequence[str]:
    """Jobs that are being cancelled and that no attempt runs."""
    attempts = select(AttemptRow.job_id).where(
        AttemptRow.job_id == JobRow.id, AttemptRow.status == "running"
    )
    is_cancelling = JobRow.cancel_requested_at.is_not(None)
    return transaction.scalars(
        select(JobRow.id).where(JobRow.status == "running", is_cancelling, ~attempts.exists())
    ).all()


def finish_cancellation(transaction: Transaction, job_id: str) -> None:
    """Cancel a job that `unattended_cancellations` found, unless it has changed since."""
    transitions.move(
        transaction, "cancel_confirmed", JobRow.id == job_id, "cancelled; no worker was left"
    )


def changed(
    transaction: Transaction,
    job_ids: Collection[str],
    *,
    cancel: Collection[str],
    pause: Collection[str],
    drain: Collection[str],
    stop: Collection[str],
) -> Sequence[str]:
    """Which jobs have changed for their workers, so that a directive is due.

    Args:
        transaction: Where they are read.
        job_ids: Jobs to check; a job that no attempt runs any more has changed.
        cancel: Jobs whose worker has not received a cancellation, should there be one.
        pause: Jobs whose worker has not received a pause, should there be one.
        drain: Jobs whose worker has not received an order to drain, should there be one.
        stop: Jobs whose worker has not received an order to stop, should there be one.
    """
    is_running = select(AttemptRow.job_id).where(
        AttemptRow.job_id == JobRow.id,
        AttemptRow.number == JobRow.attempt,
        AttemptRow.status == "running",
    )
    is_drained = is_running.where(workers.is_to_drain())
    # A worker of an earlier version is sent the order to stop after the first step.
    may_stop = or_(JobRow.step > 0, is_running.where(workers.is_reporting()).exists())
    statement = select(JobRow.id).where(
        JobRow.id.in_(job_ids),
        or_(
            and_(JobRow.cancel_requested_at.is_not(None), JobRow.id.in_(cancel)),
            and_(JobRow.status == "pausing", JobRow.id.in_(pause)),
            and_(JobRow.stop_requested_at.is_not(None), JobRow.id.in_(stop), may_stop),
            and_(is_drained.exists(), JobRow.id.in_(drain)),
            ~is_running.exists(),
        ),
    )
    return transaction.scalars(statement).all()


def list_page(transaction: Transaction, job_id: str, cursor: Cursor) -> Slice[AttemptRow]:
    """Attempts of a job, in the order of their numbers."""
    statement = select(AttemptRow).where(AttemptRow.job_id == job_id)
    return page(transaction, statement, AttemptRow.lease_id, [AttemptRow.number], cursor)
