"""Periodic work: expires leases, repeats wake-ups, removes old checkpoints and abandoned files.

A pass reads first, and writes only what that has found. Every action is a conditional UPDATE, so
two reconcilers at once do no harm. With PostgreSQL one replica at a time is elected.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dar.errors import ConflictError, DARError, NotFoundError
from dar.fault_points import fault_point
from service.artifacts import Artifacts
from service.background.notifier import Notifier
from service.background.periodic import PeriodicThread
from service.background.waker import Waker
from service.store import (
    checkpoints,
    deletion,
    fence,
    file_uploads,
    files,
    leases,
    reward_requests,
    stops,
    submission_claims,
    workers,
)
from service.store.database import Database, LockKey

log = structlog.get_logger()
SWEEP_SECONDS = 3600.0
ORPHANS_AT_ONCE = 500
UNCLAIMED = timedelta(seconds=5)
"""Age from which the wake-up of a due job was probably lost."""
JUMP_SECONDS = 2.0
"""Smallest difference between two clocks that means that one was set."""


@dataclass(frozen=True, slots=True)
class _Instant:
    """The same instant on two clocks."""

    monotonic: float
    """Seconds on this process's clock, which nobody sets."""
    now: datetime
    """Time by the database's clock, which may be set forward or back."""
    error_seconds: float
    """How long it took to read the database's clock."""


@dataclass(frozen=True, slots=True)
class _Silence:
    """How long a lease was not renewed."""

    lease_until: datetime
    """The end that its last renewal set. Each renewal sets another one."""
    seconds: float


class SilentLeases:
    """Measures how long each lease was not renewed, and for how much of that it could have been.

    No lease is compared with the database's clock. Its silence is the time between looks, by this
    process's own clock, in which the lease stayed as it was. Time in which the database failed does
    not count, and all silence ends with a long outage, as after a start. So every holder gets one
    TTL to renew its lease, whatever fails and whatever the clock is set to.

    Args:
        ttl_seconds: Silence after which a lease has expired.
        longest_gap_seconds: Time between two looks that is an outage of this process or of the
            database.
    """

    def __init__(self, ttl_seconds: float, longest_gap_seconds: float) -> None:
        self._ttl_seconds = ttl_seconds
        self._longest_gap_seconds = longest_gap_seconds
        self._last: _Instant | None = None
        self._has_failed = False
        self._silences: dict[str, _Silence] = {}

    def miss(self) -> None:
        """Note that the database failed: the time since the last look counts for no lease."""
        self._has_failed = True

    def jump(self, at: _Instant) -> float:
        """Seconds by which the database's clock was set forward since the last look; <0: back."""
        if self._last is None:
            return 0.0
        passed = (at.now - self._last.now).total_seconds()
        jump = passed - (at.monotonic - self._last.monotonic)
        error = JUMP_SECONDS + at.error_seconds + self._last.error_seconds
        return jump if abs(jump) > error else 0.0

    def look(self, at: _Instant, running: Mapping[str, datetime]) -> Mapping[str, float]:
        """The silence of each running lease in seconds. `keep` makes it the last look."""
        return {name: one.seconds for name, one in self._after(at, running).items()}

    def keep(self, at: _Instant, running: Mapping[str, datetime]) -> None:
        """Make a look the last one, once a renewal is known to have been possible since."""
        self._silences = self._after(at, running)
        self._last, self._has_failed = at, False

    def _after(self, at: _Instant, running: Mapping[str, datetime]) -> dict[str, _Silence]:
        gap = None if self._last is None else at.monotonic - self._last.monotonic
        if gap is None or gap > self._longest_gap_seconds:
            return {name: _Silence(until, 0.0) for name, until in running.items()}
        counted = 0.0 if self._has_failed else gap
        is_clock_usable = self.jump(at) == 0.0
        silences: dict[str, _Silence] = {}
        for name, until in running.items():
            known = self._silences.get(name)
            if known is not None and known.lease_until == until:
                seconds = known.seconds + counted
            else:  # renewed since the last look; by the database's clock if that is usable
                age = self._ttl_seconds - (until - at.now).total_seconds()
                seconds = min(max(age, 0.0), counted) if is_clock_usable else 0.0
            silences[name] = _Silence(until, seconds)
        return silences


@dataclass(frozen=True, slots=True)
class _Found:
    """What a pass has found to do."""

    expired: Mapping[str, datetime]
    """Leases that have expired, with the end that was seen."""
    cancelling: Sequence[str]
    """Jobs that are being cancelled and that no attempt runs."""
    waiting: int
    """Due jobs whose wake-up was probably lost."""
    over_time: Sequence[str]
    """Jobs that have run for as long as their spec allows."""
    is_removing: bool
    """Whether there are checkpoints to remove."""

    def is_anything(self) -> bool:
        """Whether there is something to do."""
        jobs = self.cancelling or self.over_time or self.waiting
        return bool(self.expired or jobs or self.is_removing)


class Reconciler(PeriodicThread):
    """A thread that makes regular passes over the tables.

    Args:
        database: The database.
        artifacts: The files of checkpoints.
        waker: Wakes workers for queued jobs.
        notifier: Wakes long polls of changed jobs.
        ttl_seconds: How long a lease is valid.
        pause_seconds: Time between two passes.
        after_pass: Called after each pass, on every replica.
        monotonic: Clock for durations; replaced in tests.
    """

    def __init__(
        self,
        database: Database,
        artifacts: Artifacts,
        waker: Waker,
        notifier: Notifier,
        *,
        ttl_seconds: float,
        pause_seconds: float,
        after_pass: Callable[[], None] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("reconciler", pause_seconds=pause_seconds)
        self._database = database
        self._artifacts = artifacts
        self._waker = waker
        self._notifier = notifier
        self._ttl_seconds = ttl_seconds
        self._after_pass = after_pass
        self._monotonic = monotonic
        self._leases = SilentLeases(ttl_seconds, max(ttl_seconds / 2, 3 * pause_seconds))
        self._forward_seconds = 0.0
        """By how much the database's clock was set forward, until deadlines are moved along."""
        self._starts: Mapping[str, datetime] = {}
        """`stops.starts` before it was set forward."""
        self._next_sweep = monotonic()

    def run_once(self) -> None:
        """Make one pass. What it finds is done if this replica is elected."""
        self._pass()
        self._after_pass()

    def _pass(self) -> None:
        try:
            found = self._look()
        except SQLAlchemyError:
            self._leases.miss()
            raise
        is_sweep_due = self._monotonic() >= self._next_sweep
        if not (found.is_anything() or is_sweep_due or self._forward_seconds > 0):
            return
        with self._database.elected(LockKey.RECONCILER) as is_elected:
            if is_elected:
                self._do(found, is_sweep_due=is_sweep_due)

    def _do(self, found: _Found, *, is_sweep_due: bool) -> None:
        try:
            if self._forward_seconds > 0:
                self._shift_deadlines()
            for lease_id, seen in found.expired.items():
                self._expire(lease_id, seen)
        except SQLAlchemyError:
            self._leases.miss()
            raise
        for job_id in found.cancelling:
            with self._database.write() as transaction:
                leases.finish_cancellation(transaction, job_id)
        for job_id in found.over_time:
            with self._database.write() as transaction:
                if stops.check_time(transaction, job_id):
                    transaction.after_commit(partial(self._notifier.notify, job_id))
        if found.waiting:
            self._waker.wake(found.waiting)
        if found.is_removing:
            self._remove_checkpoints()
        if is_sweep_due:
            self._sweep()

    def _look(self) -> _Found:
        with self._database.read() as transaction:
            before = self._monotonic()
            now = transaction.now
            at = _Instant(before, now, error_seconds=self._monotonic() - before)
            running = leases.running(transaction)
            cancelling = leases.unattended_cancellations(transaction)
            waiting = leases.count_due(transaction, UNCLAIMED)
            starts = stops.starts(transaction)
            over_time = stops.over_time(transaction)
            is_removing = checkpoints.is_any_to_remove(transaction)
        silences = self._leases.look(at, running)
        silent = [name for name, silence in silences.items() if silence > self._ttl_seconds / 3]
        if silent:
            # A database that answers but takes no writes, as its disk is full, takes no renewals.
            self._database.transact(lambda transaction: leases.rewrite(transaction, silent))
        self._forward_seconds += max(0.0, self._leases.jump(at))
        if self._forward_seconds == 0.0:
            self._starts = starts
        self._leases.keep(at, running)
        expired = {name: running[name] for name in silent if silences[name] > self._ttl_seconds}
        return _Found(expired, cancelling, waiting, over_time, is_removing)

    def _shift_deadlines(self) -> None:
        """Give waits and jobs that a clock set forward would end at once the time they had."""
        seconds = self._forward_seconds
        log.warning("the clock of the database was set forward", seconds=round(seconds, 1))
        with self._database.write() as transaction:
            forward = timedelta(seconds=seconds)
            reward_requests.shift_deadlines(transaction, forward)
            submission_claims.shift(transaction, forward)
            stops.shift_starts(transaction, forward, self._starts)
            starts = stops.starts(transaction)
        self._forward_seconds, self._starts = 0.0, starts

    def _expire(self, lease_id: str, seen: datetime) -> None:
        with self._database.write() as transaction:
            job_id = fence.find(transaction, lease_id).job_id
            if leases.expire(transaction, lease_id, seen):
                log.info("lease expired", lease_id=lease_id, job_id=job_id)
                transaction.after_commit(self._waker.wake)
                transaction.after_commit(lambda: self._notifier.notify(job_id))

    def _remove_checkpoints(self) -> None:
        self._mark_expired()
        with self._database.write() as transaction:
            checkpoints.mark_superseded(transaction)
            checkpoints.mark_abandoned(transaction)
            checkpoints.mark_inspected(transaction)
            doomed = checkpoints.to_remove(transaction)
        for item in doomed:
            fault_point("service.removing")
            try:
                self._artifacts.remove_checkpoint(item.job_id, item.attempt, item.step)
            except DARError as error:  # a store that does not answer would hold up each of them
                log.warning("checkpoints cannot be removed", error=str(error))
                return
            except OSError as error:  # the next pass tries again
                log.warning("checkpoint cannot be removed", id=item.id, error=str(error))
                continue
            fault_point("service.removed")
            with self._database.write() as transaction:
                checkpoints.mark_removed(transaction, item.id)

    def _mark_expired(self) -> None:
        """Mark checkpoints for removal whose time is over, each with an event of its job."""
        with self._database.read() as transaction:
            expired = checkpoints.expired(transaction)
        for project_id, job_id, checkpoint_id in expired:
            # Meanwhile it may have been pinned, promoted, deleted or named by a job.
            with (
                contextlib.suppress(ConflictError, NotFoundError),
                self._database.write() as transaction,
            ):
                deletion.mark_checkpoint(
                    transaction, project_id, job_id, checkpoint_id, has_expired=True
                )
                transaction.after_commit(partial(self._notifier.notify, job_id))

    def _sweep(self) -> None:
        """Delete old reward requests, submissions, gone workers, and files without a row."""
        self._next_sweep = self._monotonic() + SWEEP_SECONDS
        with self._database.write() as transaction:
            reward_requests.forget(transaction)
            submission_claims.forget(transaction)
            workers.forget(transaction)
        self._artifacts.storage.check_mounted()  # another place's files are not abandoned
        old = self._artifacts.old_files()
        with self._database.read() as transaction:
            known = files.known(transaction, old)
        for file_id in set(old) - known:
            self._artifacts.remove_file(file_id)
        self._remove_orphans()
        self._remove_parts()

    def _remove_parts(self) -> None:
        """Remove the parts of uploads that have ended, and parts without a row."""
        with self._database.write() as transaction:
            file_uploads.expire(transaction)
            ended = file_uploads.ended_with_parts(transaction)
        for upload_id in ended:
            self._artifacts.remove_parts(upload_id)
            with self._database.write() as transaction:
                file_uploads.forget_parts(transaction, upload_id)
        old = self._artifacts.old_parts()
        with self._database.read() as transaction:
            known = file_uploads.known_parts(transaction, list(old))
        for part_id in old.keys() - known:
            self._artifacts.remove_part(old[part_id], part_id)

    def _remove_orphans(self) -> None:
        """Remove folders of checkpoints without a row, as a late upload leaves them."""
        old = list(self._artifacts.old_checkpoints())
        for start in range(0, len(old), ORPHANS_AT_ONCE):
            some = old[start : start + ORPHANS_AT_ONCE]
            with self._database.read() as transaction:
                known = checkpoints.with_files(transaction, {job_id for job_id, _, _ in some})
            for orphan in set(some) - known:
                job_id, attempt, step = orphan
                log.warning("removing files without a checkpoint", job_id=job_id, step=step)
                self._artifacts.remove_checkpoint(job_id, attempt, step)
