"""Probes, and reward services to be probed."""

from collections.abc import Callable
from typing import Any

import pytest

from dar.protocol.reward_probe import ProbeReport
from dar.protocol.reward_spec import RewardComponent
from dar.rewards.probe.client import ProbeTarget
from dar.rewards.probe.run import as_samples, probe
from fakes.probed_services import Codes, CodeSet, Services, Statuses


@pytest.fixture
def services() -> Services:
    return Services()


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
def warned() -> CodeSet:
    """Step and code of each warning."""
    return lambda report: {(finding.step, finding.code) for finding in report.warnings}


@pytest.fixture
def failed() -> Codes:
    """Step and code of each error."""
    return lambda report: [(finding.step, finding.code) for finding in report.errors]


@pytest.fixture
def statuses() -> Statuses:
    """How each step ended."""
    return lambda report: {step.step: step.status for step in report.steps}
