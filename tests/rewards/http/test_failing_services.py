"""A reward service that is down, slow, busy or wrongly set up: what is tried again, and what ends
at once.
"""

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_spec import RewardBatching, RewardRetry
from dar.rewards.base import Failed, RequestBatch, RewardContext, RewardResult, Scored
from dar.rewards.http.async_results import LaterReply
from dar.rewards.http_reward import HttpOptions, HttpReward
from dar.rewards.protocols.native import NativeProtocol
from fakes.reward_server import RewardServer, ScoreRequest, fine, hang, status
from fakes.reward_types import MakeSamples

Ask = Callable[..., Any]


async def test_every_attempt_sends_the_same_bytes_under_the_same_id(
    hostile: Callable[..., RewardServer], ask: Ask, secret: str, fast: HttpOptions
) -> None:
    busy = status(500)
    server = hostile(busy, busy, fine)
    assert await ask(server.url, secret=secret) == [Scored(0.5)] * 4
    first, *others = server.requests
    assert (first.method, first.target) == ("POST", "/score")
    assert first.headers["idempotency-key"] == first.content["request_id"]
    assert first.headers["accept-encoding"] == "identity"
    assert first.headers["user-agent"].startswith("dar-service/")
    assert 0 < int(first.headers["x-dar-deadline-ms"]) <= fast.timeouts.attempt * 1000
    for other in others:
        assert other.body == first.body
        assert other.headers["webhook-id"] == first.headers["webhook-id"]
        assert other.headers["webhook-signature"].startswith("v1,")
    assert [r.headers["x-dar-attempt"] for r in server.requests] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("body", "content_type", "said"),
    [
        (b"<html>please log in, KEY</html>", "text/html", "a login page or a proxy may have answered"),
        (b"<html>please log in, KEY</html>", "application/json", "the answer is not JSON"),
        (b'{"note": "KEY caf\xe9"}', "application/json", "not UTF-8 from byte 32; encode it as UTF-8"),
        (b"\xef\xbb\xbf{}", "application/json", "starts with a byte order mark"),
        (b"0.5, KEY", "text/plain", "content-type 'text/plain', but application/json is required"),
        (b"{}", "application/json\r\ncontent-type: text/html", "'application/json, text/html', but"),
        (b"{}", "application/json\r\ncontent-type: application/json; charset=utf-8", "request_id"),
    ],
)  # fmt: skip
async def test_an_answer_that_is_no_json_is_quoted_without_secrets(
    hostile: Callable[..., RewardServer], ask: Ask, body: bytes, content_type: str, said: str
) -> None:
    content = body.replace(b"KEY", b"s3cret-of-the-url")
    server = hostile(lambda request: request.answer(content, content_type=content_type))
    found = await ask(f"{server.url}?key=s3cret-of-the-url")
    assert said in found[0].message
    assert "s3cret" not in found[0].message
    if b"KEY" in body:
        assert "[redacted]" in found[0].message


async def test_a_refused_connection_is_a_passing_failure(ask: Ask) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        found = await ask(f"http://127.0.0.1:{closed.getsockname()[1]}/score?token=hidden")
    assert {(result.code, result.is_transient) for result in found} == {("connect", True)}
    assert "connection refused" in found[0].message
    assert "hidden" not in found[0].message


async def test_retry_after_holds_back_every_request(
    hostile: Callable[..., RewardServer], ask: Ask, fast: HttpOptions
) -> None:
    one_by_one = replace(fast, batch=RewardBatching(max_samples=4))
    at: list[float] = []
    all_sent, held_back = threading.Event(), threading.Event()
    busy_at = 0.0

    def busy(request: ScoreRequest) -> None:
        nonlocal busy_at
        assert all_sent.wait(20)
        busy_at = time.monotonic()
        request.answer(b"", status="429 Slow", retry_after="0.15")

    def note(request: ScoreRequest) -> None:
        at.append(time.monotonic())
        if len(at) == 3:
            all_sent.set()
        held_back.wait(20)
        request.fine()

    server = hostile(busy, note)
    found = await ask(server.url, 40, one_by_one, on_wait=lambda _: held_back.set())
    assert found == [Scored(0.5)] * 40
    # Three of the four first requests were on their way already; the repetition and the other six
    # had to wait.
    assert len(at) == 10
    assert all(when - busy_at >= 0.15 for when in at[3:])


async def test_a_request_that_is_too_large_is_halved_and_the_size_remembered(
    hostile: Callable[..., RewardServer],
    fast: HttpOptions,
    make_samples: MakeSamples,
    context: RewardContext,
) -> None:
    def at_most_five(request: ScoreRequest) -> None:
        if len(request.ids) > 5:
            request.answer(b"", status="413 Too Large")
        else:
            request.fine()

    server = hostile(at_most_five)
    source = HttpReward("r", server.url, options=fast)
    assert await source.score(make_samples(16), context) == [Scored(0.5)] * 16
    assert sorted(len(r.ids) for r in server.requests) == [4, 4, 4, 4, 8, 16]
    server.requests.clear()
    await source.score(make_samples(16), context)
    assert [len(r.ids) for r in server.requests] == [4, 4, 4, 4]
    kept = source.state()
    await source.aclose()
    server.requests.clear()
    restarted = HttpReward("r", server.url, options=fast)
    restarted.restore(kept)
    await restarted.score(make_samples(16), context)
    assert [len(r.ids) for r in server.requests] == [4, 4, 4, 4]
    await restarted.aclose()


async def test_a_single_sample_that_is_too_large_fails(
    hostile: Callable[..., RewardServer], ask: Ask
) -> None:
    found = await ask(hostile(status(413)).url)
    assert {(result.code, result.is_transient) for result in found} == {("http_413", False)}


async def test_the_deadline_bounds_all_attempts_together(
    hostile: Callable[..., RewardServer], ask: Ask, impatient: HttpOptions
) -> None:
    timeouts = impatient.timeouts.model_copy(update={"deadline": 0.7})
    options = replace(impatient, timeouts=timeouts, retry=RewardRetry(attempts=20, cap=0.01))
    waits: list[str] = []
    found = await ask(hostile(hang).url, options=options, on_wait=waits.append)
    assert len(waits) <= 2  # of 19: an attempt takes 0.3 s at least
    assert all(isinstance(result, Failed) and result.is_transient for result in found)


async def test_a_part_of_the_requests_may_fail(
    hostile: Callable[..., RewardServer], ask: Ask, fast: HttpOptions
) -> None:
    def odd_groups_fail(request: ScoreRequest) -> None:
        if request.content["samples"][0]["group_id"] == "g1":
            request.answer(b"", status="500 Oops")
        else:
            request.fine()

    options = replace(fast, batch=RewardBatching(max_samples=4))
    found = await ask(hostile(odd_groups_fail).url, 12, options)
    assert [isinstance(result, Scored) for result in found] == [True] * 4 + [False] * 4 + [True] * 4


CERTIFICATE = Path(__file__).parent / "self_signed.pem"
"""Key and certificate of 127.0.0.1, signed by itself, valid until 2126."""


async def test_a_certificate_that_nobody_vouches_for_is_permanent(
    ask: Ask,
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(CERTIFICATE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = await asyncio.start_server(lambda *_: None, sock=listener, ssl=tls)
        async with server:
            with pytest.raises(RewardMisconfiguredError, match="certificate") as caught:
                await ask(f"https://127.0.0.1:{port}/score")
    assert caught.value.error_code == "tls.certificate"


async def test_a_server_without_tls_is_a_passing_failure(
    hostile: Callable[..., RewardServer], ask: Ask, impatient: HttpOptions
) -> None:
    server = hostile()
    found = await ask(server.url.replace("http://", "https://"), options=impatient)
    assert all(isinstance(result, Failed) and result.is_transient for result in found)


class Faulty(NativeProtocol):
    """Decodes with a fault that nobody foresaw."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def decode(self, body: bytes, batch: RequestBatch) -> list[RewardResult]:
        del batch
        raise type(self._error)(f"{self._error} at {body.decode()}")


@pytest.mark.parametrize(
    "error", [RecursionError("deep"), KeyError("x"), UnicodeError("odd"), ssl.SSLError(1, "broken")]
)
@pytest.mark.parametrize("is_later", [False, True])
async def test_a_fault_of_the_client_fails_the_samples_and_says_whose_it_is(
    hostile: Callable[..., RewardServer],
    ask: Ask,
    fast: HttpOptions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    is_later: bool,
) -> None:
    """No exception of one answer ends a job, and none becomes a reward."""
    options = replace(fast, protocol=Faulty(error), headers={"X-Key": "key-93bd77aa01"})
    server = hostile(lambda request: request.json({"x": request.headers["x-key"]}))
    if is_later:
        options = replace(options, allow_async=True)
        server = hostile(lambda request: request.accept(poll_url="/r"))

        def broken(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(LaterReply, "result", broken)
    found = await ask(server.url, options=options)
    assert {(type(result), result.code) for result in found} == {(Failed, "client_fault")}
    assert f"({type(error).__name__}), which is a fault of DAR" in found[0].message
    assert f"{type(error).__name__}: " in caplog.text
    assert "key-93bd77aa01" not in caplog.text
