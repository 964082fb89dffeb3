"""Probes, and reward services to be probed."""

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dar.protocol.reward_probe import ProbeReport
from dar.protocol.reward_spec import RewardComponent
from dar.rewards.probe.client import ProbeTarget
from dar.rewards.probe.run import as_samples, probe
from fakes.reward_server import ScoreRequest

Behaviour = Callable[[Any], None]


def length_of(sample: dict[str, Any]) -> float:
    """A reward that depends on the text alone, and differs between texts."""
    digest = hashlib.sha256(sample["completion"].encode()).digest()
    return digest[0] / 256 + digest[1] / 65536


def scoring(reward: Callable[[dict[str, Any], int], Any]) -> Behaviour:
    """Each sample gets ``reward(sample, its place)``."""

    def behave(request: ScoreRequest) -> None:
        samples = request.content["samples"]
        request.rewards([reward(sample, place) for place, sample in enumerate(samples)])

    return behave


good = scoring(lambda sample, _: length_of(sample))


def on(is_met: Callable[[Any], bool], then: Behaviour) -> Behaviour:
    """Misbehave where a condition is met, and conform elsewhere."""
    return lambda request: then(request) if is_met(request) else good(request)


def status(text: str, body: bytes = b"oops", **headers: str) -> Behaviour:
    return lambda request: request.answer(body, status=text, content_type="text/plain", **headers)


@pytest.fixture
def services() -> SimpleNamespace:
    """What reward services do."""
    return SimpleNamespace(length_of=length_of, scoring=scoring, good=good, on=on, status=status)


@pytest.fixture
def ask_probe(secret: str) -> Callable[..., Any]:
    async def ask(url: str, *, light: bool = False, **given: Any) -> ProbeReport:
        fields = {
            "name": "r",
            "url": url,
            "batch": {"max_samples": 6},
            "limits": {"concurrency": 4},
            "timeouts": {"connect": 10, "read": 20, "attempt": 20, "deadline": 60},
            **given.pop("component", {}),
        }
        samples = given.pop("samples", None)
        seconds = given.pop("seconds", 120)
        target = ProbeTarget(
            RewardComponent.model_validate(fields),
            url,
            given.pop("secrets", [secret]),
            **given,
        )
        return await probe(target, as_samples(samples), light=light, seconds=seconds)

    return ask


@pytest.fixture
def warned() -> Callable[[ProbeReport], set[tuple[int, str]]]:
    """Step and code of each warning."""
    return lambda report: {(finding.step, finding.code) for finding in report.warnings}


@pytest.fixture
def failed() -> Callable[[ProbeReport], list[tuple[int, str]]]:
    """Step and code of each error."""
    return lambda report: [(finding.step, finding.code) for finding in report.errors]


@pytest.fixture
def statuses() -> Callable[[ProbeReport], dict[int, str]]:
    """How each step ended."""
    return lambda report: {step.step: step.status for step in report.steps}
