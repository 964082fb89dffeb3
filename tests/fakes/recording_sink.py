"""A sink that records all reports, and a control that requests a stop."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dar.protocol.checkpoints import Manifest
from dar.protocol.metrics import is_reproducible
from dar.protocol.samples import ReportedSample
from dar.training.report.sink import StopKind


class RecordingSink:
    """Records all reports."""

    def __init__(self) -> None:
        self.reports: dict[int, dict[str, float]] = {}
        self.shown: dict[int, list[ReportedSample]] = {}
        self.events: list[tuple[str, str, Mapping[str, Any] | None]] = []
        self.requests: list[tuple[int, list[Any], list[Any]]] = []
        self.unfinished: dict[str, float] | None = None
        """Of the last report of requests."""
        self.phases: list[tuple[str, int, str | None]] = []
        self.published: list[tuple[int, Path, Manifest, str]] = []
        self.seq = 0

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.seq += 1
        self.reports.setdefault(step, {}).update(values)

    def samples(self, step: int, samples: Sequence[ReportedSample]) -> None:
        self.seq += 1
        self.shown[step] = list(samples)

    def rewards(
        self,
        step: int,
        requests: Sequence[Any],
        failures: Sequence[Any],
        unfinished: Mapping[str, float] | None = None,
    ) -> None:
        self.seq += 1
        self.unfinished = None if unfinished is None else dict(unfinished)
        self.requests.append((step, list(requests), list(failures)))

    def event(self, level: str, message: str, data: Mapping[str, Any] | None = None) -> None:
        self.seq += 1
        self.events.append((level, message, data))

    def phase(self, phase: str, step: int, message: str | None = None) -> None:
        self.phases.append((phase, step, message))

    def flush(self) -> int:
        return self.seq

    def checkpoint(self, step: int, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:
        self.published.append((step, folder, manifest, manifest_sha256))

    def deterministic_reports(self) -> dict[int, dict[str, float]]:
        """Without wall times, and without what depends on how requests were put together."""
        return {
            step: {name: value for name, value in values.items() if is_reproducible(name)}
            for step, values in self.reports.items()
        }


class ScriptedControl:
    """Requests something from the n-th question on."""

    def __init__(self, request: StopKind, after: Callable[[], bool]) -> None:
        self._request = request
        self._after = after

    def requested(self) -> StopKind | None:
        return self._request if self._after() else None
