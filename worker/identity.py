"""Who this worker is: node, slot, and which start of the process and of the machine it is."""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dar.errors import ConfigurationError
from dar.protocol.ids import new_id
from dar.protocol.worker import Claim
from dar.settings import Settings
from worker.folders import SlotFolder, read_if_there

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Changes with every start of the machine; constant where the system does not say (not Linux)."""
    content = read_if_there(BOOT_ID)
    return content.decode().strip() if content else f"unknown-{platform.system().lower()}"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a claim says about its sender."""

    node: str
    slot: str
    incarnation: str
    boot_id: str

    @classmethod
    def of(cls, settings: Settings) -> "Identity":
        """The identity of this start of the process."""
        return cls(settings.node, settings.slot, new_id("inc-"), boot_id())

    def claim(self) -> Claim:
        """The body of a claim."""
        return Claim(
            node=self.node, slot=self.slot, incarnation=self.incarnation, boot_id=self.boot_id
        )


@contextmanager
def slot_held(folder: SlotFolder, slot: str) -> Iterator[None]:
    """Hold the slot for as long as the context lasts; a dead holder's lock is free.

    Raises:
        ConfigurationError: Another process holds it.
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
