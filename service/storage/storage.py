"""The interface of all storages: content by key, and uploads in parts.

A key is a path with slashes, made of ids and of checked manifest entries, never of a name from a
request.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Protocol

from dar.errors import ConfigurationError, ConflictError, DARError, ServiceUnavailableError
from dar.protocol.checkpoints import MANIFEST_NAME, Manifest

CHUNK_BYTES = 1024**2
MOST_REQUESTS = 64
"""Most requests for parts in one response: signing each takes half a millisecond."""
MARKER = ".dar-storage"
"""Object with the id of the installation whose files a storage has. `entries` leaves it out."""
FULL_RETRY_SECONDS = 10.0
"""When a client should try again after the store had no room."""
AWAY_RETRY_SECONDS = 5.0
"""When a client should try again after the store did not answer."""
LEFTOVER = timedelta(days=1)
"""Age from which a file is abandoned. Another process may still be writing a newer one."""


UNFINISHED = "files/tmp/"
"""Prefix of what is being written in a folder."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A stored object."""

    key: str
    bytes: int
    modified_at: datetime

    @property
    def is_old(self) -> bool:
        return is_old(self.modified_at)


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes of the volume of a storage."""

    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Upload:
    """A checkpoint that is being uploaded."""

    staging: str
    """Key of the folder of what has not been verified."""
    final: str
    """Key of the folder of the checkpoint."""
    manifest: Manifest
    manifest_sha256: str

    @property
    def names(self) -> Mapping[str, int | None]:
        """Expected size of each file; None for the manifest, whose size is not known beforehand."""
        sizes: dict[str, int | None] = {file.name: file.bytes for file in self.manifest.files}
        return sizes | {MANIFEST_NAME: None}


class PartWriter(Protocol):
    """Takes one part of a file of an upload."""

    def write(self, content: bytes, /) -> object: ...

    def save(self) -> None:
        """Make what was written durable."""

    def close(self) -> None:
        """End; what was not saved may be lost."""


@dataclass(frozen=True, slots=True)
class PartRequest:
    """A request with which a worker sends a part of a file to the store itself."""

    offset: int
    bytes: int
    url: str = field(repr=False)
    headers: Mapping[str, str]
    """Must be sent as they are, because the URL signs them. They hold the part's digest."""


class DirectTransfers(ABC):
    """Transfers between a store and others that have no key of it."""

    part_bytes: int
    """Size of each part of an upload but the last."""

    @abstractmethod
    def download_url(self, key: str, filename: str) -> str:
        """A URL that answers with an object's content for a limited time.

        Args:
            key: The object.
            filename: Name under which a browser saves it.
        """

    @abstractmethod
    def missing_parts(self, key: str, size: int, digests: Sequence[str]) -> list[PartRequest]:
        """Requests for the next parts of an object; none: it is complete, and now it exists.

        Args:
            key: The object.
            size: Its size in bytes.
            digests: SHA-256 of each part of `part_bytes`, in hex. The store refuses other content.
        """


class Storage(ABC):
    """Files of uploads and checkpoints.

    Methods of a storage that does not answer, or has no room, raise `ServiceUnavailableError`.
    """

    where: str
    """Its place, for messages."""
    direct: DirectTransfers | None = None
    """How workers transfer bytes themselves; None: all pass through the service."""
    signed_downloads: DirectTransfers | None = None
    """How users fetch bytes themselves; None: all pass through the service."""
    scratch_folder: Path | None = None
    """Folder of this machine for what passes through the service; None: the storage itself."""
    owner: str | None = None
    """The mark that it must have; None: it was not claimed (`service.storage_owner`)."""

    def close(self) -> None:  # noqa: B027 - a folder has no connections
        """End its connections."""

    @abstractmethod
    def prepare(self) -> None:
        """Check at the start that it can be used, and remove what interrupted writes left.

        Raises:
            ConfigurationError: It cannot be read or written.
        """

    @abstractmethod
    def check(self) -> str:
        """``ok``, or the reason why nothing can be written."""

    def mark(self) -> str | None:
        """Which installation's it is; None: it has no mark; empty: an earlier version wrote it."""
        try:
            return b"".join(self.read(MARKER)).decode(errors="replace").strip()
        except FileNotFoundError:
            return None

    @abstractmethod
    def write_mark(self, owner: str, replacing: str = "") -> None:
        """Say whose it is, unless it has another mark than ``replacing`` by then."""

    @abstractmethod
    def check_mounted(self) -> None:
        """Check that a storage is the one that was claimed, so that a missing file is damage.

        Raises:
            ServiceUnavailableError: It is not, as on a volume that is not mounted.
        """

    @abstractmethod
    def space(self) -> Space | None:
        """Its volume; None: it has no limit that could be asked for."""

    # --- objects ---

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of an object; None: there is none."""

    @abstractmethod
    def entries(self, prefix: str) -> Iterator[StoredObject]:
        """All objects below ``prefix``, which ends with a slash or is empty."""

    @abstractmethod
    def read(self, key: str, first: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The content from byte ``first`` up to ``end``, which is not included.

        Raises:
            FileNotFoundError: There is no such object.
        """

    @abstractmethod
    def put(self, key: str, content: Iterable[bytes]) -> None:
        """Store an object, durably, and only if ``content`` ends without an exception."""

    @abstractmethod
    def put_file(self, key: str, path: Path) -> None:
        """Store the content of a file, durably. The file may be moved."""

    @abstractmethod
    def scratch(self, name: str) -> AbstractContextManager[Path]:
        """A path for a new file that `put_file` takes at no cost; removed at the end."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove an object. Idempotent."""

    @abstractmethod
    def remove_all(self, prefix: str) -> None:
        """Remove everything below ``prefix``, which ends with a slash. Idempotent.

        Raises:
            OSError: Some of it is left; call it again.
        """

    @abstractmethod
    def folders(self, prefix: str, depth: int) -> Iterator[tuple[str, datetime]]:
        """Keys of the folders ``depth`` levels below ``prefix``, and when each was last changed."""

    def path(self, key: str) -> Path | None:
        """The object as a file of this machine; None: this storage has none."""
        del key
        return None

    def open(self, key: str) -> BinaryIO:
        """An object as a file to be read.

        Raises:
            FileNotFoundError: There is no such object.
        """
        return io.BufferedReader(_Chunks(self.read(key)), CHUNK_BYTES)

    # --- uploads through the service ---

    @abstractmethod
    def received(self, upload: Upload) -> dict[str, int]:
        """Bytes received of each file of an upload."""

    @abstractmethod
    def open_part(self, upload: Upload, name: str, offset: int) -> PartWriter:
        """Take a file of an upload, or the rest of it from ``offset``.

        Raises:
            ConflictError: Another request is writing it (``upload_busy``), or its size is not
                ``offset`` (``offset_mismatch``).
        """

    @abstractmethod
    def verify(self, upload: Upload) -> int:
        """Check the digests of an upload and give its files their final keys. Idempotent.

        Files that came directly have theirs already: the store has compared them with the digests.

        Returns:
            Size of the manifest in bytes.

        Raises:
            ConflictError: A file is incomplete (``upload_incomplete``) or altered
                (``checksum_mismatch``).
        """


class _Chunks(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override] # RawIOBase has a private type here
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def is_old(modified_at: datetime) -> bool:
    """Whether nothing can still be writing what was changed last at this time."""
    return modified_at < datetime.now(UTC) - LEFTOVER


def storage_full(why: str) -> ServiceUnavailableError:
    """The error about a store without room."""
    return ServiceUnavailableError(
        f"the artifact store is full: {why}. The upload goes on once the service's operator has "
        "made room",
        code="storage_full",
        retry_after_seconds=FULL_RETRY_SECONDS,
    )


def scratch_full(folder: Path, why: str) -> ServiceUnavailableError:
    """The error about a machine without room for what passes through it."""
    return ServiceUnavailableError(
        f"the service has no room for temporary files in {folder}: {why}. The upload goes on once "
        "its operator has made room there, or named another folder in TMPDIR",
        code="storage_full",
        retry_after_seconds=FULL_RETRY_SECONDS,
    )


def storage_unavailable(
    why: str, retry_after_seconds: float = AWAY_RETRY_SECONDS
) -> ServiceUnavailableError:
    """The error about a store that cannot be used now."""
    return ServiceUnavailableError(
        f"the artifact store cannot be used: {why}",
        code="storage_unavailable",
        retry_after_seconds=retry_after_seconds,
    )


def not_mounted(storage: Storage, retry_after_seconds: float) -> ServiceUnavailableError:
    """The error about a storage that has lost the mark of its installation."""
    return storage_unavailable(
        f"{storage.where} has not this installation's {MARKER}, so it is not the place that the "
        "service has written to; its operator must mount the volume again, correct "
        "DAR_STORAGE_URL, or restore the bucket",
        retry_after_seconds,
    )


def unusable(error: DARError) -> ConfigurationError:
    """The error about a bucket that cannot be used at the start."""
    return ConfigurationError(
        f"DAR_STORAGE_URL: {error.message}; the service must be able to read, write, list and "
        "delete in the bucket. Correct the URL, DAR_S3_ENDPOINT or the keys"
    )


def offset_mismatch(name: str, size: int, offset: int) -> ConflictError:
    return ConflictError(
        f"{size} bytes of {name!r} were received, not {offset}; continue from {size}",
        code="offset_mismatch",
    )


def incomplete(name: str, here: int, size: int) -> ConflictError:
    return ConflictError(
        f"{here} of {size} bytes of {name!r} were received; send the rest first",
        code="upload_incomplete",
    )


def altered(name: str, found: str, expected: str) -> ConflictError:
    return ConflictError(
        f"{name!r} arrived with sha256 {found}, but the manifest says {expected}; send it again "
        "from the start",
        code="checksum_mismatch",
    )


def own_manifest(upload: Upload) -> bytes:
    """The manifest of an upload, for a worker that announced it and did not upload it.

    Trainers write it in this form.
    """
    return upload.manifest.model_dump_json(indent=1).encode()
