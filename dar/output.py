"""Standard output of a command, on any terminal and any disk."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

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


@contextlib.contextmanager
def expendable_output() -> Iterator[None]:
    """Drop what cannot be written to stdout or stderr any more, and go on.

    For work that matters more than its output, whose reader, terminal or disk may be gone.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_expendable(one) for one in before)
    try:
        yield
    finally:
        for output in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                output.flush()
        sys.stdout, sys.stderr = before


def _expendable(output: TextIO) -> TextIO:
    try:
        raw = _Expendable(output.fileno(), "w", closefd=False)
    except (OSError, ValueError, AttributeError):  # it has no file
        return output
    with contextlib.suppress(OSError):
        output.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw), output.encoding, "backslashreplace", line_buffering=True
    )


class _Expendable(io.FileIO):
    """A file whose content may be lost."""

    def write(self, content: "ReadableBuffer") -> int:
        """Write all of it, or drop it."""
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in BROKEN:
                raise
            return memoryview(content).nbytes


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
