"""The report of a probe, which is a dry run of a reward service."""

from typing import Any, Literal

from pydantic import Field

from dar.protocol.base import Output


class ProbeFinding(Output):
    """One error or warning of a probe."""

    code: str
    """Machine-readable kind, like ``contract.length`` or ``egress_denied``."""
    step: int
    """The step that found it, from 1 to 9."""
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
    """What was measured, or why the step was skipped."""


class ProbeMessage(Output):
    """A request or an answer, without secrets."""

    status: int | None = None
    """Status of an answer; None for a request."""
    headers: dict[str, str]
    body: str
    """The first 4096 characters."""
    bytes: int | None = None
    """Length of the whole body; None: not read completely."""


class ProbeExchange(Output):
    """One request and its answer."""

    step: int
    request: ProbeMessage
    response: ProbeMessage | None
    """None: no answer."""


class ProbeReport(Output):
    """The report of a probe."""

    ok: bool
    """True if there are no errors; warnings are allowed."""
    errors: list[ProbeFinding]
    """What keeps a job from getting rewards."""
    warnings: list[ProbeFinding]
    """What makes rewards worse, slower or less safe."""
    steps: list[ProbeStep] = Field(default_factory=list)
    """All nine, in order."""
    latency_ms: dict[str, float | None]
    """``p50``, ``p95`` and ``p99`` of full requests under load; of all other requests if step 5 was
    skipped."""
    determinism: dict[str, float | None]
    """``max_abs_diff``: the largest difference between two rewards of one completion; null: not
    measured, or only one of the two was a reward. ``same_id_max_abs_diff``: the same for a request
    that was sent twice under one id."""
    suggested: dict[str, Any]
    """Fields of a component that fit the measurement, and ``hint``, which says how many requests a
    training needs in flight."""
    exchange: list[ProbeExchange]
    """The first request with its answer, and those of findings."""
