"""Deletes what is too old or too large, and the files and rows of jobs that users have deleted.

All of it happens in small transactions with pauses between them, in a thread of its own, so that it
delays neither workers nor the reconciler. Each step can be repeated: after a crash the next pass
goes on. With PostgreSQL one replica at a time is elected.
"""

import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dar.errors import ConflictError, DARError, NotFoundError
from dar.settings import Settings
from service.artifacts import Artifacts
from service.store import checkpoints, deletion, retention
from service.store.database import Database, Transaction

log = structlog.get_logger()
ELECTION_KEY = 0x0DA2_0004
PAUSE_SECONDS = 5.0
"""Time between two looks for deleted jobs."""
SWEEP_SECONDS = 3600.0
"""Time between two sweeps by age and size."""
BREATH_SECONDS = 0.01
"""Pause after each transaction, in which others get the database."""


class Retention:
    """A thread that deletes.

    Args:
        database: The database.
        artifacts: The files of checkpoints.
        settings: Ages and sizes.
        monotonic: Clock for durations; replaced in tests.
        breath_seconds: Pause after each transaction.
    """

    def __init__(
        self,
        database: Database,
        artifacts: Artifacts,
        settings: Settings,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        breath_seconds: float = BREATH_SECONDS,
    ) -> None:
        self._database = database
        self._artifacts = artifacts
        self._settings = settings
        self._monotonic = monotonic
        self._breath_seconds = breath_seconds
        self._next_sweep = monotonic()
        self._last_sample = 0
        """Up to this one, only the best and worst samples of each step are left."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the current transaction."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def run_once(self) -> None:
        """Make one pass, if there is something to do and this replica is elected."""
        is_sweep_due = self._monotonic() >= self._next_sweep
        with self._database.read() as transaction:
            doomed = retention.deleted_jobs(transaction)
        if not doomed and not is_sweep_due:
            return
        with self._database.elected(ELECTION_KEY) as is_elected:
            if not is_elected:
                return
            if is_sweep_due:
                self._next_sweep = self._monotonic() + SWEEP_SECONDS
                self._sweep()
                with self._database.read() as transaction:
                    doomed = retention.deleted_jobs(transaction)
            for job_id in doomed:
                self._remove_job(job_id)

    def _sweep(self) -> None:
        self._mark_old_jobs()
        for rule in retention.RULES:

            def delete_aged(transaction: Transaction, rule: retention.Rule = rule) -> int:
                return retention.delete_aged(transaction, self._settings, rule)

            self._repeat(rule.what, delete_aged)
        self._repeat(
            "idempotency_keys",
            lambda transaction: retention.forget_keys(transaction, self._settings),
        )
        self._limit_samples()

    def _repeat(self, what: str, delete: Callable[[Transaction], int]) -> None:
        total = 0
        while (count := self._step(delete)) and not self._stop.is_set():
            total += count
        if total:
            log.info("deleted by age", what=what, rows=total)

    def _step(self, work: Callable[[Transaction], int]) -> int:
        count = self._database.transact(work)
        self._stop.wait(self._breath_seconds)
        return count

    def _mark_old_jobs(self) -> None:
        last = ""
        while not self._stop.is_set():
            with self._database.read() as transaction:
                old = retention.old_jobs(transaction, self._settings, last)
            if not old:
                return
            for project_id, job_id in old:
                last = job_id
                try:
                    with self._database.write() as transaction:
                        deletion.mark_job(transaction, project_id, job_id)
                except (ConflictError, NotFoundError):
                    continue  # an unfinished job starts from it, it was resumed, or it is gone

    def _limit_samples(self) -> None:
        while not self._stop.is_set():
            with self._database.read() as transaction:
                surplus = retention.samples_bytes(transaction) - self._settings.samples_bytes
            if surplus <= 0 or not self._delete_samples(surplus):
                return

    def _delete_samples(self, surplus: int) -> bool:
        """Delete some samples; returns whether there were any."""
        before = self._last_sample

        def work(transaction: Transaction) -> int:
            held = retention.samples_bytes(transaction)
            last = retention.delete_oldest_samples(transaction, surplus, before)
            self._last_sample = before if last is None else last
            return held - retention.samples_bytes(transaction)

        return self._step(work) > 0

    def _remove_job(self, job_id: str) -> None:
        """Remove the files of a deleted job, then its rows."""
        with self._database.read() as transaction:
            doomed = retention.unremoved_checkpoints(transaction, job_id)
        for item in doomed:
            self._artifacts.remove_checkpoint(job_id, item.attempt, item.step)
            with self._database.write() as transaction:
                checkpoints.mark_removed(transaction, item.id)
        self._artifacts.remove_job(job_id)
        while not self._stop.is_set():
            with self._database.write() as transaction:
                is_gone = retention.purge(transaction, job_id)
            if is_gone:
                log.info("deleted job removed", job_id=job_id)
                return
            self._stop.wait(self._breath_seconds)

    def _run(self) -> None:
        while not self._stop.wait(PAUSE_SECONDS):
            try:
                self.run_once()
            except (SQLAlchemyError, DARError, OSError) as error:
                log.warning("retention failed; the next pass tries again", error=str(error))
            except Exception:
                # Outermost frame of the thread: without it nothing would ever be deleted.
                log.exception("retention failed unexpectedly; the next pass tries again")
