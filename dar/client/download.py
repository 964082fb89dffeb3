"""Download of files with known digests: resumable, verified, and never outside their folder."""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from dar.client.transport import Transport, escaped
from dar.disk import file_sha256
from dar.errors import CheckpointError
from dar.protocol.checkpoints import CheckpointFile, FileName

_FILE_NAME: TypeAdapter[str] = TypeAdapter(FileName)
_PIECE_BYTES = 1024**2
_PIECES_WAITING = 16


class Download:
    """The download of several files into a folder.

    Args:
        transport: Connection to the service.
        path: Route of the files; a file's name follows it.
        directory: Folder to write into.
        files: The files.
        on_bytes: Called with the bytes received so far and the total.
    """

    def __init__(
        self,
        transport: Transport,
        path: str,
        directory: Path,
        files: Sequence[CheckpointFile],
        on_bytes: Callable[[int, int], None] | None,
    ) -> None:
        self._transport = transport
        self._path = path
        self._directory = directory
        self._files = files
        self._on_bytes = on_bytes
        self._total = sum(file.bytes for file in files)
        self._finished = 0

    def run(self) -> Path:
        """Download the files that are missing; returns the folder.

        Raises:
            CheckpointError: A file's content or name is wrong.
        """
        for file in self._files:
            target = self._target(file)
            if not _is_correct(target, file):
                self._fetch(file, target)
            self._finished += file.bytes
            self._report(0)
        return self._directory

    def _target(self, file: CheckpointFile) -> Path:
        """Path of a file.

        The name from the service is checked, and no symbolic link is followed.
        """
        try:
            name = _FILE_NAME.validate_python(file.name)
        except ValidationError:
            raise CheckpointError(
                f"the service lists a file named {file.name!r}, "
                "which is not a valid name in a checkpoint"
            ) from None
        self._directory.mkdir(parents=True, exist_ok=True)
        target = self._directory / name
        target.parent.mkdir(exist_ok=True)
        if not target.parent.resolve().is_relative_to(self._directory.resolve()):
            raise CheckpointError(
                f"{target.parent} links to a place outside {self._directory}; remove that link"
            )
        return target

    def _fetch(self, file: CheckpointFile, target: Path) -> None:
        partial = target.with_name(f".{target.name}.{file.sha256[:16]}.part")
        if partial.is_symlink():
            partial.unlink()
        was_begun = True
        # A part from an earlier call may be damaged: then once more from the start.
        while was_begun:
            was_begun = partial.exists()
            if self._transport.retried(lambda: self._receive(file, partial)) == file.sha256:
                partial.replace(target)
                return
            partial.unlink()
        raise CheckpointError(f"the downloaded {file.name} has another SHA-256; it was deleted")

    def _receive(self, file: CheckpointFile, partial: Path) -> str:
        """Append the missing bytes; returns the SHA-256 of the whole, in hex."""
        start = partial.stat().st_size if partial.exists() else 0
        if start > 0 and start >= file.bytes:
            return file_sha256(partial)
        headers = {"accept-encoding": "identity"}
        if start > 0:
            # Without If-Range: a store to which the service redirects knows another ETag, and the
            # digest is compared at the end.
            headers["range"] = f"bytes={start}-"
        name = "/".join(escaped(part) for part in file.name.split("/"))
        with (
            self._transport.open("GET", f"{self._path}/{name}", headers=headers) as response,
            _ParallelDigest() as digest,
        ):
            is_rest = response.status_code == 206
            received = start if is_rest else 0
            if is_rest:
                digest.add_file(partial)
            with partial.open("ab" if is_rest else "wb") as sink:
                # Pieces of a given size would be lost with a connection that breaks.
                for piece in response.iter_bytes():
                    received += len(piece)
                    if received > file.bytes:
                        break  # the file is wrong, and the response might never end
                    sink.write(piece)
                    digest.add(piece)
                    self._report(received)
            return digest.hex() if received == file.bytes else "another length"

    def _report(self, received: int) -> None:
        if self._on_bytes is not None:
            self._on_bytes(self._finished + received, self._total)


def _is_correct(path: Path, file: CheckpointFile) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.bytes:
        return False
    return file_sha256(path) == file.sha256


class _ParallelDigest:
    """SHA-256 of a file, computed in a thread while more of it arrives."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "dar-digest")
        self._next = bytearray()
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def add(self, piece: bytes) -> None:
        """The next bytes; waits while too many are not yet counted."""
        self._next += piece
        if len(self._next) >= _PIECE_BYTES:
            self._send()
        if len(self._waiting) > _PIECES_WAITING:
            self._waiting.popleft().result()

    def add_file(self, path: Path) -> None:
        """The bytes that a file has now."""
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                self.add(piece)

    def hex(self) -> str:
        """The digest of all bytes so far."""
        self._send()
        while self._waiting:
            self._waiting.popleft().result()
        return self._sha256.hexdigest()

    def _send(self) -> None:
        self._waiting.append(self._thread.submit(self._sha256.update, self._next))
        self._next = bytearray()
