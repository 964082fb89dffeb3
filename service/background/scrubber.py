"""Finds stored checkpoints that were altered: reads each again after some days, at a limited rate.

A damaged checkpoint is set aside, so that its job resumes from an older one. One that was set aside
is read again too, and used again if its files have come back.
"""

import threading
from datetime import timedelta

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dar.errors import DARError
from service.artifacts import Artifacts
from service.background.notifier import Notifier
from service.store import checkpoints
from service.store.database import Database
from service.store.tables import CheckpointRow

log = structlog.get_logger()
ELECTION_KEY = 0x0DA2_0003
LOOK_SECONDS = 5.0
"""Pause after which the scrubber looks again for a checkpoint that is due."""


class _StoppedError(Exception):
    """The service stops while a checkpoint is read."""


class Scrubber:
    """A thread that verifies one checkpoint after the other. One replica at a time is elected.

    Args:
        database: The database.
        artifacts: The files of checkpoints.
        notifier: Wakes long polls of changed jobs.
        period_seconds: How often each checkpoint is verified.
        bytes_per_second: How fast checkpoints are read.
    """

    def __init__(
        self,
        database: Database,
        artifacts: Artifacts,
        notifier: Notifier,
        *,
        period_seconds: float,
        bytes_per_second: int,
    ) -> None:
        self._database = database
        self._artifacts = artifacts
        self._notifier = notifier
        self._period = timedelta(seconds=period_seconds)
        self._bytes_per_second = bytes_per_second
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrubber", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop, also in the middle of a checkpoint, which the next start then reads again."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def run_once(self) -> bool:
        """Verify the checkpoint that has been unverified for longest; False: none is due.

        Raises:
            ServiceUnavailableError: The volume of all checkpoints is missing.
            OSError: The checkpoint cannot be examined.
        """
        with self._database.elected(ELECTION_KEY) as is_elected:
            if not is_elected:
                return False
            with self._database.read() as transaction:
                due = checkpoints.due_for_scrub(transaction, self._period)
            if due is None:
                return False
            self._verify(due)
            return True

    def _verify(self, row: CheckpointRow) -> None:
        self._artifacts.storage.check_mounted()
        folder = self._artifacts.checkpoint(row.job_id, row.attempt, row.step)
        damage = self._artifacts.damage_of(folder, checkpoints.files_of(row), take=self._pace)
        with self._database.write() as transaction:
            if damage is None:
                checkpoints.note_whole(transaction, row)
            elif checkpoints.set_aside(transaction, row, damage):
                log.error("checkpoint is damaged", id=row.id, job_id=row.job_id, damage=damage)
            else:
                checkpoints.note_still_damaged(transaction, row)
            transaction.after_commit(lambda: self._notifier.notify(row.job_id))

    def _pace(self, size: int) -> None:
        """Wait as long as reading ``size`` bytes may take.

        Raises:
            _StoppedError: The service stops.
        """
        if self._stop.wait(size / self._bytes_per_second):
            raise _StoppedError

    def _run(self) -> None:
        has_more = False
        while not self._stop.wait(0 if has_more else LOOK_SECONDS):
            has_more = False
            try:
                has_more = self.run_once()
            except _StoppedError:
                return
            except (SQLAlchemyError, DARError, OSError) as error:
                log.warning("a checkpoint could not be verified", error=str(error))
            except Exception:  # outermost frame of a thread that must live as long as its service
                log.exception("a checkpoint could not be verified")
