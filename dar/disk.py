"""Files on disk: digests, and writes that survive a kill or a power loss.

A file that is renamed into its place is durable once the file and its folder are synced.
"""

import errno
import hashlib
import os
from pathlib import Path

from dar.errors import ConfigurationError

PRIVATE = 0o077
"""``umask`` of every process of an installation: only its user reads the files that it makes."""


OTHER_FOLDER_HINT = "give a folder that you may write to with"
OTHER_HOME_HINT = f"{OTHER_FOLDER_HINT} --home or DAR_HOME"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path, advice: str) -> None:
    """Make a folder of an installation, with its parents, unless it exists.

    Args:
        folder: The folder.
        advice: What to do if it cannot be used, for the message.

    Raises:
        ConfigurationError: It cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        why = "it is not a folder, or lies below a file" if is_file else str(error.strerror).lower()
        raise ConfigurationError(f"{folder} cannot be used: {why}; {advice}") from None


def sync(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder durable, with all that it contains."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_atomically(path: Path, content: bytes, *, is_durable: bool = False) -> None:
    """Replace ``path`` so that a reader sees the old content or the new one, never a part.

    Args:
        path: The file.
        content: All of it.
        is_durable: Whether this must hold after a power loss.
    """
    fresh = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with fresh.open("wb") as file:
        file.write(content)
        if is_durable:
            file.flush()
            os.fsync(file.fileno())
    fresh.replace(path)


def link_out_of(folder: Path) -> str | None:
    """Find the first entry of ``folder``, at any depth, that is a link to a place outside.

    A link inside the folder is allowed, and so is ``folder`` itself. If that leads to a snapshot in
    the cache of a hub, links to its ``blobs`` are allowed too. Hidden entries are left out, as
    nothing reads them.

    Returns:
        Its path in the folder; None: there is no such link.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.with_name("blobs"))
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (*folders, *sorted(files)):
            path = Path(place, name)
            if name.startswith(".") or not path.is_symlink():
                continue
            target = Path(os.path.realpath(path))  # unlike `resolve`, it accepts a circle of links
            if not any(target.is_relative_to(one) for one in allowed):
                return path.relative_to(root).as_posix()
    return None


def read_if_there(path: Path) -> bytes | None:
    """Content of ``path``; None if there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
