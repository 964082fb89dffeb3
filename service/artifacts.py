"""Files of the installation: uploads and checkpoints in a storage.

Keys are made of ids and of checked manifest entries, never of a name from a request.
"""

import contextlib
import errno
import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dar.protocol.checkpoints import Manifest, ManifestFile
from service.storage.storage import Storage, Upload, is_old, scratch_full, storage_full

FREE_FACTOR = 2
"""Leaves room for concurrent uploads, each of which checks only its own size."""
FILES = "files/"
CHECKPOINTS = "checkpoints/"
PARTS = "uploads/"

_CHECKPOINT = re.compile(
    r"checkpoints/(?P<job>[^/]+)/attempt-(?P<attempt>\d+)/(?:\.tmp-)?step-(?P<step>\d+)"
)


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of the volume of the artifact store."""

    free: int
    total: int
    reserved: int
    """Bytes that uploads must leave free."""

    @property
    def is_full(self) -> bool:
        return self.free <= self.reserved


class Artifacts:
    """Uploads and checkpoints.

    Args:
        storage: Where they are kept.
        min_free_bytes: Bytes of its volume that uploads leave free, because the database may be
            on it too.
    """

    def __init__(self, storage: Storage, min_free_bytes: int = 0) -> None:
        self.storage = storage
        self.min_free_bytes = min_free_bytes

    def room(self) -> Room | None:
        """Room on its volume; None: it is in no volume."""
        space = self.storage.space()
        return None if space is None else Room(space.free, space.total, self.min_free_bytes)

    def reserve(self, size: int, what: str) -> None:
        """Check that the volume has room for ``size`` more bytes, before they are sent.

        Args:
            size: Bytes that are still to be received.
            what: What is received, for the error.

        Raises:
            ServiceUnavailableError: Less than `FREE_FACTOR` times ``size``, or too little beside
                ``size``, is free (``storage_full``).
        """
        self._need(max(FREE_FACTOR * size, size + self.min_free_bytes), size, what)

    def reserve_scratch(self, size: int, what: str) -> None:
        """Check that this machine has room for ``size`` bytes on their way to a bucket.

        Raises:
            ServiceUnavailableError: It has not (``storage_full``).
        """
        folder = self.storage.scratch_folder
        if folder is not None and (free := shutil.disk_usage(folder).free) < size:
            raise scratch_full(folder, f"{what} has {size:,} bytes, but {free:,} are free")

    def reserve_part(self, size: int, what: str) -> None:
        """Check that the volume has room for one part of something that was reserved.

        Raises:
            ServiceUnavailableError: It has not (``storage_full``).
        """
        self._need(size + self.min_free_bytes, size, what)

    def _need(self, needed: int, size: int, what: str) -> None:
        space = self.storage.space()
        if space is not None and size > 0 and space.free < needed:
            raise storage_full(
                f"{what} has {size:,} more bytes, for which {needed:,} must be free, but "
                f"{space.free:,} are"
            )

    # --- uploaded files ---

    def file(self, file_id: str) -> str:
        """Key of an uploaded file."""
        return f"{FILES}{file_id}"

    def new_file(self, file_id: str) -> AbstractContextManager[Path]:
        """Path of an upload until it is complete."""
        return self.storage.scratch(file_id)

    def keep_file(self, file_id: str, path: Path) -> None:
        """Store a complete upload, durably."""
        self.storage.put_file(self.file(file_id), path)

    def open_file(self, file_id: str | None) -> BinaryIO | None:
        """A complete upload, to be read; None: there is none."""
        if not file_id:
            return None
        try:
            return self.storage.open(self.file(file_id))
        except (FileNotFoundError, IsADirectoryError):
            return None

    def remove_file(self, file_id: str) -> None:
        self.storage.remove(self.file(file_id))

    def old_files(self) -> list[str]:
        """Ids of files that are older than any upload still in progress."""
        found = ((one.key.removeprefix(FILES), one) for one in self.storage.entries(FILES))
        return [name for name, entry in found if "/" not in name and entry.is_old]

    # --- parts of uploaded files ---

    def _part(self, upload_id: str, part_id: str) -> str:
        return f"{PARTS}{upload_id}/{part_id}"

    def keep_part(self, upload_id: str, part_id: str, path: Path) -> None:
        """Store a part of an upload, durably."""
        self.storage.put_file(self._part(upload_id, part_id), path)

    def read_part(self, upload_id: str, part_id: str) -> Iterator[bytes]:
        """The content of a part.

        Raises:
            FileNotFoundError: It is not there.
        """
        return self.storage.read(self._part(upload_id, part_id))

    def remove_part(self, upload_id: str, part_id: str) -> None:
        self.storage.remove(self._part(upload_id, part_id))

    def remove_parts(self, upload_id: str) -> None:
        """Remove all parts of an upload. Idempotent.

        Raises:
            OSError: Some of them are left; call it again.
        """
        self.storage.remove_all(f"{PARTS}{upload_id}/")

    def old_parts(self) -> Mapping[str, str]:
        """Parts that are older than any that is still being stored: their uploads by id."""
        found = {}
        for entry in self.storage.entries(PARTS):
            upload_id, _, part_id = entry.key.removeprefix(PARTS).partition("/")
            if entry.is_old:
                found[part_id] = upload_id
        return found

    # --- checkpoints ---

    def checkpoint(self, job_id: str, attempt: int, step: int) -> str:
        """Key of a checkpoint's folder; one for each attempt, so that none overwrites another."""
        return f"{CHECKPOINTS}{job_id}/attempt-{attempt}/step-{step}"

    def _staging(self, job_id: str, attempt: int, step: int) -> str:
        return f"{CHECKPOINTS}{job_id}/attempt-{attempt}/.tmp-step-{step}"

    def upload(self, job_id: str, attempt: int, manifest: Manifest, manifest_sha256: str) -> Upload:
        place = (job_id, attempt, manifest.step)
        return Upload(self._staging(*place), self.checkpoint(*place), manifest, manifest_sha256)

    def remove_job(self, job_id: str) -> None:
        """Remove all files of a job, as far as they can be removed."""
        with contextlib.suppress(OSError):
            self.storage.remove_all(f"{CHECKPOINTS}{job_id}/")

    def remove_checkpoint(self, job_id: str, attempt: int, step: int) -> None:
        """Remove the files of a checkpoint, received in whole or in part. Idempotent.

        Raises:
            OSError: Some of them are left; call it again.
            ServiceUnavailableError: The storage does not answer; call it again.
        """
        for key in (self.checkpoint(job_id, attempt, step), self._staging(job_id, attempt, step)):
            self.storage.remove_all(f"{key}/")

    def old_checkpoints(self) -> Iterator[tuple[str, int, int]]:
        """Job, attempt and step of each folder that nothing has been written to for a day."""
        for key, changed_at in self.storage.folders(CHECKPOINTS, depth=3):
            match = _CHECKPOINT.fullmatch(key)
            if match is not None and is_old(changed_at):
                yield match["job"], int(match["attempt"]), int(match["step"])

    def damage_of(
        self,
        folder: str,
        files: Iterable[ManifestFile],
        *,
        take: Callable[[int], None] | None = None,
    ) -> str | None:
        """What is wrong with a stored checkpoint, as a part of a sentence; None: nothing.

        Hidden entries, as file systems make them, are ignored.

        Args:
            folder: Key of the checkpoint.
            files: All files that it must have.
            take: Called with the number of bytes after each part that was read; it may pause or
                raise. None: only names and sizes are compared, and nothing is read.

        Raises:
            OSError: The folder cannot be examined, which says nothing about its files.
            ServiceUnavailableError: The storage does not answer, which says nothing either.
        """
        expected = {file.name: file for file in files}
        sizes = dict(self._sizes(f"{folder}/"))
        for name in sorted(expected.keys() - sizes.keys()):
            return f"{name} is missing"
        for name in sorted(sizes.keys() - expected.keys()):
            return f"{name} does not belong to it"
        for name, file in expected.items():
            if sizes[name] != file.bytes:
                return f"{name} has {sizes[name]:,} of {file.bytes:,} bytes"
        if take is None:
            return None
        for name, file in expected.items():
            found = self.damage_of_content(f"{folder}/{name}", name, file.sha256, take)
            if found is not None:
                return found
        return None

    def _sizes(self, folder: str) -> Iterator[tuple[str, int]]:
        for entry in self.storage.entries(folder):
            name = entry.key.removeprefix(folder)
            if not name.rpartition("/")[2].startswith("."):
                yield name, entry.bytes

    def damage_of_content(
        self, key: str, name: str, sha256: str, take: Callable[[int], None]
    ) -> str | None:
        """What is wrong with a file's content; see `damage_of`."""
        digest = hashlib.sha256()
        try:
            for part in self.storage.read(key):
                digest.update(part)
                take(len(part))
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return f"{name} cannot be read: {error.strerror}"
        return None if digest.hexdigest() == sha256 else f"{name} was altered"
