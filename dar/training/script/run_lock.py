"""The lock of an output folder: one run at a time writes there.

The kernel releases it when the process ends, however it ends.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from dar.errors import InvalidRequestError

LOCK_NAME = ".dar-train.lock"


@contextlib.contextmanager
def output_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder, which is made if it is not there.

    A file system without locks is used without one.

    Raises:
        InvalidRequestError: Another run holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder / LOCK_NAME) as file:
            with contextlib.suppress(OSError):  # a full disk is reported where it matters
                file.truncate(0)
                holder = f"process {os.getpid()} on {socket.gethostname()} since {_now()}"
                file.write(holder.encode())
            try:
                yield
            finally:
                (folder / LOCK_NAME).unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # a run has written into it
            for path in made:
                path.rmdir()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _locked(path: Path) -> FileIO:
    """The lock file, open and locked."""
    while True:
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read(200).decode(errors="replace") or "another process"
            raise InvalidRequestError(
                f"--output_dir {path.parent} is used by another run ({holder}); wait for its end "
                "or stop it, or give another folder",
                param="output_dir",
            ) from None
        except OSError:  # the file system has no locks
            return file
        # The run before may have removed the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()
