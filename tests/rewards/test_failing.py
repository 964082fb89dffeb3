"""A reward service that is down, slow, busy or wrongly set up: what is tried again, and what ends at once."""

import asyncio
import contextlib
import gzip
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_spec import RewardBatching, RewardRetry
from dar.rewards.base import Failed, RewardContext, Scored
from dar.rewards.http import HttpOptions, HttpReward

Ask = Callable[..., Any]


def reset(request: Any) -> None:
    request.send(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{"
    )
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


def slow_loris(request: Any) -> None:
    request.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n")
    while not request.stopping.wait(0.05):
        request.send(b"{")


def slow_headers(request: Any) -> None:
    request.send(b"HTTP/1.1 200 OK\r\n")
    while not request.stopping.wait(0.05):
        request.send(b"x-more: 1\r\n")


ENDLESS = {
    "no answer": lambda r: r.hang(),
    "one byte at a time": slow_loris,
    "one header at a time": slow_headers,
}


@pytest.mark.parametrize("name", ENDLESS)
async def test_an_answer_without_end_is_cut_off_and_asked_for_again(
    hostile: Callable[..., Any], ask: Ask, impatient: HttpOptions, name: str
) -> None:
    waits: list[str] = []
    found = await ask(hostile(ENDLESS[name]).url, options=impatient, on_wait=waits.append)
    assert [(type(result), result.code) for result in found] == [(Failed, "timeout")] * 4
    assert all(result.is_transient for result in found)
    assert len(waits) == 2


PASSING_FAILURES = {
    "reset in the body": (reset, "connect"),
    "closed in the body": (lambda r: r.answer(b"{", content_length="90"), "protocol"),
    "closed at once": (lambda r: r.connection.close(), "protocol"),
    "no HTTP": (lambda r: r.send(b"SSH-2.0-OpenSSH\r\n"), "protocol"),
    "500": (lambda r: r.answer(b"", status="500 Oops"), "http_500"),
    "503 in gzip": (
        lambda r: r.answer(gzip.compress(b"x"), status="503 Busy", content_encoding="gzip"),
        "http_503",
    ),
    "429": (lambda r: r.answer(b"", status="429 Slow"), "http_429"),
    "408": (lambda r: r.answer(b"", status="408 Late"), "http_408"),
    "529": (lambda r: r.answer(b"", status="529 Overloaded"), "http_529"),
}


@pytest.mark.parametrize("name", PASSING_FAILURES)
async def test_a_passing_failure_is_tried_again_as_often_as_told(
    hostile: Callable[..., Any], ask: Ask, name: str
) -> None:
    behave, code = PASSING_FAILURES[name]
    server = hostile(behave)
    found = await ask(server.url)
    assert [(type(result), result.code) for result in found] == [(Failed, code)] * 4
    assert all(result.is_transient for result in found)
    assert len(server.requests) == 3


async def test_every_attempt_sends_the_same_bytes_under_the_same_id(
    hostile: Callable[..., Any], ask: Ask, secret: str, fast: HttpOptions
) -> None:
    busy = lambda r: r.answer(b"", status="500 Oops")  # noqa: E731 - a behaviour like those above
    server = hostile(busy, busy, lambda r: r.fine())
    assert await ask(server.url, secret=secret) == [Scored(0.5)] * 4
    first, *others = server.requests
    assert first.line == "POST /score HTTP/1.1"
    assert first.headers["idempotency-key"] == first.content["request_id"]
    assert first.headers["accept-encoding"] == "identity"
    assert first.headers["user-agent"].startswith("dar-service/")
    assert 0 < int(first.headers["x-dar-deadline-ms"]) <= fast.timeouts.attempt * 1000
    for other in others:
        assert other.body == first.body
        assert other.headers["webhook-id"] == first.headers["webhook-id"]
        assert other.headers["webhook-signature"].startswith("v1,")
    assert [r.headers["x-dar-attempt"] for r in server.requests] == ["1", "2", "3"]


async def test_a_kept_connection_that_breaks_costs_no_attempt(
    fast: HttpOptions, make_samples: Any, context: RewardContext
) -> None:
    received: list[tuple[int, dict[str, str]]] = []
    handlers: list[asyncio.Task[Any] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        number = len(handlers)
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")[1:-2]
                headers = dict(line.split(": ", 1) for line in head)
                body = await reader.readexactly(int(headers["content-length"]))
                received.append((number, headers))
                if len(received) == 2:
                    break
                answer = {"request_id": orjson.loads(body)["request_id"], "rewards": [0.5] * 4}
                content = orjson.dumps(answer)
                start = f"HTTP/1.1 200 OK\r\ncontent-length: {len(content)}\r\n"
                writer.write(f"{start}content-type: application/json\r\n\r\n".encode() + content)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/score"
        source = HttpReward("r", url, options=replace(fast, retry=RewardRetry(attempts=1)))
        for _ in range(2):
            assert await source.score(make_samples(4), context) == [Scored(0.5)] * 4
        await source.aclose()
        await asyncio.gather(*filter(None, handlers))
    assert [number for number, _ in received] == [1, 1, 2]
    broken, repeated = received[1][1], received[2][1]
    assert broken["idempotency-key"] == repeated["idempotency-key"]
    assert [broken["x-dar-attempt"], repeated["x-dar-attempt"]] == ["1", "1"]


async def test_a_refused_connection_is_a_passing_failure(ask: Ask) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        found = await ask(f"http://127.0.0.1:{closed.getsockname()[1]}/score?token=hidden")
    assert {(result.code, result.is_transient) for result in found} == {("connect", True)}
    assert "connection refused" in found[0].message
    assert "hidden" not in found[0].message


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("0.1", "0.1 s"),
        ("999999", "0.2 s"),
        ("Sun, 06 Nov 1994 08:49:37 GMT", "0.0 s"),
        ("-1", "0.0 s"),
        ("soon", "0.0 s"),
    ],
)
async def test_retry_after_is_kept_within_bounds(
    hostile: Callable[..., Any], ask: Ask, value: str, wait: str
) -> None:
    waits: list[str] = []
    server = hostile(
        lambda r: r.answer(b"", status="429 Slow", retry_after=value), lambda r: r.fine()
    )
    started = time.monotonic()
    assert await ask(server.url, on_wait=waits.append) == [Scored(0.5)] * 4
    assert time.monotonic() - started >= float(wait.split()[0])
    assert [message.rpartition(" in ")[2] for message in waits] == [wait]


async def test_a_wait_beyond_the_deadline_fails_at_once(
    hostile: Callable[..., Any], ask: Ask, fast: HttpOptions
) -> None:
    server = hostile(lambda r: r.answer(b"", status="503 Busy", retry_after="100"))
    patient = replace(fast, retry=RewardRetry(attempts=3, base=0.005, retry_after_cap=60))
    waits: list[str] = []
    found = await ask(server.url, options=patient, on_wait=waits.append)
    assert waits == []
    assert all(result.code == "http_503" and result.is_transient for result in found)
    assert len(server.requests) == 1


async def test_retry_after_holds_back_every_request(
    hostile: Callable[..., Any], ask: Ask, fast: HttpOptions
) -> None:
    one_by_one = replace(fast, batch=RewardBatching(max_samples=4))
    at: list[float] = []
    all_sent, held_back = threading.Event(), threading.Event()
    busy_at = 0.0

    def busy(request: Any) -> None:
        nonlocal busy_at
        assert all_sent.wait(20)
        busy_at = time.monotonic()
        request.answer(b"", status="429 Slow", retry_after="0.15")

    def note(request: Any) -> None:
        at.append(time.monotonic())
        if len(at) == 3:
            all_sent.set()
        held_back.wait(20)
        request.fine()

    server = hostile(busy, note)
    found = await ask(server.url, 40, one_by_one, on_wait=lambda _: held_back.set())
    assert found == [Scored(0.5)] * 40
    # Three of the four first requests were on their way already; the repetition and the other six had to wait.
    assert len(at) == 10
    assert all(when - busy_at >= 0.15 for when in at[3:])


PERMANENT = {
    "a redirect": (
        lambda r: r.answer(b"", status="302 Found", location="http://169.254.169.254/"),
        "config.redirect",
    ),
    "307": (
        lambda r: r.answer(b"", status="307 Temporary Redirect", location="/score"),
        "config.redirect",
    ),
    "401": (lambda r: r.answer(b"who are you" + b"?" * 2000, status="401 No"), "http_401"),
    "403": (lambda r: r.answer(b"", status="403 No"), "http_403"),
    "404": (lambda r: r.answer(b"", status="404 No"), "http_404"),
    "405": (lambda r: r.answer(b"", status="405 No"), "http_405"),
    "410": (lambda r: r.answer(b"", status="410 Gone"), "http_410"),
    "415": (lambda r: r.answer(b"", status="415 No"), "http_415"),
    "418": (lambda r: r.answer(b"", status="418 Teapot"), "http_418"),
}


@pytest.mark.parametrize("name", PERMANENT)
async def test_a_refusal_for_good_stops_at_once(
    hostile: Callable[..., Any], ask: Ask, name: str
) -> None:
    behave, code = PERMANENT[name]
    server = hostile(behave)
    with pytest.raises(RewardMisconfiguredError) as caught:
        await ask(server.url)
    assert caught.value.error_code == code
    assert server.url in caught.value.message
    assert len(server.requests) == 1
    if name == "401":
        assert "HTTP 401: who are you???" in caught.value.message
        assert caught.value.message.count("?") <= 512


@pytest.mark.parametrize("status", ["400 Bad", "422 Bad"])
async def test_refused_samples_fail_without_a_retry(
    hostile: Callable[..., Any], ask: Ask, status: str
) -> None:
    server = hostile(lambda r: r.answer(b"too odd", status=status))
    found = await ask(server.url)
    assert {(result.code, result.is_transient) for result in found} == {
        (f"http_{status[:3]}", False)
    }
    assert "too odd" in found[0].message
    assert len(server.requests) == 1


async def test_a_request_that_is_too_large_is_halved_and_the_size_remembered(
    hostile: Callable[..., Any], fast: HttpOptions, make_samples: Any, context: RewardContext
) -> None:
    def at_most_five(request: Any) -> None:
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
    hostile: Callable[..., Any], ask: Ask
) -> None:
    found = await ask(hostile(lambda r: r.answer(b"", status="413 Too Large")).url)
    assert {(result.code, result.is_transient) for result in found} == {("http_413", False)}


async def test_the_deadline_bounds_all_attempts_together(
    hostile: Callable[..., Any], ask: Ask, impatient: HttpOptions
) -> None:
    timeouts = impatient.timeouts.model_copy(update={"deadline": 0.7})
    options = replace(impatient, timeouts=timeouts, retry=RewardRetry(attempts=20, cap=0.01))
    waits: list[str] = []
    found = await ask(hostile(lambda r: r.hang()).url, options=options, on_wait=waits.append)
    assert len(waits) <= 2  # of 19: an attempt takes 0.3 s at least
    assert all(isinstance(result, Failed) and result.is_transient for result in found)


async def test_a_part_of_the_requests_may_fail(
    hostile: Callable[..., Any], ask: Ask, fast: HttpOptions
) -> None:
    def odd_groups_fail(request: Any) -> None:
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
    hostile: Callable[..., Any], ask: Ask, impatient: HttpOptions
) -> None:
    server = hostile(lambda r: r.fine())
    found = await ask(server.url.replace("http://", "https://"), options=impatient)
    assert all(isinstance(result, Failed) and result.is_transient for result in found)
