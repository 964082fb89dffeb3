"""How much of its limit a spool takes on the worker's disk.

A spool grows while the service is away. Its reader, another process, deletes a segment when the
service has all its rows. So the sizes of the files say how much waits.
"""

import time
from pathlib import Path

from worker.spool import SEGMENT_BYTES

SCARCE = 0.8
"""Part of the limit from which samples are thinned."""
MEASURE_SECONDS = 0.5
SMALLEST_SEGMENT_BYTES = 64 * 1024


def segment_bytes(limit_bytes: int) -> int:
    """Size of the segments of a spool with this limit; room comes back one segment at a time."""
    return max(SMALLEST_SEGMENT_BYTES, min(SEGMENT_BYTES, limit_bytes // 32))


class SpoolRoom:
    """Measures a spool, at most twice a second.

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
