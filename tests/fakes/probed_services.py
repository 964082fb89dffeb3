"""Reward services to be probed, and the types of the fixtures that read a report."""

import hashlib
from collections.abc import Callable
from typing import Any

from dar.protocol.reward_probe import ProbeReport
from fakes.reward_server import ScoreRequest

Behaviour = Callable[[Any], None]
Codes = Callable[[ProbeReport], list[tuple[int, str]]]
CodeSet = Callable[[ProbeReport], set[tuple[int, str]]]
Statuses = Callable[[ProbeReport], dict[int, str]]


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


class Services:
    """What reward services do."""

    length_of = staticmethod(length_of)
    scoring = staticmethod(scoring)
    good = staticmethod(good)
    on = staticmethod(on)
    status = staticmethod(status)
