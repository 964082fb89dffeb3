"""Cleanup after attempts: kill trainers of dead workers, send unsent rows, remove folders."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog

from dar.errors import ConflictError, DARError
from worker.api import GaveUpError, WorkerClient
from worker.folders import AttemptFolder, AttemptRecord, SlotFolder
from worker.spool import SpoolDamagedError, SpooledRow, SpoolReader
from worker.supervisor.child_process import kill_leftover
from worker.supervisor.sender import send_batch

log = structlog.get_logger(__name__)

KEPT_ASIDE = timedelta(days=7)
"""How long rows that cannot be sent stay on disk."""


def sweep_processes(folder: SlotFolder) -> None:
    """Kill the trainers that a dead worker left, and remove the files that only they needed."""
    for attempt in folder.all_attempts():
        if kill_leftover(attempt):
            log.warning("killed the trainer of a dead worker", folder=str(attempt.path))
        attempt.strip()


class Leftovers:
    """Sends the rows of ended attempts with the worker's own key; `run` is the body of a thread.

    It also sends those of the host's other slots whose workers are dead, because such a slot may
    never have a worker again.

    Args:
        active: Returns the id of the lease that runs now; its folder is left alone.
        pause_seconds: Pause between two passes.
        logs_bytes: Largest size of the logs that are kept.
    """

    def __init__(
        self,
        folder: SlotFolder,
        client: WorkerClient,
        active: Callable[[], str | None],
        pause_seconds: float,
        logs_bytes: int,
    ) -> None:
        self._folder = folder
        self._client = client
        self._active = active
        self._pause_seconds = pause_seconds
        self._logs_bytes = logs_bytes
        self._aside: set[AttemptFolder] = set()
        self._wake = threading.Event()
        self._stopped = False

    def wake(self) -> None:
        """Start the next pass now."""
        self._wake.set()

    def stop(self) -> None:
        """Make `run` return after the current batch of rows."""
        self._stopped = True
        self._wake.set()

    def run(self) -> None:
        """Make passes until `stop`."""
        while not self._stopped:
            self._wake.clear()
            try:
                self.sweep()
            except Exception:  # outermost frame of a thread that must live as long as its worker
                log.exception("cleanup after attempts failed")
            self._wake.wait(self._pause_seconds)

    def sweep(self) -> None:
        """Make one pass over all ended attempts; waits while the service is unreachable."""
        for attempt in self._folder.all_attempts():
            if self._stopped:
                return
            if attempt == self._current() or attempt in self._aside:
                continue
            with attempt.held() as is_ended:
                if is_ended:
                    self._clear(attempt)
        for other in self._folder.others():
            self._sweep_other(other)

    def _sweep_other(self, other: SlotFolder) -> None:
        for attempt in other.all_attempts():
            if self._stopped:
                return
            # A worker of an earlier version has no such lock and clears its own slot.
            if attempt in self._aside or not attempt.lock.exists():
                continue
            with attempt.held() as is_ended:
                if is_ended and attempt.read_record() is not None:
                    kill_leftover(attempt)
                    self._clear(attempt)

    def _clear(self, attempt: AttemptFolder) -> None:
        """Send the rows of an ended attempt, and remove its folder when all have arrived."""
        record = attempt.read_record()
        if record is None:
            attempt.remove()
        elif self._send(attempt, record):
            self._folder.keep_logs(attempt, record, self._logs_bytes)
            attempt.remove()

    def _current(self) -> AttemptFolder | None:
        lease_id = self._active()
        return None if lease_id is None else self._folder.attempt(lease_id)

    def _send(self, attempt: AttemptFolder, record: AttemptRecord) -> bool:
        """Send all rows of an attempt; returns whether its folder can be removed."""
        reader = SpoolReader(attempt.spool)
        facts = {"job": record.job_id, "attempt": record.attempt}
        try:
            while rows := self._send_some(reader, record):
                log.info("sent rows of an earlier attempt", rows=len(rows), **facts)
        except GaveUpError:
            return False
        except DARError as error:
            return self._put_aside(attempt, error, facts)
        return True

    def _send_some(self, reader: SpoolReader, record: AttemptRecord) -> list[SpooledRow]:
        return self._client.until_answered(
            lambda: send_batch(reader, self._client, record),
            "rows of an earlier attempt",
            give_up=lambda: self._stopped,
            longest=self._pause_seconds,
        )

    def _put_aside(self, attempt: AttemptFolder, error: DARError, facts: dict[str, object]) -> bool:
        """Skip the rows until the worker's next start; returns whether they are too old to keep."""
        changed_at = datetime.fromtimestamp(attempt.spool.stat().st_mtime, UTC)
        if datetime.now(UTC) - changed_at > KEPT_ASIDE:
            return True
        is_serious = isinstance(error, ConflictError | SpoolDamagedError)
        write = log.error if is_serious else log.warning
        write("rows of an earlier attempt cannot be sent", error=error.message, **facts)
        self._aside.add(attempt)
        return False
