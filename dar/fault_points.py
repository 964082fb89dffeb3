"""Instants at which a test can kill or freeze a process. They do nothing in production.

`fault_point` marks an instant in the code. It acts only if ``DAR_FAULT_POINTS`` names a folder and
that folder has a file named like the instant. The file's content is the name of a signal, and the
process removes the file before it sends that signal to itself: so an armed instant strikes once,
in whichever process reaches it first.
"""

import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from dar.settings import fault_point_folder

INSTANTS: Mapping[str, str] = {
    "checkpoint.begun": "a trainer has made the folder of a checkpoint",
    "checkpoint.written": "its files are written, its manifest is not",
    "checkpoint.described": "its manifest is written, nothing is synced",
    "checkpoint.synced": "all of it is synced, and not renamed",
    "checkpoint.renamed": "it has its name, and its parent folder is not synced",
    "checkpoint.published": "it is published, and no row announces it yet",
    "worker.claimed": "a worker holds a lease and has written nothing about it",
    "worker.fetched": "the inputs of an attempt are there, the trainer is not started",
    "worker.started": "the trainer has started",
    "worker.sent": "the service has committed rows that the spool still holds",
    "worker.parts_stored": "a bucket has some parts of a checkpoint's files, sent directly",
    "worker.uploaded": "all parts of a checkpoint are sent, and none is committed",
    "worker.trained": "the trainer has ended, and not all is delivered",
    "worker.delivered": "all is delivered, and the end of the attempt is not reported",
    "worker.reported": "the end of the attempt is reported, and its files are still there",
    "service.verified": "a checkpoint has its final path, and its row is still pending",
    "service.committing": "a transaction is written and not committed",
    "service.committed": "a transaction is committed, and the caller knows nothing of it",
}
"""Every instant, and what is true at it."""

_FOLDER = fault_point_folder()


def fault_point(instant: str) -> None:
    """Strike this process if ``instant`` is armed."""
    if _FOLDER is None:
        return
    armed = _FOLDER / instant
    try:
        name = armed.read_text().strip()
        armed.unlink()
    except FileNotFoundError:
        return  # not armed, or another process was faster
    os.kill(os.getpid(), signal.Signals[name])


def arm(folder: Path, instant: str, name: str = "SIGKILL") -> None:
    """Arm ``instant`` for the next process that reaches it.

    Args:
        folder: The value of ``DAR_FAULT_POINTS`` of the processes.
        instant: A key of `INSTANTS`.
        name: The signal.
    """
    assert instant in INSTANTS
    folder.mkdir(exist_ok=True)
    partial = folder / f".{instant}"
    partial.write_text(name)
    partial.rename(folder / instant)


def disarm(folder: Path, instant: str) -> None:
    """Take back what `arm` did, if it has not struck."""
    with contextlib.suppress(FileNotFoundError):
        (folder / instant).unlink()
