"""Results that are fetched from a ``poll_url``: only from the reward service itself, patiently, and
until the deadline.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dar.rewards.base import RewardContext, Scored
from dar.rewards.http import async_results
from dar.rewards.http_reward import HttpOptions, HttpReward
from fakes.reward_server import (
    Later,
    RewardServer,
    ScoreRequest,
    accept,
    not_yet,
    ready,
    result_of,
)
from fakes.reward_types import MakeSamples

Ask = Callable[..., Any]


def hurried(options: HttpOptions, seconds: float) -> HttpOptions:
    return replace(options, timeouts=options.timeouts.model_copy(update={"deadline": seconds}))


def posted(found: Sequence[Any], *rewards: float) -> bool:
    return list(found) == [Scored(float(reward)) for reward in rewards]


async def test_without_a_training_service_async_is_offered_for_polling_alone(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    judge = Later("/results/7?x=1", not_yet, ready)
    found = await ask(hostile(judge).url, options=later)
    assert posted(found, 1, 2, 3, 4)
    reply = judge.posts[0].content["reply"]
    assert (reply["modes"], set(reply)) == (["sync", "async"], {"modes", "deadline"})
    assert [(one.method, one.target) for one in judge.polls] == [("GET", "/results/7?x=1")] * 2
    assert len(judge.posts) == 1


async def test_without_a_callback_a_poll_that_fails_for_good_fails_these_samples_only(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    judge = Later("/r", lambda request, _: request.answer(b"", status="401 No"))
    found = await ask(hostile(judge).url, options=later)
    assert {result.code for result in found} == {"http_401"}
    assert (len(judge.polls), len(judge.posts)) == (1, 1)


async def test_requests_that_may_be_answered_later_are_the_same_in_whatever_order_groups_come(
    hostile: Callable[..., RewardServer],
    later: HttpOptions,
    make_samples: MakeSamples,
    context: RewardContext,
) -> None:
    samples = make_samples(8)
    asked: list[set[str]] = []
    for groups in ([samples[:4], samples[4:]], [samples[4:], samples[:4]]):
        posts: list[Any] = []

        def at_once(request: ScoreRequest, posts: list[Any] = posts) -> None:
            posts.append(request)
            request.answer(result_of(request, 1, 2, 3, 4))

        source = HttpReward("r", hostile(at_once).url, options=later)
        try:
            await asyncio.gather(*(source.score(group, context) for group in groups))
        finally:
            await source.aclose()
        asked.append({post.content["request_id"] for post in posts})
        assert [len(post.content["samples"]) for post in posts] == [4, 4]
    assert asked[0] == asked[1]


async def test_polls_outlive_passing_failures_and_heed_retry_after(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    judge = Later(
        "/r",
        lambda request, _: request.answer(b"", status="500 Oops"),
        lambda request, _: request.connection.close(),
        lambda request, _: request.answer(b"{}", status="202 Accepted", retry_after="0.4"),
        ready,
    )
    retry = later.retry.model_copy(update={"retry_after_cap": 1.0})
    patient = replace(later, retry=retry)
    assert posted(await ask(hostile(judge).url, options=patient), 1, 2, 3, 4)
    assert judge.times[3] - judge.times[2] >= 0.39
    assert len(judge.posts) == 1


@pytest.mark.parametrize("status", ["202 Accepted", "503 Busy", "429 Busy"])
@pytest.mark.parametrize("retry_after", ["600", "Sun, 06 Nov 2094 08:49:37 GMT"])
async def test_a_poll_may_request_no_longer_wait_than_the_cap(
    hostile: Callable[..., RewardServer],
    ask: Ask,
    later: HttpOptions,
    status: str,
    retry_after: str,
) -> None:
    judge = Later(
        "/r",
        lambda request, _: request.answer(b"{}", status=status, retry_after=retry_after),
        ready,
    )
    assert posted(await ask(hostile(judge).url, options=hurried(later, 5)), 1, 2, 3, 4)
    assert later.retry.retry_after_cap <= judge.times[1] - judge.times[0] < 4


async def test_waits_between_polls_grow_to_a_bound(
    hostile: Callable[..., RewardServer],
    ask: Ask,
    later: HttpOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real(0)

    monkeypatch.setattr(async_results, "FIRST_POLL_SECONDS", 1.0)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    judge = Later("/r", *[not_yet] * 11, ready)
    assert posted(await ask(hostile(judge).url, options=later), 1, 2, 3, 4)
    expected = [min(1.5**n, 15.0) for n in range(12)]
    assert len(waits) == 12
    assert all(0.8 * e <= w <= 1.2 * e for w, e in zip(waits, expected, strict=True)), waits


POLL_URLS = {
    "another host": "http://127.0.0.2:{port}/r",
    "another port": "http://127.0.0.1:1/r",
    "another scheme": "https://127.0.0.1:{port}/r",
    "a file": "file:///etc/passwd",
    "no scheme": "//169.254.169.254/latest",
    "a user name": "http://me@127.0.0.1:{port}/r",
    "a password": "http://me:pw@127.0.0.1:{port}/r",
    "a fragment": "/r#x",
    "a name for the same address": "http://localhost:{port}/r",
    "a backslash": "\\\\169.254.169.254\\r",
    "a newline": "/r\nhost: x",
    "a name that is none": "http://_xn--a:{port}/r",
    "a name that ends in its middle": "http://xn--zzzz99999._:{port}/r",
    "empty labels": "http://a..b:{port}/r",
    "a number too large": "http://127.0.0.1:99999/r",
    "half an address": "http://[::1",
}


@pytest.mark.parametrize("name", POLL_URLS)
async def test_nothing_but_the_origin_of_the_reward_service_is_polled(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions, name: str
) -> None:
    judge = Later(None, not_yet)
    server = hostile(judge)
    port = server.url.split(":")[2].split("/")[0]
    judge.poll_url = POLL_URLS[name].replace("{port}", port)
    found = await ask(server.url, options=hurried(later, 5))
    if name == "a backslash":  # a strange path, but on this server
        assert all(request.method == "GET" for request in judge.polls)
        return
    assert {result.code for result in found} == {"contract.poll_url"}
    assert judge.polls == []
    assert len(judge.posts) == 2  # a broken contract is tried once more


BROKEN_PROMISES = {
    "nothing to poll and nobody to call": (b'{"request_id":"ID","status":"accepted"}', "poll_url"),
    "no JSON": (b"<html>", "json"),
    "another request": (
        b'{"request_id":"x","status":"accepted","poll_url":"/r"}',
        "request_mismatch",
    ),
    "another status": (b'{"request_id":"ID","status":"queued","poll_url":"/r"}', "type"),
}


@pytest.mark.parametrize("name", BROKEN_PROMISES)
async def test_a_202_must_be_a_promise(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions, name: str
) -> None:
    body, code = BROKEN_PROMISES[name]

    def behave(request: ScoreRequest) -> None:
        known = body.replace(b"ID", request.content["request_id"].encode())
        request.answer(known, status="202 Accepted")

    found = await ask(hostile(behave).url, options=later)
    assert {result.code for result in found} == {f"contract.{code}"}


async def test_what_a_202_says_beyond_the_contract_does_no_harm(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    judge = Later("/r", ready)

    def behave(request: ScoreRequest) -> None:
        if request.method == "POST":
            judge.posts.append(request)
            accept(poll_url="/r", eta_ms=20, queue={"length": 3})(request)
        else:
            judge(request)

    assert posted(await ask(hostile(behave).url, options=later), 1, 2, 3, 4)


async def test_a_polled_result_passes_the_same_checks_and_is_asked_for_once_more(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    judge = Later("/r", lambda request, post: request.answer(result_of(post, 1)))
    found = await ask(hostile(judge).url, options=later)
    assert {result.code for result in found} == {"contract.length"}
    assert len(judge.posts) == 2
    ids = {post.content["request_id"] for post in judge.posts}
    assert len(ids) == 1
    assert judge.posts[0].body == judge.posts[1].body


async def test_a_poll_that_never_ends_ends_at_the_deadline(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    judge = Later("/r", lambda request, _: request.hang())
    found = await ask(hostile(judge).url, options=hurried(later, 0.5))
    assert {result.code for result in found} == {"callback_late"}


async def test_polls_carry_a_signature_and_the_requests_id(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions, secret: str
) -> None:
    judge = Later("/r", ready)
    assert posted(await ask(hostile(judge).url, options=later, secret=secret), 1, 2, 3, 4)
    headers = judge.polls[0].headers
    assert headers["webhook-id"] == judge.posts[0].headers["webhook-id"]
    assert headers["webhook-signature"].startswith("v1,")
    assert headers["accept-encoding"] == "identity"
