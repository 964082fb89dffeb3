"""`probe`: a dry run of a reward service in nine steps.

The steps are numbered as in the report. Load comes last, as it may exhaust the service. With two
samples a full probe makes one connection of its own and at most 36 requests, a light one 6; with
eight samples and a protocol of one sample per request it makes 54.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from dar.errors import ConfigurationError, RewardMisconfiguredError
from dar.protocol.reward_endpoints import ProbeSample
from dar.protocol.reward_probe import ProbeReport
from dar.rewards.base import RewardSample
from dar.rewards.probe.address import check_address
from dar.rewards.probe.client import ProbeClient, ProbeTarget
from dar.rewards.probe.load import check_load
from dar.rewards.probe.report import ReportBuilder
from dar.rewards.probe.steps import (
    ProbeSession,
    check_answer,
    check_determinism,
    check_later,
    check_order,
    check_signature,
    check_spread,
    check_texts,
)

FULL_SECONDS = 300.0
LONGEST_LATER_SECONDS = 60.0
"""Most time to wait for a result after a 202; a job waits until its own deadline."""
LIGHT_STEPS = 4
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


async def probe(
    target: ProbeTarget,
    samples: Sequence[RewardSample] | None,
    *,
    light: bool,
    seconds: float = FULL_SECONDS,
) -> ProbeReport:
    """Send requests to a reward service as a job would, and report what is wrong.

    Args:
        target: The service.
        samples: Samples to score, all of one group; None: two built-in completions.
        light: Take only steps 1 to 4, as a submission does.
        seconds: Time limit for all steps; the report has what was found until then.
    """
    report = ReportBuilder()
    try:
        client = ProbeClient(_with_short_deadline(target))
    except (RewardMisconfiguredError, ConfigurationError) as error:
        report.error(error.error_code, error.message)
        return report.build()
    session = ProbeSession(
        client, report, samples or _built_in(target.example), samples is not None
    )
    try:
        async with asyncio.timeout(seconds) as limit, client:
            report.client = client
            await _take_steps(target, session, light=light)
    except TimeoutError:
        if not limit.expired():
            raise
        text = f"the probe was not done within {seconds:g} s"
        # A service that has answered is slow, not broken.
        if report.step <= 2:
            report.error("timeout", text)
        else:
            report.warn("unfinished", text)
    return report.build()


def as_samples(given: Sequence[ProbeSample] | None) -> list[RewardSample] | None:
    """A user's completions as samples of one group."""
    if given is None:
        return None
    return [
        RewardSample(
            id=f"s{index}",
            group_id="g0",
            index=index,
            prompt=sample.prompt,
            messages=sample.messages,
            completion=sample.completion,
            finish_reason="stop",
            completion_tokens=len(sample.completion.split()),
            columns={**sample.columns, "ground_truth": sample.ground_truth},
        )
        for index, sample in enumerate(given)
    ]


def _built_in(example: RewardSample | None) -> Sequence[RewardSample]:
    if example is None:
        return BUILT_IN
    return [
        replace(
            example,
            id=one.id,
            group_id=one.group_id,
            index=one.index,
            completion=one.completion,
            completion_tokens=one.completion_tokens,
        )
        for one in BUILT_IN
    ]


def _with_short_deadline(target: ProbeTarget) -> ProbeTarget:
    if target.component.reply != "either":
        return target
    timeouts = target.component.timeouts
    seconds = min(timeouts.deadline, LONGEST_LATER_SECONDS)
    changes = {"timeouts": timeouts.model_copy(update={"deadline": seconds})}
    return replace(target, component=target.component.model_copy(update=changes))


async def _take_steps(target: ProbeTarget, session: ProbeSession, *, light: bool) -> None:
    report, component = session.report, target.component
    steps: dict[int, Callable[[], Awaitable[None]]] = {
        1: lambda: check_address(target, report),
        2: lambda: check_answer(session),
        3: lambda: check_determinism(session),
        4: lambda: check_order(session),
        6: lambda: check_signature(session, component.protocol),
        7: lambda: check_texts(session, component.batch.max_bytes),
        8: lambda: check_spread(session),
        9: lambda: check_later(session, target.inbox, component.reply),
        5: lambda: check_load(session, component),
    }
    for number, take in steps.items():
        report.step = number
        if light and number > LIGHT_STEPS:
            report.skip("not part of a light probe")
            continue
        await take()
        report.latencies = report.latencies or session.seconds
        if report.has_errors and number <= LIGHT_STEPS:
            return
