"""What a disk that takes no more means for a run: what is lost, what is whole, and what to do.

Libraries that are written in Rust raise exceptions of their own for a full disk, and none of them
says which folder it was.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from dar.protocol.checkpoints import checkpoint_folders

ADVICE: Mapping[int, str] = {
    errno.ENOSPC: "make space there",
    errno.EDQUOT: "make space there, or have the quota raised",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EIO: "look at the disk",
    errno.EROFS: "make the disk writable",
}
"""What to do, by the number of the error."""
_OF_RUST = re.compile(r"\(os error ([0-9]+)\)")


@contextlib.contextmanager
def explained(what: str, folder: Path, checkpoints: Path) -> Iterator[None]:
    """Say in one sentence what a disk that takes no more means.

    Args:
        what: What is written, for the sentence.
        folder: Where.
        checkpoints: Folder of the run's checkpoints, the newest of which is named.

    Raises:
        OSError: It could not be written; the number is that of the system.
    """
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None or number not in ADVICE:
            raise
        raise OSError(number, _sentence(number, what, folder, checkpoints)) from error


def _number(error: Exception) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _OF_RUST.search(str(error))
    return None if found is None else int(found[1])


def _sentence(number: int, what: str, folder: Path, checkpoints: Path) -> str:
    facts = []
    with contextlib.suppress(OSError):
        facts.append(f"{_size(shutil.disk_usage(folder).free)} are free")
    then = "start again, as there is no checkpoint"
    if whole := checkpoint_folders(checkpoints):
        files = (path for path in whole[-1].rglob("*") if path.is_file())
        facts.append(f"a checkpoint has {_size(sum(path.stat().st_size for path in files))}")
        then = f"continue with resume_from_checkpoint {whole[-1]}, which is complete"
    shown = f" ({', '.join(facts)})" if facts else ""
    why = f"{os.strerror(number)}{shown}"
    return f"{what} could not be written to {folder}: {why}; {ADVICE[number]}, then {then}"


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
