"""What nobody asks for and must still happen: leases run out, queues are woken again, old checkpoints go.

Every action is a conditional UPDATE, so that two reconcilers do no harm; on PostgreSQL one replica at a time is elected.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dar.errors import DARError
from service.artifacts import Artifacts
from service.background.notifier import Notifier
from service.background.waker import Waker
from service.store import checkpoints, fence, files, jobs, leases, reward_requests
from service.store.database import Database

log = structlog.get_logger()
ELECTION_KEY = 0x0DA2_0002
SWEEP_SECONDS = 3600.0
UNCLAIMED = timedelta(seconds=5)
"""A job that has been due for longer has probably lost its wake-up."""


class Reconciler:
    """The service's own pass over its tables, in a thread.

    Args:
        database: Whose tables.
        artifacts: Where checkpoints' files are.
        waker: Told about queued jobs.
        notifier: Told about jobs that changed.
        ttl_seconds: How long a lease holds.
        pause_seconds: Between two passes.
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
        """Start the passes."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the present pass."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def run_once(self) -> None:
        """One pass, if this replica is the one to make it."""
        is_patient = self._is_patient()
        with self._database.elected(ELECTION_KEY) as is_elected:
            if not is_elected:
                return
            if not is_patient:
                self._expire_leases()
            self._finish_cancellations()
            self._rewake()
            self._remove_checkpoints()
            self._sweep()

    def _is_patient(self) -> bool:
        """Whether leases are left alone: after a gap of ours, workers had nobody to renew them with."""
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

    def _rewake(self) -> None:
        with self._database.read() as transaction:
            waiting = jobs.count_due(transaction, UNCLAIMED)
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
        """Forget old reward requests, and remove files that lost their upload's process before it stored a row, or their row before they were removed."""
        if self._monotonic() < self._next_sweep:
            return
        self._next_sweep = self._monotonic() + SWEEP_SECONDS
        with self._database.write() as transaction:
            reward_requests.forget(transaction)
        there = self._artifacts.old_files()
        with self._database.read() as transaction:
            known = files.known(transaction, there)
        for file_id in set(there) - known:
            self._artifacts.file(file_id).unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stop.wait(self._pause_seconds):
            try:
                self.run_once()
            except (SQLAlchemyError, DARError, OSError) as error:
                log.warning("reconciler pass failed; the next one tries again", error=str(error))
            except Exception:
                # Outermost frame of a thread without which no lease ever ends.
                log.exception("reconciler pass failed by a mistake; the next one tries again")
