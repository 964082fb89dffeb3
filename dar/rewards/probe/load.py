"""Step 5 of a probe: full requests at full concurrency, and the settings that fit what they took."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dar.protocol.reward_spec import RewardComponent
from dar.rewards.base import RewardSample
from dar.rewards.probe.client import Asked
from dar.rewards.probe.steps import ProbeSession
from dar.rewards.scoring.step_report import quantile

CALLS = 20
LOAD_SECONDS = 90.0
"""After this no further request is begun."""
GROUP = 4
WORDS = 500
"""Of a completion, where the user gave none."""
NOTICED_SECONDS = 0.25
"""Latency below which waiting inside a service is not worth a word."""
QUEUEING = 2.0
"""Growth of latency under load from which on requests do nothing but wait."""
LONGEST_PAUSE = 5.0
"""How long a ``Retry-After`` is heeded once the load is over, in seconds."""
MOSTLY = 0.5
"""Share of failed requests that no number of retries makes up for."""
EXAMPLE = {"prompts": 32, "completions": 4, "seconds": 30.0}


@dataclass(frozen=True, slots=True)
class Load:
    """What full requests came to."""

    samples: int
    """In each request."""
    alone: Asked
    """The first one, which had the service to itself."""
    crowd: Sequence[Asked]
    """Those that followed, several at once."""
    seconds: float
    """From the start of the crowd to its end."""

    @property
    def all(self) -> list[Asked]:
        """All requests."""
        return [self.alone, *self.crowd]

    @property
    def latencies(self) -> list[float]:
        """Seconds of those that were answered, in order."""
        return sorted(one.seconds for one in self.all if one.failure is None)

    @property
    def codes(self) -> Counter[str]:
        """How often which failure was met."""
        return Counter(one.code for one in self.all if one.failure is not None)

    @property
    def throttled(self) -> int:
        """Requests that the service had no room for."""
        return sum(one.failure is not None and one.failure.status in {429, 503} for one in self.all)


async def check_load(session: ProbeSession) -> None:
    """Ask for full requests, as many at once as the component allows."""
    notes, limits = session.notes, session.component.limits
    load = await _measure(session)
    latencies, codes = load.latencies, load.codes
    if latencies:
        notes.latencies = latencies
        notes.suggested = suggestions(session.component, load)
    failed = codes.total()
    if failed:
        _tell_failures(session, load)
    if latencies:
        _tell_slowness(session, load)
        p50, p95 = quantile(latencies, 0.5), quantile(latencies, 0.95)
        notes.done(
            f"{len(load.all)} requests of {load.samples} samples, {limits.concurrency} at once: p50 {p50 * 1000:.0f} ms, "
            f"p95 {p95 * 1000:.0f} ms, {failed} failed"
        )
    await asyncio.sleep(min(session.line.wished_pause, LONGEST_PAUSE))


def _tell_failures(session: ProbeSession, load: Load) -> None:
    notes, codes = session.notes, load.codes
    failed, calls = codes.total(), len(load.all)
    told = ", ".join(f"{code} {count}" for code, count in codes.most_common())
    text = f"{failed} of {calls} full requests failed: {told}"
    worst = codes.most_common(1)[0][0]
    example = next(one for one in load.all if one.code == worst)
    if load.throttled:
        notes.warn("load.throttled", text, example)
    elif failed <= MOSTLY * calls:
        notes.warn("load.errors", text, example)
    if failed > MOSTLY * calls and (not load.throttled or failed == calls):
        notes.error(worst, text, None if load.throttled else example)


def _tell_slowness(session: ProbeSession, load: Load) -> None:
    notes, component = session.notes, session.component
    latencies = load.latencies
    p50, p95 = quantile(latencies, 0.5), quantile(latencies, 0.95)
    attempt = component.timeouts.attempt
    if p95 > attempt / 2:
        notes.warn(
            "load.slow", f"p95 is {p95:.1f} s, and an attempt is cut off after {attempt:g} s"
        )
    useful = _useful_concurrency(load)
    if useful is not None and useful < component.limits.concurrency:
        notes.warn(
            "load.queueing",
            f"one request alone takes {load.alone.seconds:.2f} s, one of {component.limits.concurrency} at once {p50:.2f} s: the "
            f"service works on about {useful} at a time",
        )


def _useful_concurrency(load: Load) -> int | None:
    """Requests that the service works on at once, by Little's law; None: it did not slow down under load, or is fast all the same."""
    answered = sum(one.failure is None for one in load.crowd)
    is_slowed = quantile(load.latencies, 0.5) > max(NOTICED_SECONDS, QUEUEING * load.alone.seconds)
    if load.alone.failure is not None or not answered or not is_slowed:
        return None
    return max(1, math.ceil(load.alone.seconds * answered / load.seconds))


def suggestions(component: RewardComponent, load: Load) -> dict[str, Any]:
    """Settings of the component that fit the load; there is at least one latency."""
    latencies, concurrency = load.latencies, component.limits.concurrency
    p50, p99 = quantile(latencies, 0.5), quantile(latencies, 0.99)
    if load.throttled:
        concurrency = max(1, concurrency // 2)
    concurrency = min(concurrency, _useful_concurrency(load) or concurrency)
    attempt = float(min(3600, max(5, math.ceil(3 * p99))))
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
        "hint": _hint(p50, size),
    }


def _hint(latency: float, size: int) -> str:
    """Little's law, with half as much again for latencies that vary."""
    samples = EXAMPLE["prompts"] * EXAMPLE["completions"]
    needed = max(1, math.ceil(1.5 * latency * samples / size / EXAMPLE["seconds"]))
    return (
        f"Requests in flight that hide the latency: 1.5 x {latency:.3g} s x samples per step / {size} / T, where T is the time in "
        f"seconds that sampling and training of a step take. For {EXAMPLE['prompts']:g} prompts with "
        f"{EXAMPLE['completions']:g} completions each and T = {EXAMPLE['seconds']:g}: {needed}."
    )


async def _measure(session: ProbeSession) -> Load:
    line, concurrency = session.line, session.component.limits.concurrency
    batches = _batches(session)
    first = next(batches)
    alone = await line.ask(first)
    asked: list[Asked] = []
    started = time.monotonic()

    async def work() -> None:
        while time.monotonic() - started < LOAD_SECONDS:
            batch = next(batches, None)
            if batch is None:
                return
            asked.append(await line.ask(batch))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, CALLS - 1)):
            group.create_task(work())
    return Load(len(first), alone, asked, time.monotonic() - started)


def _batches(session: ProbeSession) -> Iterator[Sequence[RewardSample]]:
    """Full requests, no two the same, so that no cache answers."""
    longest = max((sample.completion for sample in session.samples), key=len)
    if not session.are_own:
        longest = ("The rain has gone, and the sun is out again over the hills. " * WORDS)[
            : 6 * WORDS
        ]
    size = session.line.max_samples
    for call in range(CALLS):
        samples = [
            _sample(session.samples[place % len(session.samples)], longest, call, place)
            for place in range(size)
        ]
        yield session.line.fitting(samples)


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
