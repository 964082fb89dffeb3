"""Files of the installation: uploads and checkpoints in one folder.

Paths in it are made of ids and of checked manifest entries, never of a name from a request.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from dar.disk import OTHER_FOLDER_HINT, make_folder, sync
from dar.errors import ConflictError, ServiceUnavailableError
from dar.protocol.checkpoints import MANIFEST_NAME, Manifest, ManifestFile

CHUNK_BYTES = 1024**2
FREE_FACTOR = 2
"""Leaves room for concurrent uploads, each of which checks only its own size."""
FULL_RETRY_SECONDS = 10.0
"""When a client should try again after the store had no room."""
LEFTOVER_SECONDS = 24 * 3600
"""Age from which a file is abandoned. Another process may still be writing a newer one."""

_CHECKPOINT = re.compile(r"(?P<job>[^/]+)/attempt-(?P<attempt>\d+)/(?:\.tmp-)?step-(?P<step>\d+)")


@dataclass(frozen=True, slots=True)
class Upload:
    """A checkpoint that is being uploaded."""

    staging: Path
    final: Path
    manifest: Manifest
    manifest_sha256: str

    @property
    def names(self) -> Mapping[str, int | None]:
        """Expected size of each file; None for the manifest, whose size is not known beforehand."""
        sizes: dict[str, int | None] = {file.name: file.bytes for file in self.manifest.files}
        return sizes | {MANIFEST_NAME: None}


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
    """The folder of uploads and checkpoints.

    Args:
        root: Its path; made if it does not exist.
        min_free_bytes: Bytes of its volume that uploads leave free, because the database may be
            on it too.
    """

    def __init__(self, root: Path, min_free_bytes: int = 0) -> None:
        self.root = root
        self.min_free_bytes = min_free_bytes

    def prepare(self) -> None:
        """Make the folders and remove what interrupted uploads left.

        Raises:
            ConfigurationError: A folder cannot be made, or not be written to.
        """
        for folder in (self.root, self._files, self._files / "tmp", self._checkpoints):
            make_folder(folder, f"{OTHER_FOLDER_HINT} DAR_ARTIFACTS_DIR or DAR_HOME")
        for leftover in _old(self._files / "tmp"):
            leftover.unlink(missing_ok=True)

    def room(self) -> Room:
        """Room on its volume."""
        usage = shutil.disk_usage(self.root)
        return Room(usage.free, usage.total, self.min_free_bytes)

    def check(self) -> str:
        """``ok``, or the reason why nothing can be written."""
        probe = self.root / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            return f"not writable: {error}"
        return "ok"

    # --- uploaded files ---

    @property
    def _files(self) -> Path:
        return self.root / "files"

    @property
    def _checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def file(self, file_id: str) -> Path:
        return self._files / file_id

    def new_file(self, file_id: str) -> Path:
        """Path of an upload until it is complete."""
        return self._files / "tmp" / file_id

    def keep_file(self, file_id: str) -> None:
        """Move a complete upload to its final path, durably."""
        self.new_file(file_id).rename(self.file(file_id))
        sync(self._files)

    def old_files(self) -> list[str]:
        """Ids of files that are older than any upload still in progress."""
        return [path.name for path in _old(self._files)]

    # --- checkpoints ---

    def check_mounted(self) -> None:
        """Check that the folder of all checkpoints is there, so that a missing file is damage.

        Raises:
            ServiceUnavailableError: It is not, as on a volume that is not mounted.
        """
        if not self._checkpoints.is_dir():
            raise ServiceUnavailableError(
                f"the artifact store has no folder {self._checkpoints.name!r}; its operator must "
                "mount the volume again",
                code="storage_unavailable",
                retry_after_seconds=30,
            )

    def checkpoint(self, job_id: str, attempt: int, step: int) -> Path:
        """Folder of a checkpoint; one for each attempt, so that a late one overwrites nothing."""
        return self._checkpoints / job_id / f"attempt-{attempt}" / f"step-{step}"

    def upload(self, job_id: str, attempt: int, manifest: Manifest, manifest_sha256: str) -> Upload:
        final = self.checkpoint(job_id, attempt, manifest.step)
        staging = final.with_name(f".tmp-{final.name}")
        return Upload(staging, final, manifest, manifest_sha256)

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

    def reserve_part(self, size: int, what: str) -> None:
        """Check that the volume has room for one part of something that was reserved.

        Raises:
            ServiceUnavailableError: It has not (``storage_full``).
        """
        self._need(size + self.min_free_bytes, size, what)

    def _need(self, needed: int, size: int, what: str) -> None:
        free = self.room().free
        if size > 0 and free < needed:
            raise storage_full(
                f"{what} has {size:,} more bytes, for which {needed:,} must be free, but "
                f"{free:,} are"
            )

    def remove_job(self, job_id: str) -> None:
        """Remove all files of a job."""
        shutil.rmtree(self._checkpoints / job_id, ignore_errors=True)

    def remove_checkpoint(self, job_id: str, attempt: int, step: int) -> None:
        """Remove the files of a checkpoint, received in whole or in part. Idempotent.

        Raises:
            OSError: Some of them are left; call it again.
        """
        final = self.checkpoint(job_id, attempt, step)
        for folder in (final, final.with_name(f".tmp-{final.name}")):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)

    def old_checkpoints(self) -> Iterator[tuple[str, int, int]]:
        """Job, attempt and step of each folder that nothing has been written to for a day."""
        for path in self._checkpoints.glob("*/attempt-*/*step-*"):
            match = _CHECKPOINT.fullmatch(path.relative_to(self._checkpoints).as_posix())
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                if match is not None and _is_old(path.stat()):
                    yield match["job"], int(match["attempt"]), int(match["step"])


def storage_full(why: str) -> ServiceUnavailableError:
    """The error about a store without room."""
    return ServiceUnavailableError(
        f"the artifact store is full: {why}. The upload goes on once the service's operator has "
        "made room",
        code="storage_full",
        retry_after_seconds=FULL_RETRY_SECONDS,
    )


def damage_of(
    folder: Path,
    files: Iterable[ManifestFile],
    *,
    take: Callable[[int], None] | None = None,
) -> str | None:
    """What is wrong with a stored checkpoint, as a part of a sentence; None: nothing.

    Hidden entries, as file systems make them, are ignored.

    Args:
        folder: The checkpoint.
        files: All files that it must have.
        take: Called with the number of bytes after each part that was read; it may pause or raise.
            None: only names and sizes are compared, and nothing is read.

    Raises:
        OSError: The folder cannot be examined, which says nothing about its files.
    """
    expected = {file.name: file for file in files}
    sizes = dict(_sizes(folder))
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
        if (found := _damage_of_content(folder / name, file, take)) is not None:
            return found
    return None


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not path.is_symlink() and not name.name.startswith("."):
            yield name.as_posix(), path.stat().st_size


def _damage_of_content(path: Path, file: ManifestFile, take: Callable[[int], None]) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as content:
            while part := content.read(CHUNK_BYTES):
                digest.update(part)
                take(len(part))
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"{file.name} cannot be read: {error.strerror}"
    return None if digest.hexdigest() == file.sha256 else f"{file.name} was altered"


def received(upload: Upload) -> dict[str, int]:
    """Bytes received of each file of an upload."""
    folder = upload.final if upload.final.is_dir() else upload.staging
    sizes = {}
    for name in upload.names:
        path = folder / name
        sizes[name] = path.stat().st_size if path.is_file() else 0
    return sizes


def open_part(upload: Upload, name: str, offset: int) -> BinaryIO:
    """Open a file of an upload to append at ``offset``, and lock it.

    Raises:
        ConflictError: Another request is writing it (``upload_busy``), or its size is not
            ``offset`` (``offset_mismatch``).
    """
    path = upload.staging / name
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConflictError(f"another request is writing {name!r}", code="upload_busy") from None
    size = path.stat().st_size
    if offset == 0 and size > 0:
        file.truncate(0)
    elif size != offset:
        file.close()
        raise ConflictError(
            f"{size} bytes of {name!r} were received, not {offset}; continue from {size}",
            code="offset_mismatch",
        )
    return file


def verify(upload: Upload) -> int:
    """Check the digests of an upload and move it to its final path, durably. Idempotent.

    Returns:
        Size of the manifest in bytes.

    Raises:
        ConflictError: A file is incomplete (``upload_incomplete``) or altered
            (``checksum_mismatch``).
    """
    folder = upload.final if upload.final.is_dir() else upload.staging
    manifest_bytes = _verify_manifest(upload, folder)
    for file in upload.manifest.files:
        _verify_file(folder / file.name, file.name, file.bytes, file.sha256)
    if folder is upload.staging:
        for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
            sync(inner)
        folder.rename(upload.final)
    # The folders of the attempt and the job may be new too, each an entry of its parent folder.
    for outer in upload.final.parents[:3]:
        sync(outer)
    return manifest_bytes


def _verify_manifest(upload: Upload, folder: Path) -> int:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        # A worker need not upload the manifest that it announced; trainers write it in this form.
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(upload.manifest.model_dump_json(indent=1).encode())  # synced below
    size = path.stat().st_size
    _verify_file(path, MANIFEST_NAME, size, upload.manifest_sha256)
    return size


def _verify_file(path: Path, name: str, size: int, sha256: str) -> None:
    here = path.stat().st_size if path.is_file() else 0
    if here != size or not path.is_file():
        raise ConflictError(
            f"{here} of {size} bytes of {name!r} were received; send the rest first",
            code="upload_incomplete",
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    if found != sha256:
        path.unlink()
        raise ConflictError(
            f"{name!r} arrived with sha256 {found}, but the manifest says {sha256}; send it again "
            "from the start",
            code="checksum_mismatch",
        )


def _old(folder: Path) -> Iterator[Path]:
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if entry.is_file() and _is_old(entry.stat()):
                yield Path(entry.path)


def _is_old(status: os.stat_result) -> bool:
    return status.st_mtime < datetime.now(UTC).timestamp() - LEFTOVER_SECONDS
