"""The interfaces of a trainer's reports (`Sink`) and of requests to stop (`Control`)."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from dar.protocol.checkpoints import Manifest
from dar.protocol.events import Level
from dar.protocol.reward_stats import ComponentRequests, FailedRequest
from dar.protocol.samples import ReportedSample
from dar.protocol.worker import Phase

log = logging.getLogger(__name__)
StopKind = Literal["cancel", "drain", "stop"]
"""``cancel``: stop as fast as possible. ``drain``: stop with a checkpoint, of the step before if
the present one waits for rewards. ``stop``: finish the step, then stop with its checkpoint."""
AFTER_STEP: tuple[StopKind | None, ...] = (None, "stop")
"""What does not interrupt a step."""


class Sink(Protocol):
    """Receives all reports of a trainer; a worker stores and sends them."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step, by registered name; finite numbers only."""

    def samples(self, step: int, samples: Sequence[ReportedSample]) -> None:
        """Some of the step's completions, for viewing."""

    def rewards(
        self,
        step: int,
        requests: Sequence[ComponentRequests],
        failures: Sequence[FailedRequest],
        unfinished: Mapping[str, float] | None = None,
    ) -> None:
        """Statistics of the requests to reward services since the last call.

        Args:
            step: The step.
            requests: Finished requests.
            failures: Those that failed.
            unfinished: Counts by metric name if training ended within the step, so that it has no
                metrics.
        """

    def event(self, level: Level, message: str, data: Mapping[str, Any] | None = None) -> None:
        """A message for the user."""

    def phase(self, phase: Phase, step: int, message: str | None = None) -> None:
        """The present phase, with the number of steps that are done; cheap, and not stored."""

    def flush(self) -> int:
        """Make all reports so far durable.

        Returns:
            The highest sequence number so far; 0 if there are none.
        """

    def checkpoint(self, step: int, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:
        """A checkpoint was published in ``folder``."""


class NullSink:
    """A sink that drops all reports: that of the other processes of a run."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def samples(self, step: int, samples: Sequence[ReportedSample]) -> None:
        pass

    def rewards(
        self,
        step: int,
        requests: Sequence[ComponentRequests],
        failures: Sequence[FailedRequest],
        unfinished: Mapping[str, float] | None = None,
    ) -> None:
        pass

    def event(self, level: Level, message: str, data: Mapping[str, Any] | None = None) -> None:
        pass

    def phase(self, phase: Phase, step: int, message: str | None = None) -> None:
        pass

    def flush(self) -> int:
        return 0

    def checkpoint(self, step: int, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:
        pass


class LogSink(NullSink):
    """Logs warnings and errors, and drops all else: the default outside a service."""

    def event(self, level: Level, message: str, data: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002 - data is for machines
        """Log a message that a user should see."""
        if level in ("warn", "error"):
            log.log(logging.WARNING if level == "warn" else logging.ERROR, message)


class Control(Protocol):
    """Requests to stop training. Polled often, so it must be cheap."""

    def requested(self) -> StopKind | None:
        """The request, or None to continue."""


class NullControl:
    """Never requests a stop."""

    def requested(self) -> StopKind | None:
        return None


class StopRequestedError(Exception):
    """A stop was requested within a step; the unfinished step is dropped."""


def check(control: Control) -> None:
    """Raise if a stop is requested that does not wait for the end of the step.

    Raises:
        StopRequestedError: A stop is requested.
    """
    if control.requested() not in AFTER_STEP:
        raise StopRequestedError
