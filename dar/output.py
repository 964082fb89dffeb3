"""Standard output of a command, on any terminal and any disk."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

BROKEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EPIPE})
"""Errors of a write that another line of output would only repeat."""
EXIT_UNWRITTEN = 1


@contextlib.contextmanager
def written_output(command: str) -> Iterator[None]:
    """Write what a command prints, though its output lacks some characters or takes no more.

    A character that the output cannot carry is written as an escape. If nothing can be written, the
    process ends with one sentence on stderr.

    Args:
        command: Its name, for the sentence.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        is_of_output = error.errno in BROKEN and error.filename is None
        outputs = (sys.stdout, sys.stderr) if is_of_output else ()
        broken = next((one for one in outputs if not _takes_more(one)), None)
        if broken is None:
            raise
        with contextlib.suppress(OSError):
            if error.errno != errno.EPIPE:  # the reader wanted no more
                sys.stderr.write(f"{command}: the output cannot be written: {error.strerror}\n")
        _discard(broken)
        sys.exit(EXIT_UNWRITTEN)


def _takes_more(output: TextIO | None) -> bool:
    """Whether another line can be written. A flush alone finds nothing in an unbuffered output."""
    try:
        if output is not None:
            output.write("\n")
            output.flush()
    except OSError:
        return False
    return True


def _discard(output: TextIO) -> None:
    """Send the rest of ``output`` nowhere: Python would report it again when it ends."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), output.fileno())
