"""What a hostile reward service does with a request: `misbehave` is a manner for each path.

``/<name>`` or ``/<name>/<argument>``. ``/fine`` is the path that conforms; a path that ends in
``?first=N`` misbehaves N times and then conforms.
"""

import gzip
import ssl
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import orjson

from fakes.reward_server import RewardServer, ScoreRequest

RATHER_MUCH = 64 * 1024**2
"""Bytes of the bodies that never seem to end; a client that read them all would show it."""


Behaviour = Callable[[ScoreRequest], None]
BEHAVIOURS: dict[str, Behaviour] = {}


def reward_of(sample_id: str) -> float:
    """The reward that a conforming answer has for this sample: the digits of its id, over 8."""
    return int("0" + "".join(ch for ch in sample_id if ch.isdigit())) / 8


def argument_of(request: ScoreRequest) -> str:
    """What follows the name in the path."""
    return unquote(request.path[1:].partition("/")[2])


def misbehave(request: ScoreRequest) -> None:
    """Do what the path says."""
    name = request.path[1:].partition("/")[0]
    first = int(parse_qs(urlsplit(request.target).query).get("first", ["0"])[0])
    BEHAVIOURS["fine" if first and request.number > first else name](request)


def hostile_server(tls: ssl.SSLContext | None = None) -> RewardServer:
    """A server all of whose paths misbehave, each in its own way."""
    return RewardServer(misbehave, reward=lambda sample: reward_of(sample["id"]), tls=tls)


def behaviour(function: Behaviour) -> Behaviour:
    """Serve the function under its name, with dashes."""
    BEHAVIOURS[function.__name__.replace("_", "-").strip("-")] = function
    return function


def text(body: str, request: ScoreRequest) -> None:
    """Exactly this body with status 200, with the right request id for ``ID``."""
    request.answer(body.replace("ID", request.request_id).encode())


def _last(token: str) -> str:
    return '{"request_id":"ID","rewards":[1,2,3,' + token + "]}"


# --- rows 1 to 9: answers that break the contract -------------------------------------------------
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
    BEHAVIOURS[_name] = partial(text, _text)


@behaviour
def fine(request: ScoreRequest) -> None:
    request.fine()


@behaviour
def some_null(request: ScoreRequest) -> None:
    request.rewards([None, *map(reward_of, request.ids[1:])])


@behaviour
def all_null(request: ScoreRequest) -> None:
    request.rewards([None] * len(request.ids))


def _entries(request: ScoreRequest, **first: Any) -> list[dict[str, Any]]:
    """A result for each sample, the first one as given."""
    others = [{"id": name, "reward": reward_of(name)} for name in request.ids[1:]]
    return [{"id": request.ids[0], **first}, *others]


def _with_first(first: dict[str, Any], request: ScoreRequest) -> None:
    request.results(_entries(request, **first))


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
def missing_id(request: ScoreRequest) -> None:
    request.results(_entries(request, reward=1)[:-1])


@behaviour
def shuffled(request: ScoreRequest) -> None:
    request.results(_entries(request, reward=reward_of(request.ids[0]))[::-1])


@behaviour
def duplicate_keys(request: ScoreRequest) -> None:
    text('{"request_id":"x","request_id":"ID","rewards":[9],"rewards":[0,1,2,3]}', request)


@behaviour
def invalid_utf8(request: ScoreRequest) -> None:
    request.answer(b'{"request_id":"\xff"}')


@behaviour
def byte_order_mark(request: ScoreRequest) -> None:
    start = f'{{"request_id":"{request.request_id}"'.encode()
    request.answer(b"\xef\xbb\xbf" + start + b',"rewards":[1,2,3,4]}')


# --- rows 10 to 12: what is no JSON, or too much of it --------------------------------------------
@behaviour
def login_page(request: ScoreRequest) -> None:
    request.answer(b"<html>please log in</html>", content_type="text/html")


@behaviour
def text_plain(request: ScoreRequest) -> None:
    body = orjson.dumps({"request_id": request.request_id, "rewards": [1, 2, 3, 4]})
    request.answer(body, content_type="text/plain")


@behaviour
def huge_announced(request: ScoreRequest) -> None:
    request.answer(b"{", content_length=str(10**9))
    _pour(request, b"%b")


@behaviour
def huge_until_close(request: ScoreRequest) -> None:
    request.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
    _pour(request, b"%b")


@behaviour
def endless_chunks(request: ScoreRequest) -> None:
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    request.send(head)
    _pour(request, b"10000\r\n%b\r\n")


def _pour(request: ScoreRequest, frame: bytes) -> None:
    for _ in range(RATHER_MUCH // 65536):
        request.send(frame % (b" " * 65536))
    request.keeps = False


@behaviour
def bomb(request: ScoreRequest) -> None:
    packed = {"gzip": gzip.compress, "deflate": zlib.compress}.get(
        argument_of(request), gzip.compress
    )
    request.answer(packed(bytes(10**7)), content_encoding=argument_of(request))


# --- rows 13 to 16: time and connections ----------------------------------------------------------
@behaviour
def slow_body(request: ScoreRequest) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n"
    request.send(head)
    _drip(request, b"{")


@behaviour
def slow_headers(request: ScoreRequest) -> None:
    request.send(b"HTTP/1.1 200 OK\r\n")
    _drip(request, b"x-more: 1\r\n")


@behaviour
def endless_1xx(request: ScoreRequest) -> None:
    _drip(request, b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n")


def _drip(request: ScoreRequest, data: bytes) -> None:
    while not request.server.stopping.wait(0.05):
        request.send(data)


@behaviour
def no_answer(request: ScoreRequest) -> None:
    """Wait until the client gives up."""
    while request.connection.recv(65536):
        pass


@behaviour
def reset_in_head(request: ScoreRequest) -> None:
    request.send(b"HTTP/1.1 200 OK\r\ncontent-ty")
    request.reset()


@behaviour
def reset_in_body(request: ScoreRequest) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{"
    request.send(head)
    request.reset()


@behaviour
def short_body(request: ScoreRequest) -> None:
    request.answer(b"{", content_length="90", connection="close")


@behaviour
def closes_at_once(request: ScoreRequest) -> None:
    """Not a byte."""


@behaviour
def closes_idle(request: ScoreRequest) -> None:
    """Promise to keep the connection, and close it."""
    request.fine()
    request.keeps = False


@behaviour
def aborts_reused(request: ScoreRequest) -> None:
    """The second request on a connection is aborted.

    At the path's third request a new connection is due.
    """
    if request.number == 2:
        request.reset()
    else:
        request.fine()


@behaviour
def answers_twice(request: ScoreRequest) -> None:
    """Each answer is sent twice; its rewards are the number of the request."""
    request.send(_numbered(request) * 2)
    request.keeps = True


@behaviour
def answers_once(request: ScoreRequest) -> None:
    request.send(_numbered(request))
    request.keeps = True


def _numbered(request: ScoreRequest) -> bytes:
    body = orjson.dumps({"rewards": [request.number] * len(request.content["query"])})
    framing = f"content-length: {len(body)}"
    if argument_of(request) == "chunked":
        framing = "transfer-encoding: chunked"
        chunks = (body[:2], len(body) - 2, body[2:])
        body = b"2;of=2\r\n%b\r\n%x\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n" % chunks
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{framing}\r\n\r\n"
    return head.encode() + body


@behaviour
def no_http(request: ScoreRequest) -> None:
    request.send(b"SSH-2.0-OpenSSH_9.9 " + request.headers.get("x-key", "").encode())
    request.send(b"\r\n")


@behaviour
def http_09(request: ScoreRequest) -> None:
    request.send(b'{"request_id":"x","rewards":[1,2,3,4]}')


@behaviour
def huge_cookie(request: ScoreRequest) -> None:
    request.answer(b"{}", set_cookie="a=" + "x" * 10_000_000)


@behaviour
def cookie(request: ScoreRequest) -> None:
    body = orjson.dumps({"request_id": request.request_id, "rewards": [0] * len(request.ids)})
    request.answer(body, set_cookie="session=1; Path=/")


# --- rows 17 to 19, 22 and 23: statuses -----------------------------------------------------------
@behaviour
def status(request: ScoreRequest) -> None:
    """``/status/503``; the body is whatever follows a comma."""
    code, _, body = argument_of(request).partition(",")
    request.answer(body.encode(), f"{code} Status", "text/plain")


@behaviour
def retry_after(request: ScoreRequest) -> None:
    """``/retry-after/VALUE;VALUE`` with 429: each value once."""
    values = unquote(argument_of(request)).split(";")
    if request.number > len(values):
        request.fine()
    else:
        request.answer(b"", "429 Slow down", retry_after=values[request.number - 1])


@behaviour
def redirect(request: ScoreRequest) -> None:
    """``/redirect/307,LOCATION``."""
    code, _, location = argument_of(request).partition(",")
    request.answer(b"", f"{code} Moved", location=location)


@behaviour
def at_most(request: ScoreRequest) -> None:
    """``/at-most/5``: 413 for more samples."""
    if len(request.ids) > int(argument_of(request)):
        request.answer(b"", "413 Too Large")
    else:
        request.fine()


@behaviour
def accepted(request: ScoreRequest) -> None:
    body = orjson.dumps({"request_id": request.request_id, "status": "accepted"})
    request.answer(body, "202 Accepted")


# --- what else ------------------------------------------------------------------------------------
@behaviour
def echo(request: ScoreRequest) -> None:
    """``/echo/WHERE``: send back all that could be a secret."""
    seen = "; ".join(f"{name}: {value}" for name, value in request.headers.items())
    where = argument_of(request)
    if where == "feedback":
        request.results(_entries(request, reward=1, feedback=seen))
    elif where == "reason":
        request.results(_entries(request, skip=True, reason=seen))
    elif where == "error":
        error = {"code": request.headers.get("x-key", "")[:60], "message": seen}
        request.results(_entries(request, error=error))
    elif where == "request_id":
        body = {"request_id": request.headers.get("authorization", ""), "rewards": [1, 2, 3, 4]}
        request.answer(orjson.dumps(body))
    elif where == "header":
        request.answer(b"{}", "503 Busy", www_authenticate=seen)
    elif where == "type":
        request.answer(b"{}", content_type=request.headers.get("x-key", ""))
    else:
        request.answer(f"{'.' * 490}{seen}".encode(), f"{where} Status", "text/plain")


@behaviour
def injection(request: ScoreRequest) -> None:
    text = "<script>alert(1)</script>\r\nset-cookie: a=1\x00\x1b[31m"
    first = _entries(request, reward=1, feedback=text)
    first[1] = {"id": request.ids[1], "error": {"code": "x", "message": text}}
    request.results(first)


@behaviour
def judge(request: ScoreRequest) -> None:
    """``/judge/N``: samples with an odd number fail N times each, for a passing reason of their
    own.
    """
    is_over = request.number > int(argument_of(request))
    error = {"code": "judge_timeout", "message": "the judge slept", "retryable": True}
    request.results(
        [
            {"id": name, "reward": reward_of(name)}
            if is_over or int(name[1:]) % 2 == 0
            else {"id": name, "error": error}
            for name in request.ids
        ]
    )
