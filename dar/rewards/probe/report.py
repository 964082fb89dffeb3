"""What a probe has found so far, and the report that it becomes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from dar.protocol.reward_probe import ProbeExchange, ProbeFinding, ProbeReport, ProbeStep
from dar.rewards.base import RewardResult, Scored
from dar.rewards.probe.advice import advice_for
from dar.rewards.probe.client import Asked, Line
from dar.rewards.scoring.step_report import quantile

NAMES = {
    1: "address",
    2: "answer",
    3: "determinism",
    4: "order",
    5: "load",
    6: "signature",
    7: "unusual texts",
    8: "spread",
    9: "later results",
}
MAX_EXCHANGES = 8
MAX_DETAIL = 1000
"""Characters of a finding's text; it may quote what a service said."""
SAME = 1e-6
"""Rewards that differ by no more are the same."""


class Notes:
    """Collects findings; ``step`` is the one that is being taken."""

    def __init__(self) -> None:
        self.step = 1
        self.line: Line | None = None
        self.latencies: Sequence[float] = ()
        """Seconds of full requests under load, or of those that were made."""
        self.noise: float | None = None
        """Largest difference of two rewards of one completion; None: not known."""
        self.same_id_noise: float | None = None
        self.suggested: dict[str, Any] = {}
        self._errors: list[ProbeFinding] = []
        self._warnings: list[ProbeFinding] = []
        self._details: dict[int, str] = {}
        self._skipped: dict[int, str] = {}
        self._exchanges: list[ProbeExchange] = []

    @property
    def has_errors(self) -> bool:
        """Whether a job could not get rewards."""
        return bool(self._errors)

    def error(self, code: str, detail: str, asked: Asked | None = None) -> None:
        """Note what keeps a job from getting rewards."""
        self._errors.append(self._finding(code, detail, asked))

    def warn(self, code: str, detail: str, asked: Asked | None = None) -> None:
        """Note what makes rewards worse, slower or less safe."""
        self._warnings.append(self._finding(code, detail, asked))

    def failed(self, asked: Asked) -> None:
        """Note a request without rewards."""
        assert asked.failure is not None
        code = asked.code
        if code == "callback_late":
            code = "async.no_result"
        self.error(code, asked.failure.full_reason, asked)

    def done(self, detail: str) -> None:
        """The step has been taken."""
        self._details[self.step] = self._told(detail)

    def skip(self, why: str) -> None:
        """The step cannot be taken."""
        self._skipped[self.step] = why

    def show(self, asked: Asked) -> None:
        """Keep a request and its answer for the report."""
        if self.line is not None and len(self._exchanges) < MAX_EXCHANGES:
            self._exchanges.append(self.line.exchange(self.step, asked))

    def report(self) -> ProbeReport:
        """What was found."""
        ordered = sorted(self.latencies)
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        return ProbeReport(
            ok=not self._errors,
            errors=self._errors,
            warnings=sorted(self._warnings, key=lambda finding: finding.step),
            steps=[self._step(number) for number in NAMES],
            latency_ms={
                name: round(quantile(ordered, share) * 1000, 3) if ordered else None
                for name, share in shares.items()
            },
            determinism={
                "max_abs_diff": _finite(self.noise),
                "same_id_max_abs_diff": _finite(self.same_id_noise),
            },
            suggested=self.suggested,
            exchange=sorted(self._exchanges, key=lambda exchange: exchange.step),
        )

    def _finding(self, code: str, detail: str, asked: Asked | None) -> ProbeFinding:
        if asked is not None:
            self.show(asked)
        told = self._told(detail)
        return ProbeFinding(code=code, step=self.step, detail=told, advice=advice_for(code))

    def _told(self, text: str) -> str:
        return (text if self.line is None else self.line.redact(text))[:MAX_DETAIL]

    def _step(self, number: int) -> ProbeStep:
        found = {
            finding.step: status
            for status, findings in (("warn", self._warnings), ("fail", self._errors))
            for finding in findings
        }
        status: Literal["ok", "warn", "fail", "skipped"] = "skipped"
        detail = self._skipped.get(number, "an earlier step failed")
        if number in found:
            status = "fail" if found[number] == "fail" else "warn"
            detail = self._details.get(number, "")
        elif number in self._details:
            status, detail = "ok", self._details[number]
        return ProbeStep(step=number, name=NAMES[number], status=status, detail=detail)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def difference(first: RewardResult, second: RewardResult) -> float:
    """How far two results of one completion are apart; infinite where only one of them is a reward."""
    if isinstance(first, Scored) and isinstance(second, Scored):
        return abs(first.reward - second.reward)
    return 0.0 if type(first) is type(second) else math.inf


def largest_difference(
    first: Mapping[str, RewardResult], second: Mapping[str, RewardResult]
) -> float:
    """The largest difference between results by id; those of ``second`` decide which are compared."""
    return max((difference(first[name], result) for name, result in second.items()), default=0.0)


def in_words(distance: float) -> str:
    """A difference of two rewards, for people."""
    return f"{distance:.3g}" if math.isfinite(distance) else "a reward once and none the other time"


def rewards_in(results: Iterable[RewardResult]) -> list[float]:
    """Those that are rewards."""
    return [result.reward for result in results if isinstance(result, Scored)]
