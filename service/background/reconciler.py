"""Periodic work: expires leases, repeats wake-ups, removes old checkpoints and abandoned files.

Every action is a conditional UPDATE, so two reconcilers at once do no harm. With PostgreSQL one
replica at a time is elected.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dar.errors import DARError
from service.artifacts import Artifacts
from service.background.notifier import Notifier
from service.background.waker import Waker
from service.store import checkpoints, fence, files, leases, reward_requests, stops, workers
from service.store.database import Database

log = structlog.get_logger()
ELECTION_KEY = 0x0DA2_0002
SWEEP_SECONDS = 3600.0
UNCLAIMED = timedelta(seconds=5)
"""Age from which the wake-up of a due job was probably lost."""


class Reconciler:
    """A thread that makes regular passes over the tables.

    Args:
        database: The database.
        artifacts: The files of checkpoints.
        waker: Wakes workers for queued jobs.
        notifier: Wakes long polls of changed jobs.
        ttl_seconds: How long a lease is valid.
        pause_seconds: Time between two passes.
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
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._artifacts = artifacts
        self._waker = waker
        self._notifier = notifier
        self._ttl_seconds = ttl_seconds
        self._pause_seconds = pause_seconds
        self._monotonic = monotonic
        self._last_pass = monotonic()
        self._patient_until = self._last_pass + ttl_seconds
        self._next_sweep = self._last_pass
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the current pass."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def run_once(self) -> None:
        """Make one pass, if this replica is elected."""
        is_patient = self._is_patient()
        with self._database.elected(ELECTION_KEY) as is_elected:
            if not is_elected:
                return
            if not is_patient:
                self._expire_leases()
            self._finish_cancellations()
            self._check_time_limits()
            self._rewake()
            self._remove_checkpoints()
            self._sweep()

    def _is_patient(self) -> bool:
        """Whether no lease expires yet: after a gap between passes, workers need time to renew."""
        now = self._monotonic()
        if now - self._last_pass > max(self._ttl_seconds / 2, 3 * self._pause_seconds):
            self._patient_until = now + self._ttl_seconds
        self._last_pass = now
        return now < self._patient_until

    def _expire_leases(self) -> None:
        with self._database.read() as transaction:
            due = leases.expired(transaction)
        for lease_id in due:
            self._expire(lease_id)

    def _expire(self, lease_id: str) -> None:
        with self._database.write() as transaction:
            job_id = fence.find(transaction, lease_id).job_id
            if leases.expire(transaction, lease_id):
                log.info("lease expired", lease_id=lease_id, job_id=job_id)
                transaction.after_commit(self._waker.wake)
                transaction.after_commit(lambda: self._notifier.notify(job_id))

    def _finish_cancellations(self) -> None:
        with self._database.read() as transaction:
            unattended = leases.unattended_cancellations(transaction)
        for job_id in unattended:
            with self._database.write() as transaction:
                leases.finish_cancellation(transaction, job_id)

    def _check_time_limits(self) -> None:
        """Stop jobs that have run for as long as their spec allows."""
        with self._database.read() as transaction:
            limited = stops.with_time_limit(transaction)
        for job_id in limited:
            with self._database.write() as transaction:
                if stops.check_time(transaction, job_id):
                    transaction.after_commit(partial(self._notifier.notify, job_id))

    def _rewake(self) -> None:
        with self._database.read() as transaction:
            waiting = leases.count_due(transaction, UNCLAIMED)
        if waiting:
            self._waker.wake(waiting)

    def _remove_checkpoints(self) -> None:
        with self._database.write() as transaction:
            checkpoints.mark_superseded(transaction)
            checkpoints.mark_abandoned(transaction)
            doomed = checkpoints.to_remove(transaction)
        for item in doomed:
            self._artifacts.remove_checkpoint(item.job_id, item.attempt, item.step)
            with self._database.write() as transaction:
                checkpoints.mark_removed(transaction, item.id)

    def _sweep(self) -> None:
        """Delete old reward requests, workers that are gone, and uploaded files without a row."""
        if self._monotonic() < self._next_sweep:
            return
        self._next_sweep = self._monotonic() + SWEEP_SECONDS
        with self._database.write() as transaction:
            reward_requests.forget(transaction)
            workers.forget(transaction)
        old = self._artifacts.old_files()
        with self._database.read() as transaction:
            known = files.known(transaction, old)
        for file_id in set(old) - known:
            self._artifacts.file(file_id).unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stop.wait(self._pause_seconds):
            try:
                self.run_once()
            except (SQLAlchemyError, DARError, OSError) as error:
                log.warning("reconciler pass failed; the next one tries again", error=str(error))
            except Exception:
                # Outermost frame of the thread: without it no lease would ever expire.
                log.exception("reconciler pass failed unexpectedly; the next one tries again")
