"""Deletes what is too old or too large, and the files and rows of jobs that users have deleted.

All of it happens in small transactions with pauses between them, in a thread of its own, so that it
delays neither workers nor the reconciler. Each step can be repeated: after a crash the next pass
goes on. With PostgreSQL one replica at a time is elected.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from dar.errors import ConflictError, NotFoundError
from dar.settings import Settings
from service.artifacts import Artifacts
from service.background.periodic import PeriodicThread
from service.store import checkpoints, deletion, retention
from service.store.database import Database, LockKey, Transaction

log = structlog.get_logger()
PAUSE_SECONDS = 5.0
"""Time between two passes over deleted jobs."""
SWEEP_SECONDS = 3600.0
"""Time between two sweeps by age and size."""
BREATH_SECONDS = 0.01
"""Pause after each transaction, in which others get the database."""


class Retention(PeriodicThread):
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
        super().__init__("retention", pause_seconds=PAUSE_SECONDS)
        self._database = database
        self._artifacts = artifacts
        self._settings = settings
        self._monotonic = monotonic
        self._breath_seconds = breath_seconds
        self._next_sweep = monotonic()
        self._last_sample = 0
        """Up to this one, only the best and worst samples of each step are left."""

    def run_once(self) -> None:
        """Make one pass, if there is something to do and this replica is elected."""
        is_sweep_due = self._monotonic() >= self._next_sweep
        with self._database.read() as transaction:
            doomed = retention.deleted_jobs(transaction)
        if not doomed and not is_sweep_due:
            return
        with self._database.elected(LockKey.RETENTION) as is_elected:
            if not is_elected:
                return
            if is_sweep_due:
                self._next_sweep = self._monotonic() + SWEEP_SECONDS
                self._sweep()
                with self._database.read() as transaction:
                    doomed = retention.deleted_jobs(transaction)
            for first in range(0, len(doomed), retention.OWNERS):
                self._remove_jobs(doomed[first : first + retention.OWNERS])

    def _sweep(self) -> None:
        self._mark_old_jobs()
        for rule in retention.RULES:
            self._delete_aged(rule)
        self._repeat(lambda transaction: retention.forget_keys(transaction, self._settings))
        self._limit_samples_of_jobs()
        self._limit_samples()

    def _delete_aged(self, rule: retention.Rule) -> None:
        total, last = 0, None
        while not self._stop.is_set():
            with self._database.read() as transaction:
                owners = retention.aged_owners(transaction, self._settings, rule, last)
            if not owners:
                break
            total += self._repeat(partial(retention.delete_of, rule=rule, owners=owners))
            last = owners[-1]
        if total:
            log.info("deleted by age", what=rule.what, rows=total)

    def _repeat(self, delete: Callable[[Transaction], int]) -> int:
        """Delete until nothing is left; returns how many rows."""
        total = 0
        while (count := self._step(delete)) and not self._stop.is_set():
            total += count
        return total

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
            last = old[-1][1]

            def mark(transaction: Transaction, old: Sequence[tuple[str, str]] = old) -> int:
                for project_id, job_id in old:
                    # Another job starts from it, it was resumed or pinned, or it is gone.
                    with contextlib.suppress(ConflictError, NotFoundError):
                        deletion.mark_job(transaction, project_id, job_id)
                return len(old)

            self._step(mark)

    def _limit_samples_of_jobs(self) -> None:
        limit = self._settings.job_samples_bytes
        with self._database.read() as transaction:
            jobs = retention.oversized_jobs(transaction, limit)
        for job_id, surplus in jobs.items():
            self._thin_job(job_id, surplus, limit)

    def _thin_job(self, job_id: str, surplus: int, limit: int) -> None:
        """Delete the surplus of a job's samples, and add an event about it."""
        with self._database.read() as transaction:
            count, step = retention.count_samples(transaction, job_id)
        after: int | None = 0
        while surplus > 0 and not self._stop.is_set():

            def work(
                transaction: Transaction, surplus: int = surplus, after: int = after or 0
            ) -> int | None:
                return retention.delete_oldest_samples(transaction, surplus, after, job_id)

            after = self._database.transact(work)
            self._stop.wait(self._breath_seconds)
            with self._database.read() as transaction:
                left = retention.oversized_jobs(transaction, limit).get(job_id, 0)
            if left == surplus and after is None:
                break
            surplus = left
        with self._database.write() as transaction:
            now, _ = retention.count_samples(transaction, job_id)
            if now < count:
                retention.note_thinned(transaction, job_id, count - now, step)

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

    def _remove_jobs(self, job_ids: Sequence[str]) -> None:
        """Remove the files of deleted jobs, then their rows."""
        with self._database.read() as transaction:
            doomed = retention.unremoved_checkpoints(transaction, job_ids)
        for item in doomed:
            self._artifacts.remove_checkpoint(item.job_id, item.attempt, item.step)
            with self._database.write() as transaction:
                checkpoints.mark_removed(transaction, item.id)
        for job_id in job_ids:
            self._artifacts.remove_job(job_id)
        while not self._stop.is_set():
            with self._database.write() as transaction:
                is_gone = retention.purge(transaction, job_ids)
            if is_gone:
                log.info("deleted jobs removed", job_ids=job_ids)
                return
            self._stop.wait(self._breath_seconds)
