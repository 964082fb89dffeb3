"""Reward servers against senders and receivers that mean harm, or that are slow."""

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from dar.rewards.base import Scored
from dar.rewards.http.signing import decode_secret, signed_headers
from dar.rewards.http_reward import HttpOptions, HttpReward
from dar.rewards.server import endpoint, reward_server
from fakes.reward_server import RewardServer, ScoreRequest
from fakes.reward_types import MakeSamples

TOKEN = "rwt_" + "k" * 43
SECOND_SECRET = "whsec_" + "c" * 32


def content(**reply: Any) -> dict[str, Any]:
    sample = {
        "id": "s0", "group_id": "g0", "index": 0, "prompt": "p", "messages": None, "completion": "c", "finish_reason": "stop",
        "completion_tokens": 1, "ground_truth": None, "columns": {}, "metadata": {"policy_version": 0, "truncated": False},
    }  # fmt: skip
    return {
        "type": "reward.request", "version": "dar.reward.v1", "request_id": "rwq_1", "job_id": None, "component": "r", "step": 1,
        "mode": "train", "created_at": "2026-11-22T09:40:00Z", "samples": [sample],
        "reply": {"modes": ["sync"], "deadline": "2999-11-22T09:45:00Z", **reply},
    }  # fmt: skip


async def zero(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


class Raw:
    """A connection on which exactly what is given is sent."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=30)

    def send(self, length: int, body: bytes = b"") -> None:
        lines = [
            "POST /score HTTP/1.1",
            "host: x",
            "content-type: application/json",
            f"content-length: {length}",
            "",
            "",
        ]
        self.socket.sendall("\r\n".join(lines).encode() + body)

    def status(self) -> int:
        with self.socket:
            return int(self.socket.recv(65536).split()[1])


async def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent(
    serve_app: Callable[..., str], secret: str
) -> None:
    raw = Raw(serve_app(reward_server(secret=secret, max_body_bytes=1000)(zero)))
    raw.send(1001)
    assert await asyncio.to_thread(raw.status) == 413


async def test_a_body_that_does_not_end_frees_its_place(
    serve_app: Callable[..., str], secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "BODY_SECONDS", 0.1)
    raw = Raw(serve_app(reward_server(secret=secret)(zero)))
    raw.send(1000, b"{")
    assert await asyncio.to_thread(raw.status) == 503


async def test_bodies_that_are_coming_in_share_a_bounded_room(
    serve_app: Callable[..., str], secret: str
) -> None:
    url = serve_app(reward_server(secret=secret, max_body_bytes=1000)(zero))
    held = [Raw(url) for _ in range(endpoint.LARGE_BODIES)]
    for raw in held:
        raw.send(1000, b" " * 999)
    await asyncio.sleep(0.2)  # they are read
    refused = Raw(url)
    refused.send(1000, b" " * 999)
    assert await asyncio.to_thread(refused.status) == 503
    for raw in held:
        raw.socket.sendall(b" ")
        assert await asyncio.to_thread(raw.status) == 401
    another = Raw(url)
    another.send(1000, b" " * 1000)
    assert await asyncio.to_thread(another.status) == 401


async def test_what_is_not_signed_is_not_even_read_as_json(
    serve_app: Callable[..., str], secret: str
) -> None:
    url = serve_app(reward_server(secret=secret)(zero))
    async with httpx2.AsyncClient(trust_env=False) as client:
        headers = {"content-type": "application/json"}
        answer = await client.post(f"{url}/score", content=b"{" * 1000, headers=headers)
        assert answer.status_code == 401
        assert (await client.get(f"{url}/results/rwq_1")).status_code == 401


async def test_a_token_that_a_callback_repeats_is_not_logged(
    serve_app: Callable[..., str],
    secret: str,
    caplog: pytest.LogCaptureFixture,
    hostile: Callable[..., RewardServer],
) -> None:
    def echo(request: ScoreRequest) -> None:
        said = ("x" * 970 + request.headers["authorization"]).encode()
        request.answer(said, status="422 Unprocessable")

    receiver = hostile(echo)
    wanted = content(modes=["sync", "async"], callback={"url": receiver.url, "token": TOKEN})
    url = serve_app(reward_server(secret=secret, asynchronous=True)(slow_zero))
    body = json.dumps(wanted).encode()
    caplog.set_level(logging.DEBUG)
    async with httpx2.AsyncClient(trust_env=False) as client:
        answer = await client.post(f"{url}/score", content=body, headers=signed(secret, body))
        assert answer.status_code == 202
    while "could not be delivered:" not in caplog.text:  # noqa: ASYNC110 - it happens in the server's thread
        await asyncio.sleep(0.01)
    assert len(receiver.requests) == 1
    assert receiver.requests[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert "422" in caplog.text
    assert TOKEN[:8] not in caplog.text


async def slow_zero(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0.05)
    return [0.0] * len(completions)


def signed(secret: str, body: bytes) -> dict[str, str]:
    stamp = int(datetime.now(UTC).timestamp())
    headers = signed_headers([decode_secret(secret)], "rwq_1", stamp, body)
    return {"content-type": "application/json", **headers}


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({"reward": 1.0, "feedback": "\ud800"}, 200),
        ({"skip": True, "reason": "\ud800"}, 200),
        ({"error": "\ud800"}, 200),
        ({"\ud800": 1}, 500),
        (object(), 500),
        (asyncio.CancelledError(), 500),
    ],
)
async def test_whatever_a_function_returns_or_raises_is_answered_with_json(
    serve_app: Callable[..., str], secret: str, answer: Any, status: int
) -> None:
    async def reward(prompts: Any, completions: list[str], **_: Any) -> list[Any]:
        if isinstance(answer, BaseException):
            raise answer
        return [answer]

    url = serve_app(reward_server(secret=secret)(reward))
    body = json.dumps(content()).encode()
    async with httpx2.AsyncClient(trust_env=False) as client:
        found = await client.post(f"{url}/score", content=body, headers=signed(secret, body))
        assert found.status_code == status
        assert set(found.json()) in ({"error"}, {"type", "request_id", "results", "server"})
        assert (await client.get(f"{url}/healthz")).status_code == 200


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_job_that_wants_signed_answers_takes_those_of_a_reward_server(
    serve_app: Callable[..., str],
    secret: str,
    fast: HttpOptions,
    make_samples: MakeSamples,
    context: Any,
    is_async: bool,
) -> None:
    options = replace(fast, require_signed_responses=True, allow_async=is_async)
    url = serve_app(reward_server(secret=[SECOND_SECRET, secret], asynchronous=is_async)(slow_zero))
    for secrets in ([secret], [SECOND_SECRET, secret]):
        source = HttpReward("r", f"{url}/score", secrets=secrets, options=options)
        results = await source.score(make_samples(4), context)
        await source.aclose()
        assert results == [Scored(0.0)] * 4
