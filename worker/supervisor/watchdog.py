"""Notices a trainer that makes no progress, and ends it, so that its job starts again elsewhere.

Progress is any report of a phase (`AttemptFolder.progress`); while the model loads, also what the
trainer reads and writes. A phase has a limit for the time between two reports: ``stall_seconds``,
or ``stall_factor`` times the median of the phase so far if that is longer. Only time counts in
which the trainer itself is at work: not the wait for rewards, which has its own deadlines, nor that
for a service that does not respond, for a lease, or for room on a disk.
"""

import contextlib
import signal
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from dar.disk import read_if_there
from dar.protocol.worker import AttemptProgress, Phase
from worker.launch import STACKS_SIGNAL
from worker.supervisor.child_process import TrainerProcess
from worker.supervisor.state import AttemptState
from worker.supervisor.stopping import TERMINATION_SECONDS

log = structlog.get_logger(__name__)

WATCHED: frozenset[Phase] = frozenset(
    {"starting", "sampling", "training", "evaluating", "calibrating", "checkpointing"}
)
"""Phases in which the trainer itself is at work."""
LOOK_SECONDS = 0.5
"""Pause between two looks at the progress."""
LONGEST_LOOK_SECONDS = 5.0
"""A look counts at most this much: a worker that was frozen itself does not accuse its trainer."""
STACKS_SECONDS = 2.0
"""Time to write the stacks, before SIGTERM."""
DURATIONS_KEPT = 1000
LOADED_BYTES = 1024**2
"""A trainer that reads or writes this much while it starts makes progress."""


@dataclass(frozen=True, slots=True)
class Stall:
    """A phase that exceeded its limit."""

    phase: Phase
    step: int
    """Steps done."""
    limit_seconds: float

    @property
    def message(self) -> str:
        """A sentence for the user."""
        return (
            f"no progress: after step {self.step} the trainer was in phase {self.phase!r} for "
            f"longer than its limit of {self.limit_seconds:.0f} s; the stacks of its threads are "
            "in the worker's log of this attempt (DAR_STALL_SECONDS and DAR_STALL_FACTOR of the "
            "worker set the limits)"
        )


class Watchdog:
    """Watches one trainer.

    Args:
        state: Of the attempt.
        progress: What the trainer itself says that it does now.
        is_spool_full: Whether the trainer waits for room for its reports.
        shortest: `Settings.stall_seconds`.
        factor: `Settings.stall_factor`.
        clock: Seconds; replaced in tests.
    """

    def __init__(
        self,
        state: AttemptState,
        progress: Callable[[], AttemptProgress],
        is_spool_full: Callable[[], bool],
        *,
        shortest: float,
        factor: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stall: Stall | None = None
        """The phase because of which the trainer is ended; None: it makes progress."""
        self._state = state
        self._progress = progress
        self._is_spool_full = is_spool_full
        self._shortest = shortest
        self._factor = factor
        self._clock = clock
        self._seen: tuple[AttemptProgress, int] | None = None
        """The last report, and when its file was written."""
        self._looked_at = clock()
        self._counted_seconds = 0.0
        """Time since the last report that counts."""
        self._moved_bytes = 0
        self._durations: defaultdict[Phase, deque[float]] = defaultdict(
            partial(deque, maxlen=DURATIONS_KEPT)
        )
        self._stalled_at = 0.0
        self._is_terminated = False

    def enforce(self, trainer: TrainerProcess) -> None:
        """Take the next step that is due; called often while the trainer runs."""
        if self.stall is not None:
            self._end(trainer)
            return
        now = self._clock()
        passed = now - self._looked_at
        if passed < LOOK_SECONDS:
            return
        self._looked_at = now
        self.stall = self._look(trainer.pid, min(passed, LONGEST_LOOK_SECONDS))
        if self.stall is None:
            return
        log.error(
            "trainer makes no progress and is ended",
            phase=self.stall.phase,
            step=self.stall.step,
            limit_seconds=self.stall.limit_seconds,
        )
        self._stalled_at = now
        trainer.signal(STACKS_SIGNAL)
        trainer.signal(signal.SIGCONT)  # a stopped process writes no stacks

    def limit_of(self, phase: Phase) -> float:
        """Longest time between two reports of a phase, in seconds."""
        durations = self._durations[phase]
        usual = statistics.median(durations) if durations else 0.0
        return max(self._shortest, self._factor * usual)

    def _look(self, pid: int, passed: float) -> Stall | None:
        seen = (self._progress(), self._written_at())
        if seen != self._seen:
            if self._seen is not None and self._seen[0].phase in WATCHED:
                self._durations[self._seen[0].phase].append(self._counted_seconds)
            self._seen, self._counted_seconds = seen, 0.0
            return None
        progress = seen[0]
        if progress.phase not in WATCHED or self._is_waiting():
            return None
        if progress.phase == "starting" and self._has_loaded(pid):
            self._counted_seconds = 0.0
            return None
        self._counted_seconds += passed
        limit = self.limit_of(progress.phase)
        if self._counted_seconds <= limit:
            return None
        return Stall(progress.phase, progress.step, limit)

    def _is_waiting(self) -> bool:
        """Whether the trainer may rest for a reason that is not its own."""
        return self._state.is_service_away or self._state.is_parked or self._is_spool_full()

    def _written_at(self) -> int:
        """When the trainer last reported, also the same as before; 0: never."""
        with contextlib.suppress(FileNotFoundError):
            return self._state.folder.progress.stat().st_mtime_ns
        return 0

    def _has_loaded(self, pid: int) -> bool:
        """Whether the trainer has read or written much since this last returned True."""
        moved = bytes_moved(pid)
        if moved < self._moved_bytes + LOADED_BYTES:
            return False
        self._moved_bytes = moved
        return True

    def _end(self, trainer: TrainerProcess) -> None:
        waited = self._clock() - self._stalled_at
        if waited > STACKS_SECONDS + TERMINATION_SECONDS:
            trainer.signal(signal.SIGKILL)
        elif waited > STACKS_SECONDS and not self._is_terminated:
            trainer.signal(signal.SIGTERM)
            trainer.signal(signal.SIGCONT)
            self._is_terminated = True


def bytes_moved(pid: int) -> int:
    """Bytes that a process has read and written, also through mapped files; 0: not known."""
    content = None
    with contextlib.suppress(OSError):  # it has just ended, or belongs to another user
        content = read_if_there(Path(f"/proc/{pid}/io"))
    fields = dict(line.split(b": ") for line in (content or b"").splitlines())
    return sum(int(fields.get(name, 0)) for name in (b"rchar", b"wchar", b"read_bytes"))
