"""What a hostile reward service does with a request: one behaviour per path, ``/<behaviour>`` or ``/<behaviour>/<argument>``."""

import asyncio
import contextlib
import gzip
import zlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from urllib.parse import unquote

import orjson

from fakes.hostile_exchange import Exchange, reward_of

HANG_SECONDS = 60.0
RATHER_MUCH = 64 * 1024**2
"""Bytes of the bodies that never seem to end; a client that read them all would show it."""


Behaviour = Callable[[Exchange], Awaitable[None]]
BEHAVIOURS: dict[str, Behaviour] = {}


def behaviour(function: Behaviour) -> Behaviour:
    """Serve the function under its name, with dashes."""
    BEHAVIOURS[function.__name__.replace("_", "-").strip("-")] = function
    return function


def says(name: str, text: str) -> None:
    """A behaviour that is nothing but the text of its body."""
    BEHAVIOURS[name] = lambda exchange: exchange.text(text)


def _last(token: str) -> str:
    return '{"request_id":"ID","rewards":[1,2,3,' + token + "]}"


# --- rows 1 to 9: answers that break the contract --------------------------------------------------------------------
for _name, _text in {
    "one-short": '{"request_id":"ID","rewards":[0.1,0.2,0.3]}',
    "one-for-all": '{"request_id":"ID","rewards":[0.1]}',
    "no-rewards": '{"request_id":"ID","rewards":[]}',
    "nan": _last("NaN"),
    "infinity": _last("Infinity"),
    "minus-infinity": _last("-Infinity"),
    "1e400": _last("1e400"),
    "400-digits": _last("1" * 400),
    "1e300": _last("1e300"),
    "a-text": _last('"0.7"'),
    "a-bool": _last("true"),
    "a-list": _last("[0.7]"),
    "an-object": _last("{}"),
    "no-list": '{"request_id":"ID","rewards":0.5}',
    "a-bare-list": "[1,2,3,4]",
    "neither-form": '{"request_id":"ID"}',
    "both-forms": '{"request_id":"ID","rewards":[],"results":[]}',
    "another-request": '{"request_id":"rwq_1","rewards":[1,2,3,4]}',
    "no-request-id": '{"rewards":[1,2,3,4]}',
    "lone-surrogate": '{"request_id":"\\ud800","rewards":[1,2,3,4]}',
    "trailing-garbage": '{"request_id":"ID","rewards":[1,2,3,4]} x',
    "two-documents": '{"request_id":"ID","rewards":[1,2,3,4]}' * 2,
    "deep-nesting": "[" * 100_000,
    "deep-objects": '{"a":' * 100_000,
    "nothing": "",
}.items():
    says(_name, _text)


@behaviour
async def fine(exchange: Exchange) -> None:
    await exchange.fine()


@behaviour
async def some_null(exchange: Exchange) -> None:
    await exchange.rewards([None, *map(reward_of, exchange.ids[1:])])


@behaviour
async def all_null(exchange: Exchange) -> None:
    await exchange.rewards([None] * len(exchange.ids))


def _entries(exchange: Exchange, **first: Any) -> list[dict[str, Any]]:
    """A result for each sample, the first one as given."""
    others = [{"id": name, "reward": reward_of(name)} for name in exchange.ids[1:]]
    return [{"id": exchange.ids[0], **first}, *others]


async def _with_first(first: dict[str, Any], exchange: Exchange) -> None:
    await exchange.results(_entries(exchange, **first))


for _name, _first in {
    "duplicate-id": {"id": "s1", "reward": 1},
    "unknown-id": {"id": "s99", "reward": 1},
    "two-outcomes": {"reward": 1, "skip": True},
    "no-outcome": {},
    "skip-is-a-number": {"skip": 1},
    "part-is-a-text": {"reward": 1, "components": {"a": "x"}},
}.items():
    BEHAVIOURS[_name] = partial(_with_first, _first)


@behaviour
async def missing_id(exchange: Exchange) -> None:
    await exchange.results(_entries(exchange, reward=1)[:-1])


@behaviour
async def shuffled(exchange: Exchange) -> None:
    await exchange.results(_entries(exchange, reward=reward_of(exchange.ids[0]))[::-1])


@behaviour
async def duplicate_keys(exchange: Exchange) -> None:
    await exchange.text('{"request_id":"x","request_id":"ID","rewards":[9],"rewards":[0,1,2,3]}')


@behaviour
async def invalid_utf8(exchange: Exchange) -> None:
    await exchange.answer(b'{"request_id":"\xff"}')


@behaviour
async def byte_order_mark(exchange: Exchange) -> None:
    start = f'{{"request_id":"{exchange.request_id}"'.encode()
    await exchange.answer(b"\xef\xbb\xbf" + start + b',"rewards":[1,2,3,4]}')


# --- rows 10 to 12: what is no JSON, or too much of it ----------------------------------------------------------------
@behaviour
async def login_page(exchange: Exchange) -> None:
    await exchange.answer(b"<html>please log in</html>", kind="text/html")


@behaviour
async def text_plain(exchange: Exchange) -> None:
    body = orjson.dumps({"request_id": exchange.request_id, "rewards": [1, 2, 3, 4]})
    await exchange.answer(body, kind="text/plain")


@behaviour
async def huge_announced(exchange: Exchange) -> None:
    await exchange.answer(b"{", content_length=str(10**9))
    await _pour(exchange, b"%b")


@behaviour
async def huge_until_close(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
    await _pour(exchange, b"%b")


@behaviour
async def endless_chunks(exchange: Exchange) -> None:
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    await exchange.send(head)
    await _pour(exchange, b"10000\r\n%b\r\n")


async def _pour(exchange: Exchange, frame: bytes) -> None:
    for _ in range(RATHER_MUCH // 65536):
        await exchange.send(frame % (b" " * 65536))
    exchange.keeps = False


@behaviour
async def bomb(exchange: Exchange) -> None:
    packed = {"gzip": gzip.compress, "deflate": zlib.compress}.get(exchange.argument, gzip.compress)
    await exchange.answer(packed(bytes(10**7)), content_encoding=exchange.argument)


# --- rows 13 to 16: time and connections ------------------------------------------------------------------------------
@behaviour
async def slow_body(exchange: Exchange) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n"
    await exchange.send(head)
    await _drip(exchange, b"{")


@behaviour
async def slow_headers(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\n")
    await _drip(exchange, b"x-more: 1\r\n")


@behaviour
async def endless_1xx(exchange: Exchange) -> None:
    await _drip(exchange, b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n")


async def _drip(exchange: Exchange, data: bytes) -> None:
    while not exchange.writer.is_closing():
        await exchange.send(data)
        await asyncio.sleep(0.05)


@behaviour
async def no_answer(exchange: Exchange) -> None:
    """Wait until the client gives up."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(exchange.reader.read(), HANG_SECONDS)


@behaviour
async def reset_in_head(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-ty")
    exchange.reset()


@behaviour
async def reset_in_body(exchange: Exchange) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{"
    await exchange.send(head)
    exchange.reset()


@behaviour
async def short_body(exchange: Exchange) -> None:
    await exchange.answer(b"{", content_length="90", connection="close")


@behaviour
async def closes_at_once(exchange: Exchange) -> None:
    """Not a byte."""


@behaviour
async def closes_idle(exchange: Exchange) -> None:
    """Promise to keep the connection, and close it."""
    await exchange.fine()
    exchange.keeps = False


@behaviour
async def aborts_reused(exchange: Exchange) -> None:
    """The second request on a connection is aborted; at the path's third request a new connection is due."""
    if exchange.number == 2:
        exchange.reset()
    else:
        await exchange.fine()


@behaviour
async def answers_twice(exchange: Exchange) -> None:
    """Each answer is sent two times; its rewards are the number of the request, and nothing else tells which one it is for."""
    rewards = [exchange.number] * len(exchange.request["query"])
    body = orjson.dumps({"rewards": rewards})
    head = (
        f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    await exchange.send((head.encode() + body) * 2)
    exchange.keeps = True


@behaviour
async def no_http(exchange: Exchange) -> None:
    await exchange.send(b"SSH-2.0-OpenSSH_9.9 " + exchange.headers.get("x-key", "").encode())
    await exchange.send(b"\r\n")


@behaviour
async def http_09(exchange: Exchange) -> None:
    await exchange.send(b'{"request_id":"x","rewards":[1,2,3,4]}')


@behaviour
async def huge_cookie(exchange: Exchange) -> None:
    await exchange.answer(b"{}", set_cookie="a=" + "x" * 10_000_000)


@behaviour
async def cookie(exchange: Exchange) -> None:
    body = orjson.dumps({"request_id": exchange.request_id, "rewards": [0] * len(exchange.ids)})
    await exchange.answer(body, set_cookie="session=1; Path=/")


# --- rows 17 to 19, 22 and 23: statuses -------------------------------------------------------------------------------
@behaviour
async def status(exchange: Exchange) -> None:
    """``/status/503``; the body is whatever follows a comma."""
    code, _, body = exchange.argument.partition(",")
    await exchange.answer(body.encode(), f"{code} Status", "text/plain")


@behaviour
async def retry_after(exchange: Exchange) -> None:
    """``/retry-after/VALUE;VALUE`` with 429: each value once."""
    values = unquote(exchange.argument).split(";")
    if exchange.number > len(values):
        await exchange.fine()
    else:
        await exchange.answer(b"", "429 Slow down", retry_after=values[exchange.number - 1])


@behaviour
async def redirect(exchange: Exchange) -> None:
    """``/redirect/307,LOCATION``."""
    code, _, location = exchange.argument.partition(",")
    await exchange.answer(b"", f"{code} Moved", location=location)


@behaviour
async def at_most(exchange: Exchange) -> None:
    """``/at-most/5``: 413 for more samples."""
    if len(exchange.ids) > int(exchange.argument):
        await exchange.answer(b"", "413 Too Large")
    else:
        await exchange.fine()


@behaviour
async def accepted(exchange: Exchange) -> None:
    body = orjson.dumps({"request_id": exchange.request_id, "status": "accepted"})
    await exchange.answer(body, "202 Accepted")


# --- what else ---------------------------------------------------------------------------------------------------------
@behaviour
async def echo(exchange: Exchange) -> None:
    """``/echo/WHERE``: send back all that could be a secret."""
    seen = "; ".join(f"{name}: {value}" for name, value in exchange.headers.items())
    where = exchange.argument
    if where == "feedback":
        await exchange.results(_entries(exchange, reward=1, feedback=seen))
    elif where == "reason":
        await exchange.results(_entries(exchange, skip=True, reason=seen))
    elif where == "error":
        error = {"code": exchange.headers.get("x-key", "")[:60], "message": seen}
        await exchange.results(_entries(exchange, error=error))
    elif where == "request_id":
        body = {"request_id": exchange.headers.get("authorization", ""), "rewards": [1, 2, 3, 4]}
        await exchange.answer(orjson.dumps(body))
    elif where == "header":
        await exchange.answer(b"{}", "503 Busy", www_authenticate=seen)
    elif where == "type":
        await exchange.answer(b"{}", kind=exchange.headers.get("x-key", ""))
    else:
        await exchange.answer(f"{'.' * 490}{seen}".encode(), f"{where} Status", "text/plain")


@behaviour
async def injection(exchange: Exchange) -> None:
    text = "<script>alert(1)</script>\r\nset-cookie: a=1\x00\x1b[31m"
    first = _entries(exchange, reward=1, feedback=text)
    first[1] = {"id": exchange.ids[1], "error": {"code": "x", "message": text}}
    await exchange.results(first)


@behaviour
async def judge(exchange: Exchange) -> None:
    """``/judge/N``: samples with an odd number fail N times each, for a passing reason of their own."""
    is_over = exchange.number > int(exchange.argument)
    error = {"code": "judge_timeout", "message": "the judge slept", "retryable": True}
    await exchange.results(
        [
            {"id": name, "reward": reward_of(name)}
            if is_over or int(name[1:]) % 2 == 0
            else {"id": name, "error": error}
            for name in exchange.ids
        ]
    )
