"""The log of a trainer's process: its stdout and stderr, in a file of limited size."""

import contextlib
import os
import threading
from pathlib import Path

from worker.folders import earlier_part

WATCH_SECONDS = 1.0
STDOUT, STDERR = 1, 2


class LogFile:
    """A log in at most two parts: the file, and what was in it before it was last begun anew.

    The process does this itself, so that no line gets lost: whatever writes to stdout and stderr,
    native libraries included, goes to the old file until it goes to the new one.

    Args:
        path: The file, which stdout is.
        limit_bytes: Size at which it is begun anew.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._limit_bytes = limit_bytes

    def watch(self) -> None:
        """Look after the file in a thread, as long as the process lives."""
        threading.Thread(target=self._watch, name="log-file", daemon=True).start()

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(WATCH_SECONDS):
            with contextlib.suppress(OSError):  # a full disk; the log goes on in the old file
                self.begin_anew_if_due()

    def begin_anew_if_due(self) -> bool:
        """Begin the file anew if it is too large. Returns whether that was done."""
        now = os.fstat(STDOUT)
        if now.st_size < self._limit_bytes or not self._path.exists():
            return False
        if not os.path.samestat(now, self._path.stat()):
            return False
        fresh = self._path.with_name(f".new-{self._path.name}")
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o600)
        try:
            earlier = earlier_part(self._path)
            earlier.unlink(missing_ok=True)
            # With a second name for the old file, the supervisor finds a log at every instant.
            earlier.hardlink_to(self._path)
            fresh.replace(self._path)
            os.dup2(file, STDOUT)
            os.dup2(file, STDERR)
        finally:
            os.close(file)
        return True
