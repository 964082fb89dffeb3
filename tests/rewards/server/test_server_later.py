"""A reward server that answers 202: its results are fetched, or posted until they are taken or
refused.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from dar.errors import ConfigurationError
from dar.protocol.rewards import decode_response, decode_result
from dar.rewards.base import Scored
from dar.rewards.http.signing import decode_secret, verify
from dar.rewards.http_reward import HttpOptions
from dar.rewards.server import reward_server
from fakes.reward_server import RewardServer, ScoreRequest

Asks = Callable[..., Any]
Content = Callable[..., dict[str, Any]]
IDS = ["s0", "s1"]


@pytest.fixture
def posts(hostile: Callable[..., RewardServer], token: str) -> Asks:
    """A receiver of callbacks, and what a request says about it."""

    def make(*behaviours: Callable[[Any], None]) -> tuple[Any, dict[str, str]]:
        receiver = hostile(*behaviours)
        return receiver, {"url": receiver.url, "token": token}

    return make


def says(status: str, **headers: str) -> Callable[[Any], None]:
    def behave(request: ScoreRequest) -> None:
        request.answer(b'{"error":{"message":"because of this"}}', status=status, **headers)

    return behave


def taken(request: ScoreRequest) -> None:
    request.answer(b'{"status":"accepted"}')


def breaks_off(request: ScoreRequest) -> None:
    request.connection.close()


async def test_a_job_fetches_results_that_come_later(
    serve_app: Asks, ask: Asks, later: HttpOptions, secret: str, gate: Any
) -> None:
    options = replace(later, require_signed_responses=True)
    url = serve_app(reward_server(secret=secret, asynchronous=True)(gate)) + "/score"
    asked = asyncio.create_task(ask(url, options=options, secret=secret))
    await asyncio.to_thread(gate.began.wait, 30)
    gate.opened.set()
    assert await asked == [Scored(2.0)] * 4
    assert gate.calls == [["c0", "c1", "c2", "c3"]]


@pytest.mark.parametrize("allows_later", [True, False])
async def test_an_answer_that_is_ready_in_time_comes_at_once_and_signed(
    serve_app: Asks, ask: Asks, later: HttpOptions, secret: str, gate: Any, allows_later: bool
) -> None:
    gate.opened.set()
    app = reward_server(secret=secret, answer_within_seconds=30 if allows_later else 0)(gate)
    options = replace(later, allow_async=allows_later, require_signed_responses=True)
    assert await ask(serve_app(app) + "/score", options=options, secret=secret) == [Scored(2.0)] * 4


async def test_results_are_found_under_a_prefix(
    serve_app: Asks, ask: Asks, later: HttpOptions, gate: Any
) -> None:
    gate.opened.set()
    inner = reward_server(asynchronous=True, path="/my/score")(gate)
    url = serve_app(Starlette(routes=[Mount("/team", inner)])) + "/team/my/score"
    assert await ask(url, options=later) == [Scored(2.0)] * 4


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/a%20b/score", "/a%20b/score"),
        ("/a b/score", "/a%20b/score"),
        ("/schön", "/sch%C3%B6n"),
        ("/100%/x", "/100%25/x"),
        ("/a~b+c:d", "/a~b+c:d"),
    ],
)
async def test_a_path_may_be_written_with_or_without_escapes(
    serve_app: Asks, ask: Asks, later: HttpOptions, gate: Any, path: str, shown: str
) -> None:
    gate.opened.set()
    app = reward_server(asynchronous=True, path=path)(gate)
    assert app.state.reward_path == shown
    assert await ask(serve_app(app) + shown, options=later) == [Scored(2.0)] * 4


@pytest.mark.parametrize("path", ["score", "/a/..", "/./a", "/%2e%2e/a", "/%7Bx}", "/%ff", "/a%00"])
def test_a_path_that_no_client_would_send_is_refused(gate: Any, path: str) -> None:
    with pytest.raises(ConfigurationError, match="must be a URL path"):
        reward_server(path=path)(gate)


async def test_a_202_promises_and_a_repetition_does_not_score_twice(
    asking: Asks, content: Content, gate: Any
) -> None:
    server = asking(gate, asynchronous=True)
    answers = [await server.post(content(is_async=True)) for _ in range(2)]
    for answer in (*answers, await server.poll()):
        assert answer.status_code == 202
        assert answer.json().items() >= {"request_id": "rwq_1", "status": "accepted"}.items()
    assert answers[0].json()["poll_url"] == "results/rwq_1"
    gate.opened.set()
    found = await server.result()
    results = decode_response(found.content, request_id="rwq_1", ids=IDS)
    assert [result.reward for result in results] == [1.0, 2.0]
    assert (await server.post(content(is_async=True))).content == found.content
    assert len(gate.calls) == 1


async def test_a_poll_is_opened_by_a_signature_under_its_requests_id(
    asking: Asks, gate: Any, content: Content
) -> None:
    server = asking(gate, asynchronous=True)
    await server.post(content(is_async=True))
    assert (await server.poll(message_id="rwq_2")).status_code == 401
    assert (await server.client.get("/results/rwq_1")).status_code == 401
    assert (await server.poll("rwq_2")).status_code == 404


async def test_a_callback_carries_the_token_the_type_and_a_signature(
    asking: Asks,
    content: Content,
    gate: Any,
    posts: Asks,
    secret: str,
    token: str,
    eventually: Asks,
) -> None:
    receiver, callback = posts(taken)
    server = asking(gate, asynchronous=True)
    await server.post(content(is_async=True, callback=callback))
    assert receiver.requests == []
    gate.opened.set()
    await eventually(lambda: receiver.requests)
    [request] = receiver.requests
    assert request.headers["authorization"] == f"Bearer {token}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"].startswith("rwr_")
    verify([decode_secret(secret)], request.headers, request.body)
    results = decode_result(request.body, request_id="rwq_1", ids=IDS)
    assert [result.reward for result in results] == [1.0, 2.0]
    assert (await server.result()).content == request.body


async def test_a_callback_is_repeated_while_its_failure_may_pass(
    asking: Asks, content: Content, gate: Any, posts: Asks, eventually: Asks
) -> None:
    receiver, callback = posts(
        says("503 Later", retry_after="0"), breaks_off, says("429 Slowly"), says("500 Oops"), taken
    )
    gate.opened.set()
    server = asking(gate, asynchronous=True)
    await server.post(content(is_async=True, callback=callback))
    await eventually(lambda: len(receiver.requests) == 5)
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1
    assert len({request.body for request in receiver.requests}) == 1


async def test_a_callback_is_repeated_after_any_error_of_the_connection(
    asking: Asks,
    content: Content,
    gate: Any,
    eventually: Asks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    posts: Asks,
) -> None:
    """The HTTP library passes on errors of TLS after the handshake, and of odd host names."""
    real = httpx2.AsyncHTTPTransport.handle_async_request
    errors = [ssl.SSLError(1, "certificate required"), UnicodeError("empty label"), OSError()]

    async def handle(self: Any, request: httpx2.Request) -> httpx2.Response:
        if errors and str(request.url) == callback["url"]:
            raise errors.pop()
        return await real(self, request)

    monkeypatch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", handle)
    gate.opened.set()
    receiver, callback = posts(taken)
    server = asking(gate, asynchronous=True)
    await server.post(content(is_async=True, callback=callback))
    await eventually(lambda: receiver.requests)
    assert caplog.text.count("was not delivered") == 3


REFUSALS = ["401 No", "409 Conflict", "410 Gone", "413 Large", "422 Invalid", "302 Found"]


@pytest.mark.parametrize("status", REFUSALS)
async def test_a_refusal_ends_a_callback_with_a_clear_line(
    asking: Asks,
    content: Content,
    gate: Any,
    posts: Asks,
    eventually: Asks,
    caplog: pytest.LogCaptureFixture,
    token: str,
    status: str,
) -> None:
    receiver, callback = posts(says(status, location="/elsewhere"), taken)
    gate.opened.set()
    server = asking(gate, asynchronous=True)
    with caplog.at_level(logging.INFO):
        await server.post(content(is_async=True, callback=callback))
        await eventually(lambda: "could not be delivered:" in caplog.text)
    assert f"the result of rwq_1 could not be delivered: HTTP {status[:3]}" in caplog.text
    assert "because of this" in caplog.text
    assert token not in caplog.text
    assert len(receiver.requests) == 1
    assert (await server.result()).status_code == 200


async def test_a_callback_ends_with_the_deadline(
    asking: Asks,
    content: Content,
    gate: Any,
    posts: Asks,
    eventually: Asks,
    caplog: pytest.LogCaptureFixture,
) -> None:
    receiver, callback = posts(says("503 Later"))
    gate.opened.set()
    server = asking(gate, asynchronous=True)
    await server.post(content(is_async=True, callback=callback, seconds=1.0))
    await eventually(lambda: "was not delivered before its deadline" in caplog.text)
    assert receiver.requests


@pytest.mark.parametrize("hours", [-1, 1])
async def test_the_clock_of_the_trainers_machine_may_be_off(
    asking: Asks, content: Content, gate: Any, posts: Asks, eventually: Asks, hours: int
) -> None:
    receiver, callback = posts(taken)
    gate.opened.set()
    server = asking(gate, asynchronous=True)
    created_at = datetime.now(UTC) + timedelta(hours=hours)
    request = content(is_async=True, callback=callback, created_at=created_at.isoformat())
    request["reply"]["deadline"] = (created_at + timedelta(seconds=60)).isoformat()
    await server.post(request)
    await eventually(lambda: bool(receiver.requests))


async def test_the_newest_requests_callback_is_used(
    asking: Asks, content: Content, gate: Any, posts: Asks, eventually: Asks
) -> None:
    old, callback = posts(taken)
    new, _ = posts(taken)
    server = asking(gate, asynchronous=True)
    await server.post(content(is_async=True, callback=callback))
    fresh = {"url": new.url, "token": "rwt_" + "n" * 43}
    assert (await server.post(content(is_async=True, callback=fresh))).status_code == 202
    gate.opened.set()
    await eventually(lambda: new.requests)
    assert new.requests[0].headers["authorization"] == f"Bearer {fresh['token']}"
    assert old.requests == []
    assert len(gate.calls) == 1


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "http://me:pw@127.0.0.1/", "//x", "http://[x/", "http://_xn--a/"],
)
async def test_only_a_web_address_is_called_back(
    asking: Asks,
    content: Content,
    gate: Any,
    token: str,
    eventually: Asks,
    caplog: pytest.LogCaptureFixture,
    url: str,
) -> None:
    gate.opened.set()
    server = asking(gate, asynchronous=True)
    await server.post(content(is_async=True, callback={"url": url, "token": token}))
    await eventually(lambda: "could not be delivered: its callback's url is" in caplog.text)
    assert (await server.result()).status_code == 200


async def test_a_function_that_fails_after_a_202_is_asked_again_in_a_new_request(
    serve_app: Asks, ask: Asks, later: HttpOptions
) -> None:
    calls: list[int] = []

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a slip")
        return [0.5] * len(completions)

    url = serve_app(reward_server(asynchronous=True)(reward)) + "/score"
    assert await ask(url, options=later) == [Scored(0.5)] * 4
    assert len(calls) == 2
