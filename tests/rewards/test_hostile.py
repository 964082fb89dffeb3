"""Answers of a reward service that break the contract. No sample ever gets a number that was not sent."""

import gzip
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from dar.rewards.base import Failed, Scored, Skipped

Ask = Callable[..., Any]


def long_form(request: Any, results: list[Any], **more: Any) -> bytes:
    return orjson.dumps({"request_id": request.content["request_id"], "results": results, **more})


def raw(text: str) -> Callable[[Any], None]:
    """An answer of exactly this text, with the right request id at ``ID``."""

    def behave(request: Any) -> None:
        request.answer(text.replace("ID", request.content["request_id"]).encode())

    return behave


def results(*entries: dict[str, Any]) -> Callable[[Any], None]:
    return lambda request: request.answer(long_form(request, list(entries)))


def four(**first: Any) -> list[dict[str, Any]]:
    return [first, *({"id": f"s{n}", "reward": 0.5} for n in (1, 2, 3))]


def endless(request: Any) -> None:
    request.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
    request.send(b"transfer-encoding: chunked\r\n\r\n")
    for _ in range(400):
        request.send(b"10000\r\n" + b" " * 65536 + b"\r\n")


def bomb(request: Any) -> None:
    request.answer(gzip.compress(bytes(10**7)), content_encoding="gzip")


BROKEN_ANSWERS = {
    "a short list": (lambda r: r.rewards([0.1, 0.2]), "contract.length"),
    "one for all": (lambda r: r.rewards([0.1]), "contract.length"),
    "none": (lambda r: r.rewards([]), "contract.length"),
    "NaN": (raw('{"request_id":"ID","rewards":[1,2,3,NaN]}'), "contract.nonfinite"),
    "Infinity": (raw('{"request_id":"ID","rewards":[1,2,3,Infinity]}'), "contract.nonfinite"),
    "-Infinity": (raw('{"request_id":"ID","rewards":[1,2,3,-Infinity]}'), "contract.nonfinite"),
    "1e400": (raw('{"request_id":"ID","rewards":[1,2,3,1e400]}'), "contract.nonfinite"),
    "400 digits": (
        raw('{"request_id":"ID","rewards":[1,2,3,' + "1" * 400 + "]}"),
        "contract.nonfinite",
    ),
    "1e300": (lambda r: r.rewards([1, 2, 3, 1e300]), "contract.range"),
    "a text": (lambda r: r.rewards([1, 2, 3, "0.7"]), "contract.type"),
    "a bool": (lambda r: r.rewards([1, 2, 3, True]), "contract.type"),
    "a list": (lambda r: r.rewards([[1], [2], [3], [4]]), "contract.type"),
    "an object": (lambda r: r.rewards([1, 2, 3, {}]), "contract.type"),
    "rewards no list": (raw('{"request_id":"ID","rewards":0.5}'), "contract.type"),
    "a bare list": (raw("[1,2,3,4]"), "contract.type"),
    "neither form": (raw('{"request_id":"ID"}'), "contract.form"),
    "both forms": (raw('{"request_id":"ID","rewards":[],"results":[]}'), "contract.form"),
    "a duplicate id": (results(*four(id="s1", reward=1)), "contract.ids"),
    "an unknown id": (results(*four(id="s9", reward=1)), "contract.ids"),
    "a missing id": (results(*four(id="s0", reward=1)[:3]), "contract.ids"),
    "two outcomes": (results(*four(id="s0", reward=1, skip=True)), "contract.form"),
    "no outcome": (results(*four(id="s0")), "contract.form"),
    "a number for skip": (results(*four(id="s0", skip=1)), "contract.type"),
    "components NaN-like": (
        results(*four(id="s0", reward=1, components={"a": "x"})),
        "contract.type",
    ),
    "another request's answer": (
        raw('{"request_id":"rwq_1","rewards":[1,2,3,4]}'),
        "contract.request_mismatch",
    ),
    "no request id": (raw('{"rewards":[1,2,3,4]}'), "contract.form"),
    "a login page": (
        lambda r: r.answer(b"<html>please log in</html>", content_type="text/html"),
        "contract.content_type",
    ),
    "JSON as text": (
        lambda r: r.answer(b"{}", content_type="text/plain"),
        "contract.content_type",
    ),
    "invalid UTF-8": (lambda r: r.answer(b'{"request_id":"\xff"}'), "contract.json"),
    "a byte order mark": (lambda r: r.answer(b"\xef\xbb\xbf{}"), "contract.json"),
    "a lone surrogate": (raw('{"request_id":"\\ud800","rewards":[1]}'), "contract.json"),
    "trailing garbage": (raw('{"request_id":"ID","rewards":[1,2,3,4]} x'), "contract.json"),
    "deep nesting": (raw("[" * 100_000), "contract.json"),
    "nothing": (lambda r: r.answer(b""), "contract.json"),
    "a huge announced body": (
        lambda r: r.answer(b"{", content_length=str(10**9)),
        "contract.size",
    ),
    "an endless body": (endless, "contract.size"),
    "a gzip bomb": (bomb, "contract.content_encoding"),
    "202": (lambda r: r.answer(b"{}", status="202 Accepted"), "contract.status"),
}


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
async def test_a_broken_answer_is_asked_for_once_more_and_never_used(
    hostile: Callable[..., Any], ask: Ask, name: str
) -> None:
    behave, code = BROKEN_ANSWERS[name]
    server = hostile(behave)
    found = await ask(server.url)
    assert [(type(result), result.code) for result in found] == [(Failed, code)] * 4
    assert not any(result.is_transient for result in found)
    assert len(server.requests) == 2


async def test_a_broken_answer_may_be_followed_by_a_right_one(
    hostile: Callable[..., Any], ask: Ask
) -> None:
    server = hostile(lambda r: r.rewards([1.0]), lambda r: r.rewards([1, 2.5, -3, 0]))
    found = await ask(server.url)
    assert found == [Scored(1.0), Scored(2.5), Scored(-3.0), Scored(0.0)]


async def test_results_are_matched_by_id_in_any_order(
    hostile: Callable[..., Any], ask: Ask
) -> None:
    feedback = "why\x00\x1b[31m " + "x" * 5000
    entries = [
        {"id": "s3", "reward": 3, "components": {"a": 1.5}, "feedback": feedback, "new": 1},
        {"id": "s1", "error": {"code": "judge", "message": "m"}},
        {"id": "s0", "skip": True, "reason": "no maths"},
        {"id": "s2", "error": {"code": "bad", "message": ""}},
    ]
    first, second, third, fourth = await ask(hostile(results(*entries)).url)
    assert first == Skipped("no maths")
    assert second == Failed("service.judge", "m", is_transient=False)
    assert (third.code, third.is_transient) == ("service.bad", False)
    assert fourth.reward == 3.0
    assert fourth.components == {"a": 1.5}
    assert fourth.feedback.startswith("why[31m x")
    assert len(fourth.feedback) == 4096


async def test_null_is_a_skip_in_both_forms(hostile: Callable[..., Any], ask: Ask) -> None:
    server = hostile(lambda r: r.rewards([None] * 4), results(*four(id="s0", reward=None)))
    assert await ask(server.url) == [Skipped()] * 4
    assert await ask(server.url) == [Skipped(), *[Scored(0.5)] * 3]
