"""A dry run of a reward service: the first steps, those that a submission takes."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_probe import ProbeFinding, ProbeReport
from dar.protocol.reward_spec import RewardComponent
from dar.rewards.base import Failed, RewardContext, RewardResult, RewardSample
from dar.rewards.guard import EgressPolicy, check_url
from dar.rewards.http import HttpOptions, HttpReward

BUILT_IN = tuple(
    RewardSample(
        id=f"s{index}",
        group_id="g0",
        index=index,
        prompt="Say something nice about the weather.",
        messages=None,
        completion=completion,
        finish_reason="stop",
        completion_tokens=len(completion.split()),
    )
    for index, completion in enumerate(("The sun is out, and it is a lovely day.", ""))
)


@dataclass(frozen=True)
class ProbeTarget:
    """What is probed."""

    component: RewardComponent
    url: str
    secrets: Sequence[str] = field(default=(), repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    guard: EgressPolicy | None = None


async def probe(
    target: ProbeTarget, samples: Sequence[RewardSample] | None, *, light: bool
) -> ProbeReport:
    """Ask a reward service as a job would, and say what is wrong with it.

    Args:
        target: What is probed.
        samples: What is to be scored; None: two built-in completions.
        light: Only the steps that a submission takes.
    """
    del light
    started = time.perf_counter()
    try:
        if target.guard is not None:
            await asyncio.to_thread(check_url, target.url, target.guard)
        results = await _ask(target, samples or BUILT_IN)
    except RewardMisconfiguredError as error:
        step = 1 if error.error_code == "egress_denied" else 2
        return _report([ProbeFinding(code=error.error_code, step=step, detail=error.message)], None)
    errors = [
        ProbeFinding(code=result.code, step=2, detail=result.message)
        for result in results
        if isinstance(result, Failed)
    ]
    return _report(errors[:1], (time.perf_counter() - started) * 1000)


async def _ask(target: ProbeTarget, samples: Sequence[RewardSample]) -> list[RewardResult]:
    component = target.component
    options = HttpOptions(
        component.columns,
        component.batch,
        component.limits,
        component.timeouts,
        component.retry,
        headers=target.headers,
        guard=target.guard,
    )
    source = HttpReward(component.name, target.url, secrets=target.secrets, options=options)
    try:
        results = await source.score(samples, RewardContext(step=1, mode="validate"))
    finally:
        await source.aclose()
    return results


def _report(errors: list[ProbeFinding], milliseconds: float | None) -> ProbeReport:
    return ProbeReport(
        ok=not errors,
        errors=errors,
        warnings=[],
        latency_ms={"p50": milliseconds, "p95": milliseconds, "p99": milliseconds},
        determinism={"max_abs_diff": None},
        suggested={},
        exchange=[],
    )
