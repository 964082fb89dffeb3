"""The identity of a worker: node, slot and machine, and the starts of process and machine."""

import contextlib
import fcntl
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dar.disk import read_if_there
from dar.errors import ConfigurationError
from dar.protocol.ids import new_id
from dar.protocol.worker import Claim
from dar.settings import Settings
from worker.folders import SlotFolder

MACHINE_FILE = "machine"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Changes with every start of the machine; constant on systems other than Linux."""
    content = read_if_there(BOOT_ID)
    return content.decode().strip() if content else f"unknown-{platform.system().lower()}"


def machine_of(work_path: Path) -> str:
    """A random name that all workers with this work directory share; made by the first of them.

    A restarted machine is known by it among others with the same node name.
    """
    path = work_path / MACHINE_FILE
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=work_path, encoding="utf-8") as file:
            file.write(new_id("machine-"))
            file.flush()
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(file.name)
    return path.read_text(encoding="utf-8").strip()


def claim_of(settings: Settings) -> Claim:
    """The claims of this start of the worker."""
    return Claim(
        node=settings.node, slot=settings.slot, incarnation=new_id("inc-"), boot_id=boot_id()
    )


@contextlib.contextmanager
def slot_held(folder: SlotFolder, slot: str) -> Iterator[None]:
    """Lock the slot for the length of the context; the system frees the lock of a dead process.

    Raises:
        ConfigurationError: Another process holds the lock.
    """
    with folder.lock.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigurationError(
                f"slot {slot!r} is taken by the worker with process id {lock.read().strip() or '?'} "
                f"({folder.lock}); stop it, or give this one another slot (DAR_SLOT)"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
