"""Models that this host has downloaded, kept for later jobs of all its slots.

Each model is a folder with three entries: ``files``, ``model.json`` (`ModelRecord`) and ``lock``.
An attempt that uses the model locks it shared until it ends, one that downloads it locks it alone.
The system frees the locks of a dead process. What changes which models there are (a new folder, a
removal, the end of a download) happens under a lock of the whole cache, held for a moment.

A worker that is killed in the middle of a download leaves a model that is not whole. The next
attempt that needs it continues the download; if none does, it is removed like any other.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from dar.disk import read_if_there, sync_tree, write_atomically
from dar.protocol.worker import MOST_MODELS, ModelInventory
from dar.settings import Settings
from worker.models.local import names_in, size_of

log = structlog.get_logger(__name__)

FOLDER = "models"
"""Name of the cache in the worker's folder."""
RECORD = "model.json"
FILES = "files"
LOCK = "lock"
GOING = ".going-"
"""How a folder begins that is being removed."""


class ModelRecord(BaseModel):
    """A model in the cache."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Folder of the service's models directory, hub id, or id of a checkpoint."""
    version: str
    """Commit of the hub, or digest of the files. Another version is another model here."""
    files: Mapping[str, int]
    """Size of each file, by its path."""
    is_whole: bool = False
    """Whether all files have arrived and were verified."""

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    @property
    def key(self) -> str:
        """Name of the model's folder."""
        digest = hashlib.sha256(f"{self.name}\n{self.version}".encode()).hexdigest()
        return f"{re.sub(r'[^0-9A-Za-z_.-]', '--', self.name)[:100].lstrip('.')}-{digest[:16]}"

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has all files in their sizes."""
        return all(size_of(folder / name) == size for name, size in self.files.items())


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model that stays in the cache until it is released."""

    place: Path
    record: ModelRecord
    is_whole: bool
    """Whether all files were there when it was locked."""
    lock: TextIO

    @property
    def folder(self) -> Path:
        """Folder of its files."""
        return self.place / FILES

    def release(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.place / RECORD)  # it was in use until now
        self.lock.close()


class ModelCache:
    """The cache of a host.

    Args:
        path: Its folder, which the slots of the host share.
        max_bytes: Largest size of all models; 0: none is kept.
        min_free: Bytes on the disk that a download must leave free.
    """

    def __init__(self, path: Path, max_bytes: int, min_free: int = 0) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._min_free = min_free

    @classmethod
    def of(cls, settings: Settings) -> "ModelCache":
        path = settings.work_path / FOLDER
        return cls(path, settings.model_cache_bytes, settings.min_disk_bytes)

    def hold(self, wanted: ModelRecord, pause: Callable[[], None]) -> HeldModel | None:
        """Lock a model. If it is not whole, the caller must download what is missing.

        Args:
            wanted: The model.
            pause: Called, again and again, while another slot downloads the model.

        Returns:
            The model; None: there is no room for it, because it is too large, or because others
            are in use.
        """
        while True:
            with contextlib.suppress(BlockingIOError), self._alone():
                return self._lock(wanted)
            pause()

    def complete(self, held: HeldModel) -> None:
        """Note that all files of a model are there, and let other slots use it."""
        sync_tree(held.folder)
        with self._alone():
            whole = held.record.model_copy(update={"is_whole": True})
            write_atomically(held.place / RECORD, whole.model_dump_json().encode(), is_durable=True)
            fcntl.flock(held.lock, fcntl.LOCK_SH)

    def take(self, name: str, version: str | None) -> HeldModel | None:
        """Lock a model that is whole; None: there is none.

        Args:
            name: Its name.
            version: Its version; None: the one that was used last.
        """
        if not self.path.is_dir():
            return None
        # A damaged one may be downloaded again by another slot.
        with contextlib.suppress(BlockingIOError), self._alone():
            fitting = {
                used: record
                for _, record, used in self._all()
                if record.is_whole and record.name == name and version in {None, record.version}
            }
            if fitting and (held := self._lock(fitting[max(fitting)])) is not None:
                if held.is_whole:
                    return held
                held.lock.close()
        return None

    def names(self) -> list[str]:
        """Names of the models that are whole, the one used last first."""
        whole = [(used, record.name) for _, record, used in self._all() if record.is_whole]
        return list(dict.fromkeys(name for _, name in sorted(whole, reverse=True)))

    def bytes(self) -> int:
        """Size of all models, with what is still to arrive of those that are not whole."""
        return sum(record.bytes for _, record, _ in self._all())

    def tidy(self) -> None:
        """Remove what is over the limit, and what the disk has no room for."""
        if self.path.is_dir():
            with self._alone():
                self._make_room(0)

    def _lock(self, wanted: ModelRecord) -> HeldModel | None:
        """Lock a model, whose folder is made if there is room.

        Raises:
            BlockingIOError: Another slot downloads it.
        """
        place = self.path / wanted.key
        if _read(place) is None:
            if not self._make_room(wanted.bytes):
                return None
            (place / FILES).mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(place / RECORD, wanted.model_dump_json().encode())
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context((place / LOCK).open("a"))
            is_whole = self._share(place, lock)
            os.utime(place / RECORD)
            stack.pop_all()
            return HeldModel(place, wanted, is_whole, lock)

    def _share(self, place: Path, lock: TextIO) -> bool:
        """Lock a model: shared if it is whole, which is returned; otherwise alone.

        Raises:
            BlockingIOError: Another slot locks it, and is not done.
        """
        record = _read(place)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if record is None or not record.is_whole:
                raise
            return True
        if record is None or not record.is_whole or not record.is_in(place / FILES):
            return False
        fcntl.flock(lock, fcntl.LOCK_SH)
        return True

    def _make_room(self, needed: int) -> bool:
        """Remove models that are not in use, those unused for longest first, until there is room.

        Returns:
            Whether there is.
        """
        for place in self._folders():
            if _read(place) is None and not _is_in_use(place):
                log.warning("a folder of the cache is no model and is removed", folder=place.name)
                _remove(place)
        models = self._all()
        unused = sorted((one for one in models if not _is_in_use(one[0])), key=lambda one: one[2])
        total = sum(record.bytes for _, record, _ in models)
        in_use = total - sum(record.bytes for _, record, _ in unused)
        if needed and in_use + needed > self.max_bytes:
            return False  # so that none is removed in vain
        for place, record, _ in unused:
            if total + needed <= self.max_bytes and self._has_free(needed):
                break
            log.info("model removed from the cache", model=record.name, bytes=record.bytes)
            _remove(place)
            total -= record.bytes
        return total + needed <= self.max_bytes and self._has_free(needed)

    def _has_free(self, needed: int) -> bool:
        """Whether the disk has room for this and for what is still to arrive."""
        to_arrive = sum(
            max(0, record.bytes - _bytes_in(place / FILES))
            for place, record, _ in self._all()
            if not record.is_whole
        )
        return shutil.disk_usage(self.path).free >= needed + to_arrive + self._min_free

    def _all(self) -> list[tuple[Path, ModelRecord, float]]:
        """All models, with their folders and when they were used last."""
        found = []
        for place in self._folders():
            with contextlib.suppress(FileNotFoundError):  # another slot removes it
                if (record := _read(place)) is not None:
                    found.append((place, record, (place / RECORD).stat().st_mtime))
        return found

    def _folders(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        paths = self.path.iterdir()
        return [path for path in paths if path.is_dir() and not path.name.startswith(".")]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the whole cache; what a killed worker was removing is removed first."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.path / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.path.glob(f"{GOING}*"):
                shutil.rmtree(left, ignore_errors=True)
            yield


def inventory(settings: Settings) -> ModelInventory | None:
    """What this host has, for the service; None: it cannot be listed, which ends no attempt."""
    cache = ModelCache.of(settings)
    try:
        names = dict.fromkeys([*names_in(settings.models_path), *cache.names()])
        return ModelInventory(
            names=list(names)[:MOST_MODELS],
            cache_bytes=cache.bytes(),
            cache_limit=cache.max_bytes,
        )
    except (OSError, ValidationError) as error:
        log.warning("models cannot be listed", error=str(error))
        return None


def _read(place: Path) -> ModelRecord | None:
    """The record of a model; None: its folder was not completely made, or is none."""
    try:
        content = read_if_there(place / RECORD)
        return None if content is None else ModelRecord.model_validate_json(content)
    except (NotADirectoryError, ValidationError):
        return None


def _is_in_use(place: Path) -> bool:
    """Whether an attempt uses or downloads a model. Nobody begins to while the cache is locked."""
    with (place / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remove(place: Path) -> None:
    """Remove a model that is not in use; a kill in between leaves it to `ModelCache._alone`."""
    going = place.with_name(f"{GOING}{place.name}-{time.monotonic_ns()}")
    place.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _bytes_in(folder: Path) -> int:
    return sum(size_of(path) or 0 for path in folder.rglob("*") if path.is_file())
