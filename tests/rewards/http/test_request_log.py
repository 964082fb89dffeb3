"""Each attempt at a request leaves one line in the log: ids, sizes and times, and nothing that
anybody wrote.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dar.rewards.base import RewardContext, RewardSample
from dar.rewards.http_reward import HttpOptions, HttpReward
from fakes.reward_server import RewardServer, ScoreRequest

HIDDEN = {
    "prompt": "the prompt of the user",
    "completion": "the words of the policy",
    "feedback": "what the judge thinks",
    "header": "tok-0123456789abcdef",
    "secret": "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "query": "key-in-the-query",
    "truth": "the right answer",
}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    caplog.set_level(logging.INFO)

    def read() -> list[dict[str, Any]]:
        start = "reward request "
        said = [r.getMessage() for r in caplog.records if r.name == "dar.rewards.requests"]
        assert all(line.startswith(start) for line in said)
        return [json.loads(line.removeprefix(start)) for line in said]

    return read


def sample() -> RewardSample:
    columns = {"ground_truth": HIDDEN["truth"]}
    return RewardSample(
        "s0", "g0", 0, HIDDEN["prompt"], None, HIDDEN["completion"], "stop", 3, columns=columns
    )


async def asked(source: HttpReward, context: RewardContext, *, times: int = 1) -> None:
    for _ in range(times):
        await source.score([sample()], context)
    await source.aclose()


async def test_an_attempt_is_told_with_its_sizes_and_times(
    server: RewardServer, fast: HttpOptions, context: RewardContext, lines: Callable[[], Any]
) -> None:
    await asked(HttpReward("judge", server.at("fine"), options=fast), context, times=2)
    first, second = lines()
    request = server.requests[0]
    assert first["request_id"] == request.headers["webhook-id"]
    assert request.headers["traceparent"].split("-")[1] == first["trace_id"]
    told = {
        name: first[name]
        for name in (
            "component",
            "step",
            "mode",
            "attempt",
            "samples",
            "outcome",
            "status",
            "is_final",
        )
    }
    assert told == {
        "component": "judge",
        "step": 3,
        "mode": "train",
        "attempt": 1,
        "samples": 1,
        "outcome": "ok",
        "status": 200,
        "is_final": True,
    }
    assert first["bytes_out"] == len(request.body)
    assert first["bytes_in"] > 0
    assert 0 <= first["dns_ms"] <= first["connect_ms"] <= first["ttfb_ms"] <= first["total_ms"]
    assert first["queued_ms"] >= 0
    # the second one went over the same connection
    assert (second["dns_ms"], second["connect_ms"]) == (None, None)
    assert second["ttfb_ms"] <= second["total_ms"]


async def test_attempts_that_fail_are_told_with_what_is_known_of_them(
    server: RewardServer, fast: HttpOptions, context: RewardContext, lines: Callable[[], Any]
) -> None:
    await asked(HttpReward("judge", server.at("status/503?first=1"), options=fast), context)
    await asked(HttpReward("judge", "http://127.0.0.1:61999/score", options=fast), context)
    away, back, *refused = lines()
    assert [
        (one["attempt"], one["outcome"], one["status"], one["is_final"]) for one in (away, back)
    ] == [
        (1, "http_503", 503, False),
        (2, "ok", 200, True),
    ]
    assert away["request_id"] == back["request_id"]
    assert [one["outcome"] for one in refused] == ["connect"] * 3
    assert {(one["connect_ms"], one["ttfb_ms"], one["status"]) for one in refused} == {
        (None, None, None)
    }


@pytest.mark.parametrize("status", ["200 OK", "500 Sorry", "422 Unprocessable", "200 broken"])
async def test_nothing_that_was_written_or_is_secret_is_logged_at_info(
    hostile: Callable[..., RewardServer],
    fast: HttpOptions,
    context: RewardContext,
    caplog: pytest.LogCaptureFixture,
    lines: Callable[[], Any],
    status: str,
) -> None:
    def echo(request: ScoreRequest) -> None:
        said = " ".join([*HIDDEN.values(), request.headers["authorization"]])
        result = {"id": "s0", "reward": 1, "feedback": said}
        content = {"request_id": request.content["request_id"], "results": [result]}
        body = said if status.endswith("broken") else json.dumps(content)
        request.answer(body.encode(), status=status)

    options = replace(fast, headers={"Authorization": f"Bearer {HIDDEN['header']}"})
    url = f"{hostile(echo).url}?token={HIDDEN['query']}"
    source = HttpReward("judge", url, secret=f"whsec_{HIDDEN['secret']}", options=options)
    await asked(source, context)
    assert lines()
    everything = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    for name, text in HIDDEN.items():
        assert text not in everything, name
