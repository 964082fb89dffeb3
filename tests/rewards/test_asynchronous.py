"""Results that come later: by callback or by polling, whichever is first, and never after the deadline."""

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from dar.protocol.rewards import RewardRequest, decode_request
from dar.rewards import asynchronous
from dar.rewards.asynchronous import Stored
from dar.rewards.base import Failed, RewardContext, Scored
from dar.rewards.http import HttpOptions, HttpReward

Ask = Callable[..., Any]


@dataclass
class Service:
    """What a training service does for its trainers, in memory."""

    known: dict[str, Stored] = field(default_factory=dict)
    said: list[tuple[str, ...]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    results: dict[str, bytes] = field(default_factory=dict)
    is_away: bool = False

    async def announce(
        self,
        request_id: str,
        component: str,
        step: int,
        token_sha256: str,
        deadline: datetime,
        sample_ids: Sequence[str],
    ) -> Stored:
        if self.is_away:
            await asyncio.Event().wait()
        self.said.append(("announced", component, str(step), *sample_ids))
        self.hashes[request_id] = token_sha256
        return self.known.get(request_id) or Stored(f"http://dar.test/cb/{request_id}", deadline)

    async def wait(self, request_id: str) -> bytes:
        while request_id not in self.results:  # noqa: ASYNC110 - another thread puts it there
            await asyncio.sleep(0.01)
        return self.results[request_id]

    def accepted(self, request_id: str, poll_url: str | None) -> None:
        self.said.append(("accepted", poll_url or ""))

    def close(self, request_id: str) -> None:
        self.said.append(("closed",))


@pytest.fixture
def later(fast: HttpOptions) -> HttpOptions:
    return replace(fast, allow_async=True)


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asynchronous, "FIRST_POLL_SECONDS", 0.02)
    monkeypatch.setattr(asynchronous, "SHORTEST_POLL_SECONDS", 0.01)


def hurried(options: HttpOptions, seconds: float) -> HttpOptions:
    return replace(options, timeouts=options.timeouts.model_copy(update={"deadline": seconds}))


def accept(**more: Any) -> Callable[[Any], None]:
    def behave(request: Any) -> None:
        content = {"request_id": request.content["request_id"], "status": "accepted", **more}
        request.answer(orjson.dumps(content), status="202 Accepted")

    return behave


def result_of(request: Any, *rewards: float, **more: Any) -> bytes:
    return orjson.dumps({"request_id": request.content["request_id"], "rewards": rewards, **more})


class Judge:
    """A service that accepts, and answers the polls that follow in turn."""

    def __init__(self, poll_url: str | None, *polls: Callable[[Any, Any], None]) -> None:
        self.poll_url = poll_url
        self.polls = list(polls)
        self.asked: list[Any] = []
        self.times: list[float] = []
        self.posts: list[Any] = []

    def __call__(self, request: Any) -> None:
        if request.line.startswith("POST"):
            self.posts.append(request)
            accept(**({} if self.poll_url is None else {"poll_url": self.poll_url}))(request)
            return
        self.asked.append(request)
        self.times.append(time.monotonic())
        turn = self.polls.pop(0) if len(self.polls) > 1 else self.polls[0]
        turn(request, self.posts[-1])


def not_yet(request: Any, _: Any) -> None:
    request.answer(b"{}", status="202 Accepted")


def ready(request: Any, post: Any) -> None:
    request.answer(result_of(post, 1, 2, 3, 4))


def posted(found: Sequence[Any], *rewards: float) -> bool:
    return list(found) == [Scored(float(reward)) for reward in rewards]


async def test_without_a_training_service_async_is_offered_for_polling_alone(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    judge = Judge("/results/7?x=1", not_yet, ready)
    found = await ask(hostile(judge).url, options=later)
    assert posted(found, 1, 2, 3, 4)
    reply = judge.posts[0].content["reply"]
    assert (reply["modes"], set(reply)) == (["sync", "async"], {"modes", "deadline"})
    assert [request.line.split()[:2] for request in judge.asked] == [["GET", "/results/7?x=1"]] * 2
    assert len(judge.posts) == 1


async def test_sync_is_what_is_offered_where_nothing_else_is_allowed(
    hostile: Ask, ask: Ask, fast: HttpOptions
) -> None:
    server = hostile(accept(poll_url="/r"))
    found = await ask(server.url, options=fast)
    assert {result.code for result in found} == {"contract.status"}
    assert server.requests[0].content["reply"]["modes"] == ["sync"]


async def test_a_callback_brings_the_result_and_its_request_was_announced_before(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    service = Service()

    def behave(request: Any) -> None:
        assert service.said[0] == ("announced", "r", "3", "s0", "s1", "s2", "s3")
        accept()(request)
        body = result_of(request, 4, 3, 2, 1, type="reward.result")
        service.results[request.content["request_id"]] = body

    server = hostile(behave)
    assert posted(await ask(server.url, options=later, inbox=service), 4, 3, 2, 1)
    [request] = server.requests
    sent: RewardRequest = decode_request(request.body)
    assert sent.reply.callback is not None
    assert sent.reply.callback.url == f"http://dar.test/cb/{sent.request_id}"
    token = sent.reply.callback.token
    assert len(token) == 47
    assert hashlib.sha256(token.encode()).hexdigest() == service.hashes[sent.request_id]
    assert token not in repr(sent)
    assert service.said[1:] == [("accepted", "")]


async def test_an_answer_at_once_closes_the_callback(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    service = Service()
    found = await ask(hostile(lambda r: r.fine()).url, options=later, inbox=service)
    assert posted(found, 0.5, 0.5, 0.5, 0.5)
    assert service.said[-1] == ("closed",)


async def test_the_faster_of_callback_and_poll_wins(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    polled = Service()
    assert posted(
        await ask(hostile(Judge("/r", ready)).url, options=later, inbox=polled), 1, 2, 3, 4
    )
    assert polled.said[1:] == [("accepted", "/r"), ("closed",)]
    called = Service()

    def poll_in_vain(request: Any, post: Any) -> None:
        not_yet(request, post)
        called.results[post.content["request_id"]] = result_of(post, 9, 9, 9, 9)

    found = await ask(hostile(Judge("/r", poll_in_vain)).url, options=later, inbox=called)
    assert posted(found, 9, 9, 9, 9)


async def test_a_poll_that_fails_for_good_leaves_the_callback(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    service = Service()

    def gone(request: Any, post: Any) -> None:
        request.answer(b"", status="404 Gone")
        service.results[post.content["request_id"]] = result_of(post, 1, 1, 1, 1)

    found = await ask(hostile(Judge("/r", gone)).url, options=later, inbox=service)
    assert posted(found, 1, 1, 1, 1)


async def test_without_a_callback_a_poll_that_fails_for_good_fails_these_samples_only(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    judge = Judge("/r", lambda request, _: request.answer(b"", status="401 No"))
    found = await ask(hostile(judge).url, options=later)
    assert {result.code for result in found} == {"http_401"}
    assert (len(judge.asked), len(judge.posts)) == (1, 1)


async def test_polls_outlive_passing_failures_and_heed_retry_after(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    judge = Judge(
        "/r",
        lambda request, _: request.answer(b"", status="500 Oops"),
        lambda request, _: request.connection.close(),
        lambda request, _: request.answer(b"{}", status="202 Accepted", retry_after="0.4"),
        ready,
    )
    assert posted(await ask(hostile(judge).url, options=later), 1, 2, 3, 4)
    assert judge.times[3] - judge.times[2] >= 0.39
    assert len(judge.posts) == 1


async def test_waits_between_polls_grow_to_a_bound(
    hostile: Ask, ask: Ask, later: HttpOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real(0)

    monkeypatch.setattr(asynchronous, "FIRST_POLL_SECONDS", 1.0)
    monkeypatch.setattr(asynchronous.asyncio, "sleep", sleep)
    judge = Judge("/r", *[not_yet] * 11, ready)
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
}


@pytest.mark.parametrize("name", POLL_URLS)
async def test_nothing_but_the_origin_of_the_reward_service_is_polled(
    hostile: Ask, ask: Ask, later: HttpOptions, name: str
) -> None:
    judge = Judge(None, not_yet)
    server = hostile(judge)
    port = server.url.split(":")[2].split("/")[0]
    judge.poll_url = POLL_URLS[name].replace("{port}", port)
    found = await ask(server.url, options=hurried(later, 5))
    if name == "a backslash":  # a strange path, but on this server
        assert all(request.line.startswith("GET /") for request in judge.asked)
        return
    assert {result.code for result in found} == {"contract.poll_url"}
    assert judge.asked == []
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
    hostile: Ask, ask: Ask, later: HttpOptions, name: str
) -> None:
    body, code = BROKEN_PROMISES[name]

    def behave(request: Any) -> None:
        known = body.replace(b"ID", request.content["request_id"].encode())
        request.answer(known, status="202 Accepted")

    found = await ask(hostile(behave).url, options=later)
    assert {result.code for result in found} == {f"contract.{code}"}


async def test_what_a_202_says_beyond_the_contract_does_no_harm(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    judge = Judge("/r", ready)

    def behave(request: Any) -> None:
        if request.line.startswith("POST"):
            judge.posts.append(request)
            accept(poll_url="/r", eta_ms=20, queue={"length": 3})(request)
        else:
            judge(request)

    assert posted(await ask(hostile(behave).url, options=later), 1, 2, 3, 4)


async def test_a_polled_result_passes_the_same_checks_and_is_asked_for_once_more(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    judge = Judge("/r", lambda request, post: request.answer(result_of(post, 1)))
    found = await ask(hostile(judge).url, options=later)
    assert {result.code for result in found} == {"contract.length"}
    assert len(judge.posts) == 2
    ids = {post.content["request_id"] for post in judge.posts}
    assert len(ids) == 1
    assert judge.posts[0].body == judge.posts[1].body


async def test_a_result_that_does_not_come_in_time_is_missing(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    started = time.monotonic()
    judge = Judge("/r", not_yet)
    found = await ask(hostile(judge).url, options=hurried(later, 0.5), inbox=Service())
    assert [(result.code, result.is_transient) for result in found] == [("deadline", True)] * 4
    assert 0.4 < time.monotonic() - started < 10
    assert len(judge.posts) == 1


async def test_a_poll_that_never_ends_ends_at_the_deadline(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    judge = Judge("/r", lambda request, _: request.hang())
    found = await ask(hostile(judge).url, options=hurried(later, 0.5))
    assert {result.code for result in found} == {"deadline"}


async def test_a_request_that_cannot_be_announced_is_never_sent(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    server = hostile(lambda r: r.fine())
    found = await ask(server.url, options=hurried(later, 0.3), inbox=Service(is_away=True))
    assert {(result.code, result.is_transient) for result in found} == {("deadline", True)}
    assert server.requests == []


class Earlier(Service):
    """A service that knows every request from an earlier process."""

    def __init__(self, **known: Any) -> None:
        super().__init__()
        self.facts = known

    async def announce(self, request_id: str, *more: Any) -> Stored:
        await super().announce(request_id, *more)
        until = datetime.now(UTC) + timedelta(seconds=self.facts.pop("seconds", 60))
        result = self.facts.get("rewards")
        body = orjson.dumps({"request_id": request_id, "rewards": result}) if result else None
        poll_url = self.facts.get("poll_url")
        return Stored("http://dar.test/cb", until, True, poll_url, body)


async def test_a_result_that_an_earlier_process_has_got_is_used_and_nothing_is_sent(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    server = hostile(lambda r: r.fine())
    inbox = Earlier(rewards=[1, 2, 3, 4])
    assert posted(await ask(server.url, options=later, inbox=inbox), 1, 2, 3, 4)
    assert server.requests == []


async def test_what_an_earlier_process_has_sent_is_only_waited_for(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    def behave(request: Any) -> None:
        assert request.line.startswith("GET /r ")
        request_id = request.headers["webhook-id"]
        request.answer(orjson.dumps({"request_id": request_id, "rewards": [5, 6, 7, 8]}))

    server = hostile(behave)
    assert posted(await ask(server.url, options=later, inbox=Earlier(poll_url="/r")), 5, 6, 7, 8)
    assert len(server.requests) == 1


async def test_the_deadline_of_the_earlier_process_holds(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    server = hostile(lambda r: r.fine())
    found = await ask(server.url, options=later, inbox=Earlier(seconds=0.2))
    assert {result.code for result in found} == {"deadline"}
    assert server.requests == []


async def test_polls_carry_a_signature_and_the_requests_id(
    hostile: Ask, ask: Ask, later: HttpOptions, secret: str
) -> None:
    judge = Judge("/r", ready)
    assert posted(await ask(hostile(judge).url, options=later, secret=secret), 1, 2, 3, 4)
    headers = judge.asked[0].headers
    assert headers["webhook-id"] == judge.posts[0].headers["webhook-id"]
    assert headers["webhook-signature"].startswith("v1,")
    assert headers["accept-encoding"] == "identity"


async def test_waiting_for_results_takes_no_place_among_the_requests_in_flight(
    hostile: Ask,
    later: HttpOptions,
    make_samples: Callable[..., Any],
    context: RewardContext,
) -> None:
    service = Service()
    lock, posts = threading.Lock(), []

    def behave(request: Any) -> None:
        accept()(request)
        with lock:
            posts.append(request)
            if len(posts) == 12:  # three times the concurrency: no result before all were sent
                for post in posts:
                    rewards = [1.0] * len(post.ids)
                    service.results[post.content["request_id"]] = result_of(post, *rewards)

    options = replace(later, batch=later.batch.model_copy(update={"max_samples": 4}))
    source = HttpReward("r", hostile(behave).url, options=options, inbox=service)
    async with asyncio.timeout(30):
        found = await source.score(make_samples(48), context)
    await source.aclose()
    assert found == [Scored(1.0)] * 48


async def test_a_cancellation_leaves_no_task_behind(
    hostile: Ask, ask: Ask, later: HttpOptions
) -> None:
    before = asyncio.all_tasks()
    waiting = asyncio.create_task(
        ask(hostile(Judge("/r", not_yet)).url, options=later, inbox=Service())
    )
    await asyncio.sleep(0.3)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert asyncio.all_tasks() == before


async def test_the_same_samples_of_a_job_have_the_same_request_id_and_others_another(
    hostile: Ask, ask: Ask, later: HttpOptions, make_samples: Callable[..., Any]
) -> None:
    server = hostile(lambda r: r.fine())
    found = [await ask(server.url, options=later) for _ in range(2)]
    found.append(await ask(server.url, count=3, options=later))
    assert not any(isinstance(result, Failed) for results in found for result in results)
    first, second, third = (request.content["request_id"] for request in server.requests)
    assert first == second != third
    assert len(first) == 30
