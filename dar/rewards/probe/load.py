"""Step 5 of a probe: full requests at full concurrency, and settings that fit the result."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dar.protocol.hints import HINTS
from dar.protocol.reward_spec import RewardComponent
from dar.rewards.base import RewardSample
from dar.rewards.probe.client import ProbeCall
from dar.rewards.probe.report import ReportBuilder
from dar.rewards.probe.steps import ProbeSession
from dar.rewards.scoring.step_report import quantile

CALLS = 20
LOAD_SECONDS = 90.0
"""No request starts later than this."""
GROUP = 4
WORDS = 500
"""Words in a built-in completion."""
LONGEST_PAUSE = 5.0
"""Most seconds to wait for a ``Retry-After`` after the load."""
SHORTEST_ATTEMPT = 5
"""Fewest seconds that are suggested for an attempt: a service may be slower later."""
EXAMPLE = {"prompts": 32, "completions": 4, "seconds": 30.0}


@dataclass(frozen=True, slots=True)
class Load:
    """The measured requests."""

    samples: int
    """Number of samples in each request."""
    alone: ProbeCall
    """The first request, sent alone."""
    concurrent: Sequence[ProbeCall]
    """The requests after it, several at once."""
    seconds: float
    """Duration of the concurrent requests."""

    @property
    def all(self) -> list[ProbeCall]:
        """All requests."""
        return [self.alone, *self.concurrent]

    @property
    def latencies(self) -> list[float]:
        """Sorted seconds of the answered requests."""
        return sorted(one.seconds for one in self.all if one.failure is None)

    @property
    def codes(self) -> Counter[str]:
        """Count of each failure."""
        return Counter(one.code for one in self.all if one.failure is not None)

    @property
    def throttled(self) -> int:
        """Requests rejected with 429 or 503."""
        return sum(one.failure is not None and one.failure.status in {429, 503} for one in self.all)


async def check_load(session: ProbeSession, component: RewardComponent) -> None:
    """Send full requests, as many at once as the component allows."""
    report, concurrency = session.report, component.limits.concurrency
    load = await _measure(session, concurrency)
    latencies, codes = load.latencies, load.codes
    if latencies:
        report.latencies = latencies
        report.suggested = suggestions(component, load)
    failed = codes.total()
    if failed:
        _report_failures(session, load)
    if latencies:
        _report_slowness(report, component, load)
        p50, p95 = quantile(latencies, 0.5), quantile(latencies, 0.95)
        report.done(
            f"{len(load.all)} requests of {load.samples} samples, {concurrency} at once: "
            f"p50 {p50 * 1000:.0f} ms, p95 {p95 * 1000:.0f} ms, {failed} failed"
        )
    await asyncio.sleep(min(session.client.retry_after_seconds, LONGEST_PAUSE))


def _report_failures(session: ProbeSession, load: Load) -> None:
    report, codes = session.report, load.codes
    failed, calls = codes.total(), len(load.all)
    counts = ", ".join(f"{code} {count}" for code, count in codes.most_common())
    text = f"{failed} of {calls} full requests failed: {counts}"
    worst = codes.most_common(1)[0][0]
    example = next(one for one in load.all if one.code == worst)
    if load.throttled:
        report.warn("load.throttled", text, example)
    elif failed <= HINTS.probe_failed * calls:
        report.warn("load.errors", text, example)
    if failed > HINTS.probe_failed * calls and (not load.throttled or failed == calls):
        report.error(worst, text, None if load.throttled else example)


def _report_slowness(report: ReportBuilder, component: RewardComponent, load: Load) -> None:
    latencies = load.latencies
    p50, p95 = quantile(latencies, 0.5), quantile(latencies, 0.95)
    attempt = component.timeouts.attempt
    if p95 > attempt / 2:
        report.warn("load.slow", f"p95 is {p95:.1f} s; an attempt times out after {attempt:g} s")
    useful = _useful_concurrency(load)
    if useful is not None and useful < component.limits.concurrency:
        report.warn(
            "load.queueing",
            f"one request alone takes {load.alone.seconds:.2f} s, one of "
            f"{component.limits.concurrency} at once {p50:.2f} s: the service works on about "
            f"{useful} at a time",
        )


def _useful_concurrency(load: Load) -> int | None:
    """Requests in service at once, by Little's law; None: load did not slow it."""
    answered = sum(one.failure is None for one in load.concurrent)
    slow = max(HINTS.probe_noticed_seconds, HINTS.probe_queueing * load.alone.seconds)
    is_slowed = quantile(load.latencies, 0.5) > slow
    if load.alone.failure is not None or not answered or not is_slowed:
        return None
    return max(1, math.ceil(load.alone.seconds * answered / load.seconds))


def suggestions(component: RewardComponent, load: Load) -> dict[str, Any]:
    """Settings of the component that fit the load, which has at least one latency."""
    latencies, concurrency = load.latencies, component.limits.concurrency
    p50, p99 = quantile(latencies, 0.5), quantile(latencies, 0.99)
    if load.throttled:
        concurrency = max(1, concurrency // 2)
    concurrency = min(concurrency, _useful_concurrency(load) or concurrency)
    attempt = float(min(3600, max(SHORTEST_ATTEMPT, math.ceil(3 * p99))))
    size = load.samples
    if size > 1 and (load.codes["http_413"] or p50 > component.timeouts.attempt / 2):
        size //= 2
    return {
        "limits": {"concurrency": concurrency},
        "timeouts": {
            "read": min(600.0, attempt),
            "attempt": attempt,
            "deadline": min(3600.0, max(component.timeouts.deadline, 5 * attempt)),
        },
        "batch": {"max_samples": size},
        "hint": f"{_hint(p50, size)} {_reason_of_attempt(p99, attempt)}",
    }


def _hint(latency: float, size: int) -> str:
    """Little's formula, times `capacity_margin` for varying latencies."""
    samples = EXAMPLE["prompts"] * EXAMPLE["completions"]
    margin = HINTS.capacity_margin
    needed = max(1, math.ceil(margin * latency * samples / size / EXAMPLE["seconds"]))
    return (
        f"Requests in flight that hide the latency: {margin:g} x {latency:.3g} s x samples per step / "
        f"{size} / T, where T is the time in seconds that sampling and training of a step take. "
        f"For {EXAMPLE['prompts']:g} prompts with {EXAMPLE['completions']:g} completions each and "
        f"T = {EXAMPLE['seconds']:g}: {needed}."
    )


def _reason_of_attempt(p99: float, attempt: float) -> str:
    return (
        f"timeouts.attempt is three times the slowest percent of requests ({p99:.2g} s), and at "
        f"least {SHORTEST_ATTEMPT} s: {attempt:g} s. A service that is slower at other times, as "
        "one that starts on demand or judges with a language model, needs more."
    )


async def _measure(session: ProbeSession, concurrency: int) -> Load:
    client = session.client
    batches = _batches(session)
    first = next(batches)
    alone = await client.send(first)
    calls: list[ProbeCall] = []
    started = time.monotonic()

    async def work() -> None:
        while time.monotonic() - started < LOAD_SECONDS:
            batch = next(batches, None)
            if batch is None:
                return
            calls.append(await client.send(batch))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, CALLS - 1)):
            group.create_task(work())
    return Load(len(first), alone, calls, time.monotonic() - started)


def _batches(session: ProbeSession) -> Iterator[Sequence[RewardSample]]:
    """Full requests; no two are equal, so that no cache can answer."""
    longest = max((sample.completion for sample in session.samples), key=len)
    if not session.are_own:
        longest = ("The rain has gone, the sun is out again over the hills. " * WORDS)[: 6 * WORDS]
    size = session.client.max_samples
    for call in range(CALLS):
        samples = [
            _sample(session.samples[place % len(session.samples)], longest, call, place)
            for place in range(size)
        ]
        yield next(session.client.split(samples))


def _sample(of: RewardSample, text: str, call: int, place: int) -> RewardSample:
    completion = f"{text} ({call}.{place})"
    return replace(
        of,
        id=f"l{call}_{place}",
        group_id=f"l{call}_{place // GROUP}",
        index=place % GROUP,
        completion=completion,
        completion_tokens=len(completion.split()),
    )
