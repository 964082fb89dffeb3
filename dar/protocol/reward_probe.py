"""What a dry run of a reward service found."""

from typing import Any, Literal

from pydantic import Field

from dar.protocol.base import Output


class ProbeFinding(Output):
    """Something that a probe found."""

    code: str
    """Machine-readable kind, like ``contract.length`` or ``egress_denied``."""
    step: int
    """Which step of the probe found it, from 1 to 9."""
    detail: str
    """What was seen."""
    advice: str = ""
    """What to do about it."""


class ProbeStep(Output):
    """How one step of a probe ended."""

    step: int
    name: str
    status: Literal["ok", "warn", "fail", "skipped"]
    detail: str
    """What was measured, or why the step was left out."""


class ProbeMessage(Output):
    """A request or an answer, without secrets."""

    status: int | None = None
    """Of an answer; None for a request."""
    headers: dict[str, str]
    body: str
    """Its first 4096 characters."""
    bytes: int | None = None
    """Length of the whole body; None: not all of it was read."""


class ProbeExchange(Output):
    """One request that was made, and what came back."""

    step: int
    request: ProbeMessage
    response: ProbeMessage | None
    """None: no answer came."""


class ProbeReport(Output):
    """What a probe found."""

    ok: bool
    """Whether there are no errors; there may be warnings."""
    errors: list[ProbeFinding]
    """What keeps a job from getting rewards."""
    warnings: list[ProbeFinding]
    """What makes them worse, slower or less safe than they could be."""
    steps: list[ProbeStep] = Field(default_factory=list)
    """All nine, in order."""
    latency_ms: dict[str, float | None]
    """``p50``, ``p95`` and ``p99`` of full requests under load; of the few that were made where that step was left out."""
    determinism: dict[str, float | None]
    """``max_abs_diff``: the largest difference between two rewards of one completion; null: not measured, or once there was a reward
    and once there was none. ``same_id_max_abs_diff``: when the very same request was sent again."""
    suggested: dict[str, Any]
    """Fields of a component that fit what was measured, and ``hint``, a sentence on how many requests a training needs in flight."""
    exchange: list[ProbeExchange]
    """Requests and answers that show what was found: the first one, and those of findings."""
