"""What a dry run of a reward service found."""

from typing import Any

from dar.protocol.base import Output


class ProbeFinding(Output):
    """Something that a probe found."""

    code: str
    """Machine-readable kind, like ``contract.length`` or ``egress_denied``."""
    step: int
    """Which step of the probe found it."""
    detail: str


class ProbeReport(Output):
    """What a probe found."""

    ok: bool
    errors: list[ProbeFinding]
    warnings: list[ProbeFinding]
    latency_ms: dict[str, float | None]
    determinism: dict[str, float | None]
    suggested: dict[str, Any]
    exchange: list[dict[str, Any]]
