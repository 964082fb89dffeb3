"""Download of files with known digests: resumable, verified, and never outside their folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from dar.client.transport import Transport, escaped
from dar.disk import file_sha256
from dar.errors import CheckpointError
from dar.protocol.checkpoints import CheckpointFile, FileName

_FILE_NAME: TypeAdapter[str] = TypeAdapter(FileName)


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
            self._transport.retried(lambda: self._receive(file, partial))
            if _is_correct(partial, file):
                partial.replace(target)
                return
            partial.unlink()
        raise CheckpointError(f"the downloaded {file.name} has another SHA-256; it was deleted")

    def _receive(self, file: CheckpointFile, partial: Path) -> None:
        """Append the missing bytes; `_fetch` verifies them."""
        start = partial.stat().st_size if partial.exists() else 0
        if start > 0 and start >= file.bytes:
            return
        headers = {"accept-encoding": "identity"}
        if start > 0:
            # Without If-Range: a store to which the service redirects knows another ETag, and the
            # digest is compared at the end.
            headers["range"] = f"bytes={start}-"
        name = "/".join(escaped(part) for part in file.name.split("/"))
        with self._transport.open("GET", f"{self._path}/{name}", headers=headers) as response:
            is_rest = response.status_code == 206
            received = start if is_rest else 0
            with partial.open("ab" if is_rest else "wb") as sink:
                for chunk in response.iter_bytes():
                    received += len(chunk)
                    if received > file.bytes:
                        break  # the file is wrong, and the response might never end
                    sink.write(chunk)
                    self._report(received)

    def _report(self, received: int) -> None:
        if self._on_bytes is not None:
            self._on_bytes(self._finished + received, self._total)


def _is_correct(path: Path, file: CheckpointFile) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.bytes:
        return False
    return file_sha256(path) == file.sha256
