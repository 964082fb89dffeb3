"""The files of a worker on disk.

Under ``$DAR_HOME/worker`` (``DAR_WORK_DIR``)::

    machine                     random name of this machine
    slot-<slot>/
      lock                      locked by the slot's worker; contains its process id
      alive                     its time is that of the last claim or heartbeat
      logs/<job>-<attempt>.log  output of the trainers of ended attempts (``-1.log``, …: their
                                other processes; ``.earlier.log``: the part before)
      attempts/<lease>/
        attempt.json            lease, job and attempt: enough to send the rows after a restart
        lock                    locked by the worker that runs the attempt, or sends its rows
        trainer.json            process id and start time of the trainer
        trainer.log             output of the trainer (``trainer.earlier.log``: the part before)
        trainer-1.log, …        output of its other processes, if it has any
        progress.json           what the trainer does now
        result.json             how the trainer ended, as it reports itself
        inputs/                 training file, model, adapters, resume checkpoint
        work/checkpoints/       published checkpoints: those to upload, and the newest
        spool/                  rows that are not acknowledged yet
    models/
      <name>-<digest>/          a downloaded model, for all slots: files, record, lock
    reward-caches/
      job-<job>/                cached rewards of a job, until it succeeds
      endpoint-<endpoint>/      cached rewards that jobs with one registered endpoint share

No key or token is ever written here.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from dar.disk import OTHER_FOLDER_HINT, make_folder, read_if_there, write_atomically

LOGS_KEPT = 500


def earlier_part(log: Path) -> Path:
    """Where the earlier part of a trainer's log is."""
    return log.with_suffix(".earlier.log")


class AttemptRecord(BaseModel):
    """The attempt that a folder belongs to."""

    model_config = ConfigDict(frozen=True)

    lease_id: str
    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class AttemptFolder:
    """Files of one attempt."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path / "attempt.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @contextmanager
    def held(self, *, wait: bool = False) -> Iterator[bool]:
        """Lock the attempt for the length of the context; yields whether that was possible.

        It is not if another process runs the attempt or sends its rows. The system frees the lock
        of a dead process.

        Args:
            wait: Wait for a process that locks the attempt for a moment, to read its record.
        """
        try:
            file = self.lock.open("a")
        except FileNotFoundError:  # the folder is gone
            yield False
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    @property
    def trainer(self) -> Path:
        return self.path / "trainer.json"

    @property
    def log(self) -> Path:
        return self.path / "trainer.log"

    def log_of(self, process: int) -> Path:
        """Log of one of several processes that train together; number 0 is the trainer itself."""
        return self.log if process == 0 else self.path / f"trainer-{process}.log"

    def logs(self) -> list[tuple[str, Path]]:
        """The existing logs, each with the suffix of its process and part: ``-1.earlier``."""
        found = sorted(self.path.glob("trainer*.log"))
        return [(path.stem.removeprefix("trainer"), path) for path in found]

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def inputs(self) -> Path:
        return self.path / "inputs"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    def prepare(self) -> None:
        """Make the folders, before anybody can take this for an attempt."""
        for folder in (self.path, self.inputs, self.work, self.spool):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def create(self, record: AttemptRecord) -> None:
        self.prepare()
        write_atomically(self.record, record.model_dump_json().encode())

    def read_record(self) -> AttemptRecord | None:
        """The attempt of this folder; None if the folder was not completely made."""
        content = read_if_there(self.record)
        return None if content is None else AttemptRecord.model_validate_json(content)

    def strip(self) -> None:
        """Remove the files that only a running trainer needs; rows and log stay."""
        for folder in (self.inputs, self.work):
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class SlotFolder:
    """Files of one slot."""

    path: Path

    @classmethod
    def of(cls, work_path: Path, slot: str) -> "SlotFolder":
        """The folder of ``slot``, created if needed."""
        folder = cls(work_path / f"slot-{quote(slot, safe='')}")
        for path in (folder.attempts, folder.logs):
            make_folder(path, f"{OTHER_FOLDER_HINT} DAR_WORK_DIR or DAR_HOME")
        return folder

    def others(self) -> list["SlotFolder"]:
        """The folders of the other slots of this host."""
        found = sorted(self.path.parent.glob("slot-*/attempts"))
        return [SlotFolder(path.parent) for path in found if path.parent != self.path]

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def alive(self) -> Path:
        return self.path / "alive"

    def mark_alive(self) -> None:
        """Set the time of `alive`, by which a container engine sees that the worker lives."""
        with suppress(OSError):  # the self-check reports a disk that takes no file
            self.alive.touch()

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def attempt(self, lease_id: str) -> AttemptFolder:
        return AttemptFolder(self.attempts / quote(lease_id, safe=""))

    def all_attempts(self) -> list[AttemptFolder]:
        """The folders of all attempts, the oldest first."""
        return [AttemptFolder(path) for path in sorted(self.attempts.iterdir()) if path.is_dir()]

    def keep_logs(self, folder: AttemptFolder, record: AttemptRecord, most_bytes: int) -> None:
        """Move an attempt's logs to `logs`, and remove the oldest logs there.

        Args:
            folder: Files of the attempt, whose trainer has ended.
            record: The attempt.
            most_bytes: Largest size of all logs; the newest one is kept whatever its size.
        """
        states = []
        # Another thread of this worker keeps the logs of earlier attempts here.
        for suffix, path in folder.logs():
            with suppress(FileNotFoundError):
                path.replace(self.logs / f"{record.job_id}-{record.attempt}{suffix}.log")
        for path in self.logs.iterdir():
            with suppress(FileNotFoundError):
                states.append((path, path.stat()))
        states.sort(key=lambda one: one[1].st_mtime, reverse=True)
        size = 0
        for place, (path, state) in enumerate(states):
            size += state.st_size
            if place and (place >= LOGS_KEPT or size > most_bytes):
                path.unlink(missing_ok=True)
