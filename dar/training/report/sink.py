"""Where a trainer says what it does, and where it asks whether it should go on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from dar.protocol.checkpoints import Manifest
from dar.protocol.events import Level
from dar.protocol.reward_stats import ComponentRequests, FailedRequest
from dar.protocol.samples import ReportedSample
from dar.protocol.worker import Phase

Request = Literal["cancel", "drain"]


class Sink(Protocol):
    """Takes everything that a trainer has to say; a worker makes it durable and sends it on."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step, by registered name; finite numbers only."""
        ...

    def samples(self, step: int, samples: Sequence[ReportedSample]) -> None:
        """Some of the step's completions, for viewing."""
        ...

    def rewards(
        self,
        step: int,
        requests: Sequence[ComponentRequests],
        failures: Sequence[FailedRequest],
    ) -> None:
        """How requests to reward services went since the last call."""
        ...

    def event(self, level: Level, message: str, data: Mapping[str, Any] | None = None) -> None:
        """Something worth telling the user."""
        ...

    def phase(self, phase: Phase, step: int, message: str | None = None) -> None:
        """What is being done now, for which step; cheap and volatile."""
        ...

    def flush(self) -> int:
        """Make everything said so far durable.

        Returns:
            The highest sequence number so far; 0 where there are none.
        """
        ...

    def checkpoint(self, step: int, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:
        """A checkpoint was published in ``folder``."""
        ...


class NullSink:
    """A sink that drops everything: the default outside a service."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Drop it."""

    def samples(self, step: int, samples: Sequence[ReportedSample]) -> None:
        """Drop it."""

    def rewards(
        self,
        step: int,
        requests: Sequence[ComponentRequests],
        failures: Sequence[FailedRequest],
    ) -> None:
        """Drop it."""

    def event(self, level: Level, message: str, data: Mapping[str, Any] | None = None) -> None:
        """Drop it."""

    def phase(self, phase: Phase, step: int, message: str | None = None) -> None:
        """Drop it."""

    def flush(self) -> int:
        """Nothing is kept, so nothing is counted."""
        return 0

    def checkpoint(self, step: int, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:
        """Drop it."""


class Control(Protocol):
    """Says whether training should stop. Asked often, so it must be cheap."""

    def requested(self) -> Request | None:
        """``cancel``: leave as fast as possible. ``drain``: leave with a checkpoint. None: go on."""
        ...


class NullControl:
    """Never asks for a stop."""

    def requested(self) -> Request | None:
        """Go on."""
        return None


class StopRequestedError(Exception):
    """Training was asked to stop between two step edges; what was begun is dropped."""


def check(control: Control) -> None:
    """Leave if a stop is requested.

    Raises:
        StopRequestedError: It is.
    """
    if control.requested() is not None:
        raise StopRequestedError
