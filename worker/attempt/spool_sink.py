"""The sink of a trainer: everything it reports goes to the spool on the worker's disk."""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dar.disk import write_atomically
from dar.protocol.base import MAX_COUNT
from dar.protocol.checkpoints import Manifest
from dar.protocol.events import Level
from dar.protocol.reward_stats import ComponentRequests, FailedRequest
from dar.protocol.samples import ReportedSample
from dar.protocol.worker import (
    AttemptProgress,
    EventRow,
    MetricsRow,
    NewCheckpointRow,
    Phase,
    RewardsRow,
    SamplesRow,
)
from dar.training.report.sink import Sink
from worker.failures import AttemptFailure
from worker.folders import AttemptFolder
from worker.launch import SPOOL_BYTES, TrainerResult
from worker.spool import SCARCE, SEGMENT_BYTES, SpoolRoom, SpoolWriter

log = logging.getLogger(__name__)

SAMPLES_PER_ROW = 64
EVENT_LENGTH = 4000
PROGRESS_LENGTH = 2000
LOOK_SECONDS = 0.2
"""How often a trainer that waits looks whether there is room."""
SMALLEST_SEGMENT_BYTES = 64 * 1024
WITHIN_A_STEP = frozenset[Phase](("sampling", "waiting_for_reward", "training"))


def segment_bytes(limit_bytes: int) -> int:
    """Size of the segments of a spool with this limit; room comes back one segment at a time."""
    return max(SMALLEST_SEGMENT_BYTES, min(SEGMENT_BYTES, limit_bytes // 32))


def extremes(samples: Sequence[ReportedSample]) -> list[ReportedSample]:
    """The samples with the highest and the lowest reward; without rewards, the first one."""
    scored = [sample for sample in samples if sample.reward is not None]
    if not scored:
        return list(samples[:1])
    best = max(scored, key=lambda sample: sample.reward or 0.0)
    worst = min(scored, key=lambda sample: sample.reward or 0.0)
    return [best] if best is worst else [best, worst]


class SpoolSink(Sink):
    """Writes a trainer's reports to the attempt's folder; thread-safe.

    Metrics are never left out. While the spool is nearly full, because the service is away, samples
    are thinned; while it is full, the thread that reports metrics waits.

    Args:
        folder: Files of the attempt.
        total_steps: Last step of the job.
        limit_bytes: Largest size of the spool.
        is_stopping: Whether the trainer was ordered to stop; it does not wait then.
        rest: Called at the end of each step, after its metrics; returns when the next may begin.
    """

    def __init__(
        self,
        folder: AttemptFolder,
        total_steps: int = MAX_COUNT,
        *,
        limit_bytes: int = SPOOL_BYTES,
        is_stopping: Callable[[], bool] = lambda: False,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._total_steps = total_steps
        self._spool = SpoolWriter(folder.spool, segment_bytes=segment_bytes(limit_bytes))
        self._room = SpoolRoom(folder.spool, limit_bytes)
        self._is_stopping = is_stopping
        self._rest = rest
        self._phase: Phase = "starting"
        self._thinned = 0
        """Samples left out since the last event about them."""
        self._lock = threading.Lock()
        self._tokens: int | None = None
        """Tokens trained on up to the last report."""
        self._step = 0
        """The step that is being done, or the last one that was."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Store metrics of a step; infinity and NaN become null. Waits while it is parked."""
        if "train/tokens" in values:
            self._tokens = int(values["train/tokens"])
        self._step = step
        self._await_room(step)
        checked = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._spool.append(partial(MetricsRow, type="metrics", step=step, values=checked))
        self._rest()

    def samples(self, step: int, samples: Sequence[ReportedSample]) -> None:
        """Store some completions of a step; the best and the worst if the spool is nearly full."""
        samples = self._thin(step, samples)
        for start in range(0, len(samples), SAMPLES_PER_ROW):
            part = list(samples[start : start + SAMPLES_PER_ROW])
            self._spool.append(partial(SamplesRow, type="samples", step=step, samples=part))

    def rewards(
        self,
        step: int,
        requests: Sequence[ComponentRequests],
        failures: Sequence[FailedRequest],
        unfinished: Mapping[str, float] | None = None,
    ) -> None:
        """Store statistics of requests to reward services."""
        row = partial(RewardsRow, type="rewards", step=step)
        counts = None if unfinished is None else dict(unfinished)
        row = partial(row, requests=list(requests), failures=list(failures))
        self._spool.append(partial(row, unfinished=counts))

    def event(self, level: Level, message: str, data: Mapping[str, Any] | None = None) -> None:
        """Store a message for the user."""
        text, facts = message[:EVENT_LENGTH], None if data is None else dict(data)
        row = partial(EventRow, type="event", level=level, message=text, data=facts)
        self._spool.append(partial(row, step=self._step))

    def phase(self, phase: Phase, step: int, message: str | None = None) -> None:
        """Report the current phase; ``step`` counts the steps that are done."""
        self._phase = phase
        if phase in WITHIN_A_STEP:
            self._step = min(step + 1, self._total_steps)
        else:
            self._step = step
        shown = None if message is None else message[:PROGRESS_LENGTH]
        progress = AttemptProgress(phase=phase, step=step, tokens=self._tokens, message=shown)
        with self._lock:
            write_atomically(self._folder.progress, progress.model_dump_json().encode())

    def _thin(self, step: int, samples: Sequence[ReportedSample]) -> Sequence[ReportedSample]:
        if not self._room.is_scarce():
            if self._thinned:
                text = f"from step {step} on, all samples are kept again; {self._thinned} were not"
                self._thinned = 0
                self.event("info", text, {"kind": "spool_recovered", "step": step})
            return samples
        kept = extremes(samples)
        if len(kept) == len(samples):
            return samples
        if not self._thinned:
            text = (
                f"the reports that wait for the service fill over {SCARCE:.0%} of the "
                f"{self._room.limit_bytes:,} bytes that they may have on the worker's disk; from "
                f"step {step} on, only the best and the worst sample of a step are kept"
            )
            self.event("warn", text, {"kind": "spool_thinned", "step": step})
        self._thinned += len(samples) - len(kept)
        return kept

    def _await_room(self, step: int) -> None:
        """Wait while the spool is full, unless the trainer was ordered to stop."""
        if not self._room.is_full():
            return
        phase = self._phase
        message = (
            f"training waits: its reports fill the {self._room.limit_bytes:,} bytes that they may "
            "have on the worker's disk, and the service does not take them"
        )
        log.warning(message)
        self.phase(phase, step, message)
        while self._room.is_full() and not self._is_stopping():
            time.sleep(LOOK_SECONDS)
        log.warning("training goes on")
        self.phase(phase, step)
        self._step = step

    def flush(self) -> int:
        """Make all rows durable; returns their number."""
        return self._spool.flush()

    def checkpoint(self, step: int, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:  # noqa: ARG002 - the folder holds it
        """Queue a published checkpoint for upload."""
        row = partial(NewCheckpointRow, type="checkpoint", step=step, folder=folder.name)
        self._spool.append(partial(row, manifest_sha256=manifest_sha256))

    def close(self, failure: AttemptFailure | None = None) -> None:
        """Report how the trainer ended; nothing may be written afterwards."""
        self._spool.close()
        result = TrainerResult(last_seq=self._spool.last_seq)
        if failure is not None:
            result = TrainerResult(last_seq=self._spool.last_seq, **asdict(failure))
        write_atomically(self._folder.result, result.model_dump_json().encode())
