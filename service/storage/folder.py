"""A storage in a folder of this machine."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from dar.disk import OTHER_FOLDER_HINT, make_folder, sync
from dar.errors import ConflictError
from dar.protocol.checkpoints import MANIFEST_NAME
from service.storage.storage import (
    CHUNK_BYTES,
    MARKER,
    PartWriter,
    Space,
    Storage,
    StoredObject,
    Upload,
    altered,
    incomplete,
    is_old,
    not_mounted,
    offset_mismatch,
    own_manifest,
    storage_unavailable,
)

FOLDERS = ("files", "files/tmp", "checkpoints")
"""Made at the start. A file is written in the second before it gets its place in the first."""
LONGER_RETRY_SECONDS = 30.0


class FolderStorage(Storage):
    """Objects as files of a folder.

    Args:
        root: Its path; made if it does not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where = str(root)

    def prepare(self) -> None:
        for folder in (self.root, *(self.root / name for name in FOLDERS)):
            make_folder(folder, f"{OTHER_FOLDER_HINT} DAR_ARTIFACTS_DIR or DAR_HOME")
        for entry in os.scandir(self.root / "files/tmp"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                if entry.is_file() and is_old(_modified_at(entry.stat())):
                    Path(entry).unlink(missing_ok=True)

    def space(self) -> Space:
        usage = shutil.disk_usage(self.root)
        return Space(usage.free, usage.total)

    def check(self) -> str:
        probe = self.root / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            return f"not writable: {error}"
        return "ok"

    def check_mounted(self) -> None:
        if self.owner is not None and self.mark() != self.owner:
            raise not_mounted(self, LONGER_RETRY_SECONDS)
        if not (self.root / "checkpoints").is_dir():
            raise storage_unavailable(
                "it has no folder 'checkpoints'; its operator must mount the volume again",
                LONGER_RETRY_SECONDS,
            )

    def write_mark(self, owner: str, replacing: str = "") -> None:
        try:
            with (self.root / MARKER).open("x", encoding="utf-8") as file:
                file.write(owner + "\n")
        except FileExistsError:
            if self.mark() == replacing:
                self.put(MARKER, [owner.encode() + b"\n"])
        sync(self.root / MARKER)
        sync(self.root)

    # --- objects ---

    def path(self, key: str) -> Path:
        return self.root / key

    def size(self, key: str) -> int | None:
        path = self.path(key)
        return path.stat().st_size if path.is_file() and not path.is_symlink() else None

    def entries(self, prefix: str) -> Iterator[StoredObject]:
        folder = self.path(prefix)
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                if path.is_file() and not path.is_symlink():
                    state = path.stat()
                    key = path.relative_to(self.root).as_posix()
                    if key == MARKER:
                        continue
                    yield StoredObject(key, state.st_size, _modified_at(state))

    def read(self, key: str, first: int = 0, end: int | None = None) -> Iterator[bytes]:
        return _chunks(self.path(key).open("rb"), first, end)

    def open(self, key: str) -> BinaryIO:
        return self.path(key).open("rb")

    def put(self, key: str, content: Iterable[bytes]) -> None:
        with self.scratch(key.replace("/", "-")) as temporary:
            with temporary.open("wb") as file:
                for chunk in content:
                    file.write(chunk)
            self.put_file(key, temporary)

    def put_file(self, key: str, path: Path) -> None:
        target = self.path(key)
        new = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        sync(path)
        try:
            path.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # The target is on another volume, where a rename needs a copy first.
            temporary = target.with_name(f".tmp-{target.name}")
            try:
                shutil.copyfile(path, temporary)
                sync(temporary)
                temporary.rename(target)
            finally:
                temporary.unlink(missing_ok=True)
        for folder in (target.parent, *(folder.parent for folder in new)):
            sync(folder)

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        path = self.root / "files/tmp" / name
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def remove(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def remove_all(self, prefix: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path(prefix))

    def folders(self, prefix: str, depth: int) -> Iterator[tuple[str, datetime]]:
        for path in self.path(prefix).glob("/".join("*" * depth)):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                yield path.relative_to(self.root).as_posix(), _modified_at(path.stat())

    # --- uploads ---

    def received(self, upload: Upload) -> dict[str, int]:
        folder = self._folder_of(upload)
        sizes = {}
        for name in upload.names:
            path = folder / name
            sizes[name] = path.stat().st_size if path.is_file() else 0
        return sizes

    def open_part(self, upload: Upload, name: str, offset: int) -> PartWriter:
        path = self.path(upload.staging) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConflictError(
                f"another request is writing {name!r}", code="upload_busy"
            ) from None
        size = path.stat().st_size
        if offset == 0 and size > 0:
            file.truncate(0)
        elif size != offset:
            file.close()
            raise offset_mismatch(name, size, offset)
        return _AppendingWriter(file)

    def verify(self, upload: Upload) -> int:
        folder, final = self._folder_of(upload), self.path(upload.final)
        manifest_bytes = _verify_manifest(upload, folder)
        for file in upload.manifest.files:
            _verify_file(folder / file.name, file.name, file.bytes, file.sha256)
        if folder != final:
            for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
                sync(inner)
            folder.rename(final)
        # The folders of the attempt and the job may be new too, each an entry of its parent folder.
        for outer in final.parents[:3]:
            sync(outer)
        return manifest_bytes

    def _folder_of(self, upload: Upload) -> Path:
        final = self.path(upload.final)
        return final if final.is_dir() else self.path(upload.staging)


class _AppendingWriter:
    """Appends to a file that it holds a lock on."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, content: bytes, /) -> object:
        return self._file.write(content)

    def save(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _chunks(file: BinaryIO, first: int, end: int | None) -> Iterator[bytes]:
    with file:
        file.seek(first)
        left = None if end is None else end - first
        while chunk := file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES)):
            left = None if left is None else left - len(chunk)
            yield chunk


def _verify_manifest(upload: Upload, folder: Path) -> int:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(own_manifest(upload))  # synced below
    size = path.stat().st_size
    _verify_file(path, MANIFEST_NAME, size, upload.manifest_sha256)
    return size


def _verify_file(path: Path, name: str, size: int, sha256: str) -> None:
    here = path.stat().st_size if path.is_file() else 0
    if here != size or not path.is_file():
        raise incomplete(name, here, size)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    if found != sha256:
        path.unlink()
        raise altered(name, found, sha256)


def _modified_at(status: os.stat_result) -> datetime:
    return datetime.fromtimestamp(status.st_mtime, UTC)
