"""Step 9 of a probe: results that are promised with a 202."""

import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import orjson
import pytest

from dar.cli.reward.listener import listening
from dar.rewards.probe.callbacks import ProbeInbox
from fakes.probed_services import Codes, Services, Statuses
from fakes.reward_server import RewardServer, ScoreRequest, accept

Probe = Callable[..., Any]
EITHER = {"reply": "either"}


@pytest.fixture
async def inbox() -> AsyncIterator[ProbeInbox]:
    async with listening() as found:
        yield found


class CallsBack:
    """Accepts, and posts the result to the callback from a thread."""

    def __init__(self, services: Services, *, wrongly: bool = False) -> None:
        self._services, self._wrongly = services, wrongly
        self.statuses: list[int] = []
        self.callbacks: list[dict[str, str]] = []
        self.threads: list[threading.Thread] = []

    def __call__(self, request: ScoreRequest) -> None:
        content = request.content
        self.callbacks.append(content["reply"]["callback"])
        accepted = {"request_id": content["request_id"], "status": "accepted"}
        request.answer(orjson.dumps(accepted), status="202 Accepted")
        self.threads.append(threading.Thread(target=self._post, args=(content,)))
        self.threads[-1].start()

    def _post(self, content: dict[str, Any]) -> None:
        rewards = [self._services.length_of(sample) for sample in content["samples"]]
        result = {
            "type": "reward.result",
            "request_id": content["request_id"],
            "rewards": rewards[: -1 if self._wrongly else None],
        }
        callback = content["reply"]["callback"]
        headers = {"authorization": f"Bearer {callback['token']}"}
        answer = httpx2.post(
            callback["url"], json=result, headers=headers, trust_env=False, verify=False
        )
        self.statuses.append(answer.status_code)

    def join(self) -> None:
        for thread in self.threads:
            thread.join()


async def test_a_service_that_calls_back_passes_all_steps(
    ask_probe: Probe,
    statuses: Statuses,
    failed: Codes,
    hostile: Callable[..., RewardServer],
    services: Services,
    inbox: ProbeInbox,
) -> None:
    service = CallsBack(services)
    report = await ask_probe(hostile(service).url, component=EITHER, inbox=inbox)
    service.join()
    assert failed(report) == []
    assert statuses(report)[9] == "ok"
    assert "callback came after" in report.steps[8].detail
    assert "duplicate" in report.steps[8].detail
    assert set(service.statuses) == {200}
    said = report.model_dump_json()
    assert not [one for one in service.callbacks if one["token"] in said]


async def test_callbacks_with_a_wrong_token_a_wrong_body_or_twice_are_told_apart(
    ask_probe: Probe, hostile: Callable[..., RewardServer], services: Services, inbox: ProbeInbox
) -> None:
    service = CallsBack(services)
    await ask_probe(hostile(service).url, component=EITHER, inbox=inbox, light=True)
    service.join()
    callback = service.callbacks[0]
    async with httpx2.AsyncClient(trust_env=False) as client:
        forged = {"authorization": "Bearer rwt_" + "a" * 43}
        assert (await client.post(callback["url"], json={}, headers=forged)).status_code == 401
        headers = {"authorization": f"Bearer {callback['token']}"}
        other = await client.post(callback["url"], json={"rewards": []}, headers=headers)
        assert other.status_code == 409


async def test_a_promise_that_is_not_kept_is_an_error(
    ask_probe: Probe,
    failed: Codes,
    hostile: Callable[..., RewardServer],
    services: Services,
    inbox: ProbeInbox,
) -> None:
    service = CallsBack(services, wrongly=True)
    component = {**EITHER, "timeouts": {"attempt": 0.5, "deadline": 1.5}}
    report = await ask_probe(hostile(service).url, component=component, inbox=inbox)
    service.join()
    assert failed(report) == [(2, "async.no_result")]
    assert service.statuses == [422]


async def test_a_result_that_is_polled_needs_no_callback(
    ask_probe: Probe,
    statuses: Statuses,
    failed: Codes,
    hostile: Callable[..., RewardServer],
    services: Services,
) -> None:
    posts: dict[str, Any] = {}

    def behave(request: ScoreRequest) -> None:
        if request.method == "POST":
            name = request.content["request_id"]
            posts[name] = request.content
            accept(poll_url=f"/results/{name}")(request)
            return
        name = request.path.rpartition("/")[2]
        rewards = [services.length_of(sample) for sample in posts[name]["samples"]]
        request.answer(orjson.dumps({"request_id": name, "rewards": rewards}))

    report = await ask_probe(hostile(behave).url, component=EITHER)
    assert failed(report) == []
    assert statuses(report)[9] == "ok"
    assert "poll_url" in report.steps[8].detail


async def test_a_service_that_answers_at_once_may_do_so(
    ask_probe: Probe,
    statuses: Statuses,
    hostile: Callable[..., RewardServer],
    services: Services,
    inbox: ProbeInbox,
) -> None:
    report = await ask_probe(hostile(services.good).url, component=EITHER, inbox=inbox)
    assert statuses(report)[9] == "ok"
    assert "at once" in report.steps[8].detail
