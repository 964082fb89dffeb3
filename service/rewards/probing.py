"""Probes of reward services: full ones on request, light ones before a job is accepted.

A light probe rejects a job only for errors that a change of the spec or of the service must fix. A
service that is down, slow or overloaded may recover before the job starts: the job is accepted and
waits.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import orjson

from dar.errors import Problem
from dar.protocol.reward_probe import ProbeFinding, ProbeReport
from dar.protocol.reward_spec import RewardComponent, RewardRetry, RewardTimeouts
from dar.rewards.base import RewardSample
from dar.rewards.http.redaction import Redactor
from dar.rewards.probe.client import ProbeTarget
from dar.rewards.probe.run import FULL_SECONDS, probe
from service.http.rate_limits import PassedProbes
from service.store.events import NewEvent
from service.store.reward_endpoints import State
from service.store.reward_failures import REJECTION

LIGHT_SECONDS = 4.0
"""Time limit of a submission for all its reward services together."""
_TEMPORARY = frozenset(
    {
        "connect",
        "connect_timeout",
        "tls.timeout",
        "tls.alert",
        "tls.broken",
        "timeout",
        "deadline",
        "callback_late",
        "protocol",
        "dns",
        "unavailable",
    }
    | {"too_large", "http_408", "http_413", "http_425", "http_429", "async.no_result"}
)
_WRONG_SAMPLE = frozenset({"http_400", "http_422"})
"""In a job, the sample may be at fault. A probe's samples are known to have the right form."""


@dataclass(frozen=True, slots=True)
class ComponentProbe:
    """The probe of a component's service at a job's submission."""

    param: str
    """The component's path in the spec."""
    target: ProbeTarget
    revision: int = 0
    """The endpoint's revision."""

    @property
    def key(self) -> str:
        """Equal for components that the same service scores in the same way."""
        content = [self.target.component.model_dump(mode="json"), self.target.url, self.revision]
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def with_example(one: ComponentProbe, example: RewardSample | None) -> ComponentProbe:
    """The same probe with a prompt of the job: a reward service may need its columns."""
    return replace(one, target=replace(one.target, example=example))


def is_temporary(code: str) -> bool:
    """Whether a failure may be over before the job starts."""
    return code in _TEMPORARY or code.startswith("http_5")


def state_after(report: ProbeReport) -> State | None:
    """The endpoint's state after a probe; None: unchanged."""
    if report.ok:
        return "ok"
    is_misconfigured = any(
        one.code in _WRONG_SAMPLE or REJECTION.match(one.code) for one in report.errors
    )
    return "misconfigured" if is_misconfigured else None


async def report_on(
    target: ProbeTarget, samples: Sequence[RewardSample] | None, *, light: bool
) -> ProbeReport:
    """Probe a service within the time limits of this module."""
    seconds = LIGHT_SECONDS if light else FULL_SECONDS
    report = await probe(target, samples, light=light, seconds=seconds)
    redact = Redactor(target.secrets, target.headers.values(), target.url)
    return ProbeReport.model_validate(redact.in_json(report.model_dump(mode="json")))


async def reports_on(probes: Sequence[ComponentProbe]) -> list[ProbeReport]:
    """Short probes of the services of a job, at once."""
    return await asyncio.gather(
        *(report_on(_with_one_attempt(one.target), None, light=True) for one in probes)
    )


def problems_in(one: ComponentProbe, report: ProbeReport) -> list[Problem]:
    """What keeps a job with this service from being accepted."""
    lasting = (finding for finding in report.errors if not is_temporary(finding.code))
    return [_problem(one, finding) for finding in lasting]


async def verdict_on(
    probes: Sequence[ComponentProbe], passed: PassedProbes
) -> tuple[list[Problem], list[NewEvent]]:
    """Probe the services of a job at once.

    Returns:
        What keeps the job from being accepted, and events for an accepted job.
    """
    reports = await reports_on(probes)
    problems: list[Problem] = []
    notices: list[NewEvent] = []
    for one, report in zip(probes, reports, strict=True):
        lasting = problems_in(one, report)
        problems += lasting
        found = [_notice(one, finding) for finding in report.warnings]
        notices += found
        if not lasting:
            passed.add(one.key, found)
    return problems, notices


def _notice(one: ComponentProbe, finding: ProbeFinding) -> NewEvent:
    """A warning of the probe as an event of the job, which is accepted nevertheless."""
    name = one.target.component.name
    message = (
        f"reward component {name}: when the job was submitted, a probe of its service with the "
        f"job's first prompt found: {finding.detail}. {finding.advice}"
    )
    data = {"kind": "reward_probe", "component": name, "code": finding.code}
    return NewEvent(message.strip(), level="warn", data=data)


def _problem(one: ComponentProbe, finding: ProbeFinding) -> Problem:
    message = (
        f"the reward service cannot be used: {finding.detail}; "
        "correct it, or send skip_validation to submit anyway"
    )
    return Problem(message, one.param, finding.code)


def _with_one_attempt(target: ProbeTarget) -> ProbeTarget:
    """The same with one short attempt, as a client waits for the submission."""
    timeouts = target.component.timeouts
    short = RewardTimeouts(
        connect=min(timeouts.connect, LIGHT_SECONDS / 2),
        read=min(timeouts.read, LIGHT_SECONDS),
        attempt=min(timeouts.attempt, LIGHT_SECONDS),
        deadline=min(timeouts.deadline, LIGHT_SECONDS),
    )
    changes = {"timeouts": short, "retry": RewardRetry(attempts=1)}
    component: RewardComponent = target.component.model_copy(update=changes)
    return replace(target, component=component)
