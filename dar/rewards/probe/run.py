"""A dry run of a reward service, in nine steps: what would go wrong in a job goes wrong here first.

The steps are numbered as in the report; the load comes last, as it may leave a service out of breath. With two samples a full probe
makes one connection for itself and at most 36 requests, a light one 6; with eight samples and a protocol that takes one sample per
request it is 54.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dar.errors import ConfigurationError, RewardMisconfiguredError
from dar.protocol.reward_endpoints import ProbeSample
from dar.protocol.reward_probe import ProbeReport
from dar.protocol.reward_spec import RewardComponent
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import RewardSample
from dar.rewards.from_spec import http_options
from dar.rewards.http.egress import EgressPolicy, Resolver, parse_url
from dar.rewards.probe.address import Path, check_address
from dar.rewards.probe.callbacks import ProbeInbox
from dar.rewards.probe.client import Line
from dar.rewards.probe.later import check_later
from dar.rewards.probe.load import check_load
from dar.rewards.probe.report import Notes
from dar.rewards.probe.steps import (
    ProbeSession,
    check_answer,
    check_determinism,
    check_order,
    check_signature,
    check_spread,
    check_texts,
)

FULL_SECONDS = 300.0
LONGEST_LATER_SECONDS = 60.0
"""How long a result is waited for that comes later; a job waits until its own deadline."""
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


@dataclass(frozen=True)
class ProbeTarget:
    """What is probed."""

    component: RewardComponent
    url: str
    secrets: Sequence[str] = field(default=(), repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    guard: EgressPolicy | None = None
    inbox: ProbeInbox | None = None
    """Takes callbacks; None: there is nobody to call back."""
    example: RewardSample | None = None
    """A prompt with its columns, for the built-in completions; None: a prompt of our own, without columns."""
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    """Whom to trust; None: the system's certificate authorities."""
    resolver: Resolver | None = None
    """Another source of addresses than the system's."""


async def probe(
    target: ProbeTarget,
    samples: Sequence[RewardSample] | None,
    *,
    light: bool,
    seconds: float = FULL_SECONDS,
) -> ProbeReport:
    """Ask a reward service as a job would, and say what is wrong with it.

    Args:
        target: What is probed.
        samples: What is to be scored, all of one group; None: two built-in completions.
        light: Only the steps that a submission takes: 1 to 4.
        seconds: Time for all steps together; what was found until then is reported.
    """
    notes = Notes()
    try:
        line = _line(target)
    except (RewardMisconfiguredError, ConfigurationError) as error:
        notes.error(error.error_code, error.message)
        return notes.report()
    try:
        async with asyncio.timeout(seconds) as limit:
            await line.open()
            try:
                notes.line = line
                await _take_steps(target, ProbeSession(
                    target.component, line, notes, samples or _built_in(target.example), are_own=samples is not None
                ), light=light)  # fmt: skip
            finally:
                await line.aclose()
    except TimeoutError:
        if not limit.expired():
            raise
        told = f"the probe was not done within {seconds:g} s"
        # A service that answered is slow, not broken.
        if notes.step <= 2:
            notes.error("timeout", told)
        else:
            notes.warn("unfinished", told)
    return notes.report()


def as_samples(given: Sequence[ProbeSample] | None) -> list[RewardSample] | None:
    """A user's completions as reward sources take them; all of one group."""
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


async def _take_steps(target: ProbeTarget, session: ProbeSession, *, light: bool) -> None:
    notes = session.notes
    path = Path(
        parse_url(target.url, target.guard),
        target.guard,
        target.tls,
        target.resolver,
        target.component.timeouts.connect,
    )
    steps: dict[int, Callable[[], Awaitable[None]]] = {
        1: lambda: check_address(path, notes),
        2: lambda: check_answer(session),
        3: lambda: check_determinism(session),
        4: lambda: check_order(session),
        6: lambda: check_signature(session),
        7: lambda: check_texts(session),
        8: lambda: check_spread(session),
        9: lambda: check_later(session, target.inbox),
        5: lambda: check_load(session),
    }
    for number, take in steps.items():
        notes.step = number
        if light and number > LIGHT_STEPS:
            notes.skip("not part of a light probe")
            continue
        await take()
        notes.latencies = notes.latencies or session.seconds
        if notes.has_errors and number <= LIGHT_STEPS:
            return


def _line(target: ProbeTarget) -> Line:
    """The client.

    Raises:
        RewardMisconfiguredError: The URL cannot be used.
        ConfigurationError: A secret or a header cannot be.
    """
    component = target.component
    if component.reply == "either":
        seconds = min(component.timeouts.deadline, LONGEST_LATER_SECONDS)
        timeouts = component.timeouts.model_copy(update={"deadline": seconds})
        component = component.model_copy(update={"timeouts": timeouts})
    access = ComponentAccess(
        url=target.url, secrets=list(target.secrets), headers=dict(target.headers)
    )
    options = replace(
        http_options(component, access, guard=target.guard, is_shared=False),
        tls=target.tls,
        resolver=target.resolver,
    )
    return Line(
        component.name, target.url, secrets=access.secrets, options=options, inbox=target.inbox
    )
