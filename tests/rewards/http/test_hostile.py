"""Answers of a reward service that break the contract.

No sample ever gets a number that was not sent.
"""

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from dar.rewards.base import Failed, Scored, Skipped
from fakes.observer import Seen
from fakes.reward_server import RewardServer, ScoreRequest

Ask = Callable[..., Any]
SENT = [Scored(n / 8) for n in range(4)]

BROKEN_ANSWERS = {
    "one-short": "contract.length",
    "one-for-all": "contract.length",
    "no-rewards": "contract.length",
    "nan": "contract.nonfinite",
    "infinity": "contract.nonfinite",
    "minus-infinity": "contract.nonfinite",
    "1e400": "contract.nonfinite",
    "400-digits": "contract.nonfinite",
    "1e300": "contract.range",
    "a-text": "contract.type",
    "a-bool": "contract.type",
    "a-list": "contract.type",
    "an-object": "contract.type",
    "no-list": "contract.type",
    "a-bare-list": "contract.type",
    "neither-form": "contract.form",
    "both-forms": "contract.form",
    "duplicate-id": "contract.ids",
    "unknown-id": "contract.ids",
    "missing-id": "contract.ids",
    "two-outcomes": "contract.form",
    "no-outcome": "contract.form",
    "skip-is-a-number": "contract.type",
    "part-is-a-text": "contract.type",
    "another-request": "contract.request_mismatch",
    "no-request-id": "contract.form",
    "invalid-utf8": "contract.json",
    "byte-order-mark": "contract.json",
    "lone-surrogate": "contract.json",
    "trailing-garbage": "contract.json",
    "two-documents": "contract.json",
    "deep-nesting": "contract.json",
    "deep-objects": "contract.json",
    "nothing": "contract.json",
    "login-page": "contract.content_type",
    "text-plain": "contract.content_type",
    "huge-announced": "contract.size",
    "huge-until-close": "contract.size",
    "endless-chunks": "contract.size",
    "bomb/gzip": "contract.content_encoding",
    "bomb/deflate": "contract.content_encoding",
    "bomb/br": "contract.content_encoding",
    "bomb/zstd": "contract.content_encoding",
    "bomb/identity,gzip": "contract.content_encoding",
    "accepted": "contract.status",
    "status/204": "contract.status",
    "status/206,{}": "contract.status",
}


@pytest.mark.parametrize("path", BROKEN_ANSWERS)
async def test_a_broken_answer_is_asked_for_once_more_and_never_used(
    server: RewardServer, score: Ask, seen: Seen, path: str
) -> None:
    found = await score(server.at(path))
    code = BROKEN_ANSWERS[path]
    assert [(type(result), result.code) for result in found] == [(Failed, code)] * 4
    assert not any(result.is_transient for result in found)
    assert len(server.requests) == 2
    assert [(r.outcome, r.attempt, r.is_final) for r in seen.records] == [
        (code, 1, False),
        (code, 2, True),
    ]
    assert {r.headers["webhook-id"] for r in server.requests} == {seen.records[0].request_id}


@pytest.mark.parametrize("path", ["one-short", "nan", "invalid-utf8", "endless-chunks"])
async def test_a_broken_answer_may_be_followed_by_a_right_one(
    server: RewardServer, score: Ask, path: str
) -> None:
    assert await score(server.at(f"{path}?first=1")) == SENT


async def test_results_are_matched_by_id_in_any_order(server: RewardServer, score: Ask) -> None:
    assert await score(server.at("shuffled")) == SENT


async def test_of_duplicate_keys_the_last_counts_and_is_checked(
    server: RewardServer, score: Ask
) -> None:
    assert await score(server.at("duplicate-keys")) == [Scored(float(n)) for n in range(4)]


async def test_null_is_a_skip(server: RewardServer, score: Ask) -> None:
    assert await score(server.at("all-null")) == [Skipped()] * 4
    assert await score(server.at("some-null")) == [Skipped(), *SENT[1:]]


async def test_what_a_service_says_about_samples_cannot_break_out_of_its_text(
    server: RewardServer, score: Ask
) -> None:
    first, second, *_ = await score(server.at("injection"))
    shown = "<script>alert(1)</script>\nset-cookie: a=1[31m"
    assert first == Scored(1.0, {}, shown)
    line = "<script>alert(1)</script> set-cookie: a=1 [31m"
    assert second == Failed("service.x", line, is_transient=False)


async def test_texts_are_cut_and_parts_kept(hostile: Callable[..., RewardServer], ask: Ask) -> None:
    long = {"id": "s0", "reward": 3, "components": {"a": 1.5}, "feedback": "x" * 5000, "new": 1}
    others = [{"id": f"s{n}", "skip": True, "reason": "no maths"} for n in (1, 2, 3)]

    def answer(request: ScoreRequest) -> None:
        content = {"request_id": request.content["request_id"], "results": [long, *others]}
        request.answer(orjson.dumps(content))

    first, second, *_ = await ask(hostile(answer).url)
    assert first == Scored(3.0, {"a": 1.5}, "x" * 4096)
    assert second == Skipped("no maths")
