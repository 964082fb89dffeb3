"""The spool: a trainer's reports, durable on the worker's disk until the service committed them.

The trainer appends (`SpoolWriter`), its supervisor reads and sends (`SpoolReader`). A row is one
line: the CRC32 of its JSON in eight hex digits, a space, the JSON. Rows are numbered from 1 without
gaps. Lines go to segments named by their first number. A segment is deleted when all its rows are
acknowledged. An incomplete last line does not count as a row.
"""

import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

import orjson
from pydantic import BaseModel
from pydantic_core import to_json

from dar.disk import read_if_there, sync, write_atomically
from dar.errors import DARError
from dar.protocol.worker import Row

SEGMENT_BYTES = 4 * 1024**2
SYNC_SECONDS = 1.0
BATCH_ROWS = 500
BATCH_BYTES = 1024**2
SCARCE = 0.8
"""Part of the limit from which samples are thinned."""
MEASURE_SECONDS = 0.5
NUL, REPLACEMENT = "\0", "\N{REPLACEMENT CHARACTER}"
_ESCAPED_NUL = b"\\u0000"
_LINE = re.compile(rb"([0-9a-f]{8}) (.*)", re.DOTALL)


class SpoolDamagedError(DARError):
    """A line of a spool is altered or missing."""

    code = "spool_damaged"
    retryable = False


def encode(model: BaseModel) -> bytes:
    """``model`` as JSON, with U+FFFD in place of NUL in all texts and keys.

    Models, reward services and crash logs may produce NUL, which no text column of a database can
    store.
    """
    content = model.model_dump_json().encode()
    if _ESCAPED_NUL not in content:
        return content
    return to_json(_without_nul(model.model_dump(mode="json")))


def _without_nul(value: object) -> object:
    if isinstance(value, str):
        return value.replace(NUL, REPLACEMENT)
    if isinstance(value, dict):
        return {_without_nul(key): _without_nul(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nul(item) for item in value]
    return value


def frame(payload: bytes) -> bytes:
    """The line for ``payload``, which must not contain a newline."""
    return b"%08x %s\n" % (zlib.crc32(payload), payload)


def unframe(line: bytes) -> bytes:
    """The payload of a line without its newline.

    Raises:
        SpoolDamagedError: `frame` did not make this line.
    """
    match = _LINE.fullmatch(line)
    if match is None or int(match[1], 16) != zlib.crc32(match[2]):
        raise SpoolDamagedError(f"a line of the spool is damaged: {line[:80]!r}")
    return match[2]


def _segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def _lines(segment: Path, offset: int) -> Iterator[tuple[bytes, int]]:
    """Payload and end offset of each complete line from ``offset`` on."""
    with segment.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield unframe(line[:-1]), offset


class SpoolWriter:
    """Appends rows. Safe to use from several threads; written bytes reach the disk within a second.

    Args:
        folder: Folder of the segments, for one writer at a time. The writer continues after the
            rows of a dead predecessor.
        segment_bytes: Size at which a new segment begins.
    """

    def __init__(self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._is_dirty = False
        self._sync_error: OSError | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._next, self._file, self._size = self._recover()
        self._syncer = threading.Thread(target=self._sync_often, name="spool-sync", daemon=True)
        self._syncer.start()

    def _recover(self) -> tuple[int, FileIO, int]:
        segments = _segments(self._folder)
        if not segments:
            return (1, *self._open(1))
        segment, size, following = segments[-1], 0, int(segments[-1].stem)
        try:
            for _, end in _lines(segment, 0):
                size, following = end, following + 1
        except SpoolDamagedError:
            # power was lost while the line was written: it does not count, like an incomplete one
            pass
        file = segment.open("r+b", buffering=0)
        file.truncate(size)
        file.seek(size)
        return following, file, size

    def _open(self, first: int) -> tuple[FileIO, int]:
        file = (self._folder / f"{first:012d}.jsonl").open("xb", buffering=0)
        sync(self._folder)
        return file, 0

    def append(self, make: Callable[..., Row]) -> int:
        """Append the row that ``make`` builds from its number and the current time.

        Args:
            make: Called with ``seq``, and with ``at`` in seconds since 1970.

        Returns:
            The row's number.

        Raises:
            OSError: The disk is full or broken; no part of the row is kept.
        """
        with self._lock:
            if self._sync_error is not None:
                raise self._sync_error
            seq = self._next
            line = frame(encode(make(seq=seq, at=datetime.now(UTC).timestamp())))
            if self._size and self._size + len(line) > self._segment_bytes:
                self._sync()
                self._file.close()
                self._file, self._size = self._open(seq)
            self._write(line)
            self._next += 1
            self._is_dirty = True
            return seq

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise
        self._size += len(line)

    def _sync(self) -> None:
        if self._is_dirty:
            os.fsync(self._file.fileno())
            self._is_dirty = False

    def _sync_often(self) -> None:
        while not self._closed.wait(SYNC_SECONDS):
            with self._lock:
                try:
                    self._sync()
                # the kernel dropped the pages: a second fsync would succeed without them
                except OSError as error:
                    self._sync_error = error
                    return

    def flush(self) -> int:
        """Make every row durable.

        Returns:
            The number of the last one; 0 if there is none.

        Raises:
            OSError: The disk failed.
        """
        with self._lock:
            if self._sync_error is not None:
                raise self._sync_error
            self._sync()
            return self.last_seq

    @property
    def last_seq(self) -> int:
        """Number of the last row; 0 if there is none."""
        return self._next - 1

    def close(self) -> None:
        """Make every row durable and end the thread."""
        if not self._closed.is_set():
            self._closed.set()
            self._syncer.join()
            self.flush()
            self._file.close()


@dataclass(frozen=True, slots=True)
class SpooledRow:
    """A row of the spool."""

    seq: int
    type: str
    payload: bytes
    """Its JSON."""
    segment: Path
    end: int
    """Offset after its line."""


class SpoolReader:
    """Reads rows that are not acknowledged yet, while a writer appends or after it died.

    The number of the last acknowledged row is on disk, so that a new reader continues after it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mark = folder / "acked"
        self.acked = int(read_if_there(self._mark) or 0)
        """Number of the last acknowledged row."""
        self._at: tuple[Path | None, int] = (None, 0)
        self._read: list[SpooledRow] = []

    def read(self, max_rows: int = BATCH_ROWS, max_bytes: int = BATCH_BYTES) -> list[SpooledRow]:
        """The rows after the last acknowledged one, in order; at least one if there is any.

        Rows before a damaged line are still returned. The error is raised once they are
        acknowledged.

        Args:
            max_rows: Largest number of rows.
            max_bytes: Largest number of bytes of JSON, unless the first row alone has more.

        Raises:
            SpoolDamagedError: The next line is damaged or its number is missing.
        """
        self._read, size = [], 0
        try:
            for row in self._following():
                size += len(row.payload)
                if self._read and (len(self._read) >= max_rows or size > max_bytes):
                    break
                self._read.append(row)
        except SpoolDamagedError:
            if not self._read:
                raise
        return self._read

    def _following(self) -> Iterator[SpooledRow]:
        current, offset = self._at
        expected = self.acked + 1
        for segment in _segments(self._folder):
            if current is not None and segment < current:
                continue
            for payload, end in _lines(segment, offset if segment == current else 0):
                row = orjson.loads(payload)
                if row["seq"] < expected:
                    continue
                if row["seq"] > expected:
                    raise SpoolDamagedError(
                        f"the spool lacks row {expected}: {segment} has {row['seq']} instead"
                    )
                expected += 1
                yield SpooledRow(row["seq"], row["type"], payload, segment, end)

    def ack(self, seq: int) -> None:
        """Skip rows up to ``seq`` from now on, and delete the segments that hold no others."""
        if seq <= self.acked:
            return
        self.acked = seq
        write_atomically(self._mark, b"%d" % seq, is_durable=True)
        done = [row for row in self._read if row.seq <= seq]
        if done:
            self._at = (done[-1].segment, done[-1].end)
            self._delete_before(done[-1].segment)

    def _delete_before(self, segment: Path) -> None:
        done = [path for path in _segments(self._folder) if path < segment]
        if done:
            # Otherwise a power loss could undo the mark and keep the deletion.
            sync(self._folder)
        for path in done:
            path.unlink(missing_ok=True)


class SpoolRoom:
    """Measures how much of its limit a spool takes on the worker's disk, at most twice a second.

    A spool grows while the service is away. Its reader, another process, deletes a segment when the
    service has all its rows. So the sizes of the files say how much waits.

    Args:
        folder: Folder of its segments.
        limit_bytes: Its largest size.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self.limit_bytes = limit_bytes
        self._measured_at = -MEASURE_SECONDS
        self._size = 0

    def _used(self) -> float:
        now = time.monotonic()
        if now - self._measured_at >= MEASURE_SECONDS:
            self._size = sum(_size(path) for path in self._folder.glob("*.jsonl"))
            self._measured_at = now
        return self._size / self.limit_bytes

    def is_scarce(self) -> bool:
        """Whether samples should be thinned."""
        return self._used() >= SCARCE

    def is_full(self) -> bool:
        """Whether training should wait."""
        return self._used() >= 1.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # its rows were acknowledged
        return 0
