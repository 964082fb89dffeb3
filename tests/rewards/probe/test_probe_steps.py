"""Steps 3 to 8 of a probe: what a service gives away about itself when it is asked in several
ways.
"""

import random
import threading
from collections.abc import Callable
from typing import Any

from fakes.probed_services import Codes, CodeSet, Services, Statuses
from fakes.reward_server import RewardServer, ScoreRequest

Probe = Callable[..., Any]


# --- steps 3 and 4 --------------------------------------------------------------------------------


async def test_rewards_by_chance_are_measured(
    ask_probe: Probe, hostile: Callable[..., RewardServer], services: Services, warned: CodeSet
) -> None:
    chance = random.Random(7)
    report = await ask_probe(hostile(services.scoring(lambda *_: chance.random())).url)
    assert report.ok
    assert {(3, "determinism.same_id"), (3, "determinism.random"), (8, "spread.noise")} <= warned(
        report
    )
    assert report.determinism["max_abs_diff"] > 0.01


async def test_a_cache_by_id_does_not_hide_chance(
    ask_probe: Probe, hostile: Callable[..., RewardServer], warned: CodeSet
) -> None:
    chance, kept = random.Random(7), {}

    def behave(request: ScoreRequest) -> None:
        key = request.content["request_id"]
        kept.setdefault(key, [chance.random() for _ in request.ids])
        request.rewards(kept[key])

    report = await ask_probe(hostile(behave).url, light=True)
    assert warned(report) == {(3, "determinism.random")}
    assert report.determinism["same_id_max_abs_diff"] == 0.0
    assert report.determinism["max_abs_diff"] > 0.01


async def test_a_service_that_refuses_a_repetition_is_broken(
    ask_probe: Probe, hostile: Callable[..., RewardServer], failed: Codes, services: Services
) -> None:
    seen: set[str] = set()

    def behave(request: ScoreRequest) -> None:
        key = request.content["request_id"]
        (services.status("409 Conflict") if key in seen else services.good)(request)
        seen.add(key)

    report = await ask_probe(hostile(behave).url, light=True)
    assert failed(report) == [(3, "http_409")]


async def test_rewards_by_position_are_found(
    ask_probe: Probe, hostile: Callable[..., RewardServer], warned: CodeSet, services: Services
) -> None:
    report = await ask_probe(hostile(services.scoring(lambda _, place: place)).url, light=True)
    assert warned(report) == {(4, "order.position")}


async def test_rewards_by_the_company_in_a_request_are_found(
    ask_probe: Probe, hostile: Callable[..., RewardServer], warned: CodeSet, services: Services
) -> None:
    def behave(request: ScoreRequest) -> None:
        count = len(request.ids)
        request.rewards(
            [services.length_of(sample) / count for sample in request.content["samples"]]
        )

    report = await ask_probe(hostile(behave).url, light=True)
    assert warned(report) == {(4, "order.batch")}


async def test_noise_is_not_taken_for_an_effect_of_the_order(
    ask_probe: Probe, hostile: Callable[..., RewardServer], warned: CodeSet, services: Services
) -> None:
    flips = [0]

    def behave(request: ScoreRequest) -> None:
        flips[0] += 1
        noise = 0.01 * (-1) ** flips[0]
        request.rewards(
            [services.length_of(sample) + noise for sample in request.content["samples"]]
        )

    report = await ask_probe(hostile(behave).url, light=True)
    assert {code for step, code in warned(report) if step == 4} == set()


# --- step 5 ---------------------------------------------------------------------------------------


def is_load(request: ScoreRequest) -> bool:
    return len(request.ids) == 6


class Crowded:
    """Answers 429 to whatever comes while ``room`` full requests are being worked on."""

    def __init__(self, services: Services, room: int) -> None:
        self._services, self._lock, self._room = services, threading.Lock(), room
        self._busy = 0

    def __call__(self, request: ScoreRequest) -> None:
        with self._lock:
            is_full = self._busy >= self._room
            self._busy += not is_full
        if is_full:
            self._services.status("429 Too Many Requests", retry_after="0.1")(request)
            return
        request.server.stopping.wait(0.1)
        with self._lock:
            self._busy -= 1
        self._services.good(request)


async def test_a_service_without_room_gets_fewer_requests_suggested(
    ask_probe: Probe, hostile: Callable[..., RewardServer], warned: CodeSet, services: Services
) -> None:
    report = await ask_probe(hostile(services.on(is_load, Crowded(services, 2))).url)
    assert (5, "load.throttled") in warned(report)
    assert report.ok
    assert report.suggested["limits"]["concurrency"] == 2
    assert "http_429" in next(w.detail for w in report.warnings if w.code == "load.throttled")


async def test_a_service_that_queues_is_told_how_many_it_works_on(
    ask_probe: Probe, hostile: Callable[..., RewardServer], warned: CodeSet, services: Services
) -> None:
    turn = threading.Lock()

    def one_at_a_time(request: ScoreRequest) -> None:
        with turn:
            request.server.stopping.wait(0.15)
        services.good(request)

    report = await ask_probe(hostile(services.on(is_load, one_at_a_time)).url)
    assert (5, "load.queueing") in warned(report)
    assert report.suggested["limits"]["concurrency"] < 4


async def test_failures_under_load_are_a_warning_while_they_are_few(
    ask_probe: Probe, hostile: Callable[..., RewardServer], warned: CodeSet, services: Services
) -> None:
    count = iter(range(100))
    rarely = services.on(
        lambda request: is_load(request) and next(count) % 4 == 3, services.status("500 Oops")
    )
    report = await ask_probe(hostile(rarely).url)
    assert report.ok
    told = {finding.code: finding.detail for finding in report.warnings}
    assert "5 of 20" in told["load.errors"]


async def test_a_service_that_breaks_down_under_load_is_not_usable(
    ask_probe: Probe, hostile: Callable[..., RewardServer], failed: Codes, services: Services
) -> None:
    report = await ask_probe(hostile(services.on(is_load, services.status("500 Oops"))).url)
    assert failed(report) == [(5, "http_500")]
    assert report.latency_ms["p50"] is not None


async def test_latency_near_the_limit_is_warned_of(
    ask_probe: Probe, hostile: Callable[..., RewardServer], warned: CodeSet, services: Services
) -> None:
    def slowly(request: ScoreRequest) -> None:
        request.server.stopping.wait(0.6)
        services.good(request)

    times = {"connect": 1, "read": 1, "attempt": 1.1, "deadline": 60}
    report = await ask_probe(
        hostile(services.on(is_load, slowly)).url,
        component={"timeouts": times, "limits": {"concurrency": 10}},
    )
    assert (5, "load.slow") in warned(report)
    assert report.suggested["timeouts"]["attempt"] > 1.1
    assert report.suggested["batch"] == {"max_samples": 3}


# --- steps 6 to 8 ---------------------------------------------------------------------------------


async def test_a_service_that_checks_no_signature_is_warned_of(
    ask_probe: Probe,
    hostile: Callable[..., RewardServer],
    warned: CodeSet,
    statuses: Statuses,
    services: Services,
) -> None:
    service = hostile(services.good)
    report = await ask_probe(service.url)
    assert (report.ok, warned(report)) == (True, {(6, "signature.unverified")})
    unsigned = await ask_probe(service.url, secrets=[])
    assert statuses(unsigned)[6] == "skipped"


async def test_a_service_that_breaks_on_unusual_texts_is_warned_of(
    ask_probe: Probe, hostile: Callable[..., RewardServer], services: Services
) -> None:
    def is_odd(request: ScoreRequest) -> bool:
        texts = [sample["completion"] for sample in request.content["samples"]]
        return any("\x00" in text or len(text) > 50_000 for text in texts)

    report = await ask_probe(hostile(services.on(is_odd, services.status("500 Oops"))).url)
    found = [finding.detail for finding in report.warnings if finding.code == "text.failed"]
    assert report.ok
    assert len(found) == 2
    assert found[0].startswith("control characters: http_500")
    assert found[1].startswith("a very long text: http_500")


async def test_a_constant_reward_is_warned_of(
    ask_probe: Probe, hostile: Callable[..., RewardServer], warned: CodeSet, services: Services
) -> None:
    report = await ask_probe(hostile(services.scoring(lambda *_: 0.5)).url)
    assert report.ok
    assert (8, "spread.constant") in warned(report)
