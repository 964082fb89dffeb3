"""What a reward server remembers, for how long, and how much may wait."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dar.errors import AuthenticationError, ConfigurationError
from dar.protocol.reward_spec import RewardRetry
from dar.rewards.base import Failed, RewardContext, Scored, Skipped
from dar.rewards.http_reward import HttpOptions, HttpReward
from dar.rewards.server import reward_server

Asks = Callable[..., Any]
Content = Callable[..., dict[str, Any]]


class Counting:
    """Rewards that name the call that gave them."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prompts: Any, completions: list[str], **_: Any) -> list[float]:
        self.calls += 1
        return [float(self.calls)] * len(completions)


async def test_a_request_that_a_successor_sends_again_gets_the_first_answer(
    asking: Asks, content: Content, token: str
) -> None:
    function = Counting()
    server = asking(function)
    first = await server.post(content(seconds=60))
    callback = {"url": "http://127.0.0.1:61999/x", "token": token}
    again = content(seconds=90, is_async=True, callback=callback)
    again["samples"] = [dict(reversed(sample.items())) for sample in again["samples"]]
    assert again["created_at"] != content()["created_at"]
    assert (await server.post(again)).content == first.content
    assert function.calls == 1


@pytest.mark.parametrize(
    "change",
    [
        {"completions": ("a", "other")},
        {"completions": ("a",)},
        {"step": 4},
        {"mode": "eval"},
        {"component": "q"},
        {"job_id": None},
    ],
)
async def test_a_known_id_with_another_request_is_a_conflict(
    asking: Asks, content: Content, change: dict[str, Any]
) -> None:
    function = Counting()
    server = asking(function)
    assert (await server.post()).status_code == 200
    answer = await server.post(content(**change))
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "idempotency_mismatch"
    assert "rwq_1 came before with other samples" in answer.json()["error"]["message"]
    assert function.calls == 1
    assert (await server.post()).status_code == 200


async def test_a_signed_id_that_is_not_the_requests_is_refused(asking: Asks) -> None:
    answer = await asking(Counting()).post(message_id="rwq_2")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


async def test_a_full_queue_refuses_new_requests_and_joins_known_ones(
    asking: Asks, content: Content, gate: Any, eventually: Asks
) -> None:
    server = asking(gate, max_calls=1, max_waiting=1)
    running = asyncio.create_task(server.post(content("rwq_1")))
    await eventually(gate.began.is_set)
    # With the queue full, whichever comes second is refused.
    waiting = [asyncio.create_task(server.post(content(f"rwq_{n}"))) for n in (2, 3)]
    await eventually(lambda: any(task.done() for task in waiting))
    refused = next(task for task in waiting if task.done()).result()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    joined = asyncio.create_task(server.post(content("rwq_1")))
    gate.opened.set()
    assert {task.status_code for task in await asyncio.gather(running, joined)} == {200}
    assert sorted([(await task).status_code for task in waiting]) == [200, 503]
    assert (await server.post(content("rwq_4"))).status_code == 200
    assert len(gate.calls) == 3


async def test_a_job_comes_through_a_full_queue(
    serve_app: Asks, make_samples: Asks, fast: HttpOptions, context: RewardContext
) -> None:
    function = Counting()
    url = serve_app(reward_server(max_waiting=0)(function))
    options = replace(fast, retry=RewardRetry(attempts=20, cap=0.01, retry_after_cap=0.01))
    source = HttpReward("r", f"{url}/score", options=options)
    found = await source.score(make_samples(64, 16), context)
    assert all(isinstance(result, Scored) for result in found)
    assert function.calls == 4
    await source.aclose()


@pytest.mark.parametrize("bound", [{"max_answers": 1}, {"max_answer_bytes": 200}])
async def test_the_oldest_answer_is_forgotten_beyond_a_number_and_a_size(
    asking: Asks, content: Content, bound: dict[str, int]
) -> None:
    function = Counting()
    server = asking(function, **bound)
    sizes = [len((await server.post(content(name))).content) for name in ("rwq_1", "rwq_2")]
    assert all(100 < size <= 200 for size in sizes)
    assert function.calls == 2
    await server.post(content("rwq_2"))
    assert function.calls == 2
    await server.post(content("rwq_1"))
    assert function.calls == 3


@pytest.mark.parametrize(("seconds", "calls"), [(-1, 2), (60, 1)])
async def test_an_answer_is_kept_for_its_time_and_at_least_until_its_deadline(
    asking: Asks, content: Content, seconds: float, calls: int
) -> None:
    function = Counting()
    server = asking(function, remembered_seconds=0)
    for _ in range(2):
        await server.post(content(seconds=seconds))
    assert function.calls == calls


async def test_a_promised_answer_is_forgotten_last(asking: Asks, content: Content) -> None:
    server = asking(Counting(), asynchronous=True, max_answers=2)
    assert (await server.post(content("rwq_0", is_async=True))).status_code == 202
    for n in range(1, 5):
        assert (await server.post(content(f"rwq_{n}"))).status_code == 200
    assert (await server.result("rwq_0")).status_code == 200


async def test_a_mapping_says_more_than_a_number(
    serve_app: Asks, make_samples: Asks, fast: HttpOptions, context: RewardContext, ask: Asks
) -> None:
    def reward(prompts: Any, completions: Any, **_: Any) -> list[Any]:
        return [
            {"reward": 0.5, "components": {"correct": 1}, "feedback": "why"},
            {"skip": True, "reason": "no maths"},
            {"error": {"code": "judge_timeout", "message": "too slow"}},
            {"reward": math.nan},
        ]

    found = await ask(serve_app(reward_server(reward)) + "/score")
    assert found[0] == Scored(0.5, {"correct": 1.0}, "why")
    assert found[1] == Skipped("no maths")
    assert found[2] == Failed("service.judge_timeout", "too slow", is_transient=False)
    assert (found[3].code, found[3].is_transient) == ("service.nonfinite", False)


async def test_an_error_of_ours_that_the_function_raises_is_no_answer_to_the_sender(
    asking: Asks,
) -> None:
    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        raise AuthenticationError("the judge's key has expired")

    answer = await asking(reward).post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "reward_function_failed")
    assert "expired" not in answer.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_calls": 0}, "max_calls is 0, but must be at least 1"),
        ({"max_waiting": -1}, "max_waiting"),
        ({"stop_seconds": math.inf}, "stop_seconds"),
        ({"path": "score"}, "path is 'score'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        reward_server(**options)
