"""Results that come later: by callback or by polling, whichever is first, and never after the
deadline.
"""

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
from dar.protocol.worker import RewardAnnouncement
from dar.rewards.base import Failed, RewardContext, Scored
from dar.rewards.http.async_results import Stored
from dar.rewards.http.breaker import BreakerOptions
from dar.rewards.http_reward import HttpOptions, HttpReward
from dar.rewards.scoring.step_report import StepObserver
from fakes.observer import Seen
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


@dataclass
class Service:
    """What a training service does for its trainers, in memory."""

    known: dict[str, Stored] = field(default_factory=dict)
    said: list[tuple[str, ...]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    results: dict[str, bytes] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    away_seconds: float = 0.0
    """How long the next announcement takes."""
    deadlines: list[datetime] = field(default_factory=list)

    async def announce(self, request: RewardAnnouncement) -> Stored:
        away, self.away_seconds = self.away_seconds, 0.0
        await asyncio.sleep(away)
        request_id, deadline = request.request_id, datetime.fromtimestamp(request.deadline, UTC)
        self.deadlines.append(deadline)
        self.said.append(("announced", request.component, str(request.step), *request.sample_ids))
        self.hashes[request_id] = request.token_sha256
        return self.known.get(request_id) or Stored(f"http://dar.test/cb/{request_id}", deadline)

    async def wait(self, request_id: str) -> bytes:
        while request_id not in self.results:  # noqa: ASYNC110 - another thread puts it there
            await asyncio.sleep(0.01)
        return self.results[request_id]

    async def problem(self, request: RewardAnnouncement) -> str | None:
        return self.problems.get(request.request_id)

    def accepted(self, request_id: str, poll_url: str | None) -> None:
        self.said.append(("accepted", poll_url or ""))

    def close(self, request_id: str) -> None:
        self.said.append(("closed",))


def hurried(options: HttpOptions, seconds: float) -> HttpOptions:
    return replace(options, timeouts=options.timeouts.model_copy(update={"deadline": seconds}))


def posted(found: Sequence[Any], *rewards: float) -> bool:
    return list(found) == [Scored(float(reward)) for reward in rewards]


async def test_sync_is_what_is_offered_where_nothing_else_is_allowed(
    hostile: Callable[..., RewardServer], ask: Ask, fast: HttpOptions
) -> None:
    server = hostile(accept(poll_url="/r"))
    found = await ask(server.url, options=fast)
    assert {result.code for result in found} == {"contract.status"}
    assert server.requests[0].content["reply"]["modes"] == ["sync"]


async def test_a_callback_brings_the_result_and_its_request_was_announced_before(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    service = Service()

    def behave(request: ScoreRequest) -> None:
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
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    service = Service()
    found = await ask(hostile().url, options=later, inbox=service)
    assert posted(found, 0.5, 0.5, 0.5, 0.5)
    assert service.said[-1] == ("closed",)


async def test_the_faster_of_callback_and_poll_wins(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    polled = Service()
    assert posted(
        await ask(hostile(Later("/r", ready)).url, options=later, inbox=polled),
        1,
        2,
        3,
        4,
    )
    assert polled.said[1:] == [("accepted", "/r"), ("closed",)]
    called = Service()

    def poll_in_vain(request: ScoreRequest, post: Any) -> None:
        not_yet(request, post)
        called.results[post.content["request_id"]] = result_of(post, 9, 9, 9, 9)

    found = await ask(hostile(Later("/r", poll_in_vain)).url, options=later, inbox=called)
    assert posted(found, 9, 9, 9, 9)


async def test_a_poll_that_fails_for_good_leaves_the_callback(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    service = Service()

    def gone(request: ScoreRequest, post: Any) -> None:
        request.answer(b"", status="404 Gone")
        service.results[post.content["request_id"]] = result_of(post, 1, 1, 1, 1)

    found = await ask(hostile(Later("/r", gone)).url, options=later, inbox=service)
    assert posted(found, 1, 1, 1, 1)


async def test_a_result_that_does_not_come_in_time_is_missing(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    started = time.monotonic()
    judge = Later("/r", not_yet)
    found = await ask(hostile(judge).url, options=hurried(later, 0.5), inbox=Service())
    assert [(result.code, result.is_transient) for result in found] == [("callback_late", True)] * 4
    assert 0.4 < time.monotonic() - started < 10
    assert len(judge.posts) == 1


async def test_our_own_service_may_be_away_for_longer_than_the_deadline(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions, seen: Seen
) -> None:
    service = Service(away_seconds=2.5)
    server = hostile()
    options = replace(hurried(later, 2.0), breaker=BreakerOptions(min_calls=1))
    found = await ask(server.url, options=options, inbox=service, observer=seen)
    assert posted(found, 0.5, 0.5, 0.5, 0.5)
    assert [(record.attempt, record.outcome) for record in seen.records] == [(1, "ok")]
    assert seen.states == []
    # What was announced first had its deadline behind it when it was stored.
    [sent] = server.requests
    first, second = service.deadlines
    assert datetime.fromisoformat(sent.content["reply"]["deadline"]) == second > first


async def test_a_request_that_is_not_announced_is_never_sent_and_a_cancellation_ends_the_wait(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions, seen: Seen
) -> None:
    before = asyncio.all_tasks()
    server = hostile()
    options = replace(hurried(later, 0.1), breaker=BreakerOptions(min_calls=1))
    service = Service(away_seconds=3600)
    waiting = asyncio.create_task(ask(server.url, options=options, inbox=service, observer=seen))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert asyncio.all_tasks() == before
    assert (server.requests, seen.states) == ([], [])


async def test_what_the_breaker_holds_back_is_announced_only_when_it_may_go(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions, seen: Seen
) -> None:
    service = Service()
    statuses = iter(["500 Internal Server Error"])

    def behave(request: ScoreRequest) -> None:
        if status := next(statuses, None):
            request.answer(b"", status=status)
        else:
            request.fine()

    server = hostile(behave)
    breaker = BreakerOptions(min_calls=1, open_seconds=1.5)
    retry = later.retry.model_copy(update={"attempts": 1})
    options = replace(later, breaker=breaker, retry=retry)
    started = datetime.now(UTC)
    broken = await ask(server.url, options=options, inbox=service, observer=seen)
    assert {result.code for result in broken} == {"http_500"}
    assert posted(await ask(server.url, options=options, inbox=service), 0.5, 0.5, 0.5, 0.5)
    assert seen.states == ["open", "half_open", "closed"]
    waited = timedelta(seconds=options.timeouts.deadline + 1.5)
    assert service.deadlines[1] - started >= waited  # the wait is not taken off its time


async def test_in_flight_is_a_request_until_its_202(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions, seen: Seen
) -> None:
    service = Service()

    def behave(request: ScoreRequest) -> None:
        accept()(request)
        body = result_of(request, 4, 3, 2, 1)
        threading.Timer(
            0.5, service.results.__setitem__, (request.content["request_id"], body)
        ).start()

    found = await ask(hostile(behave).url, options=later, inbox=service, observer=seen)
    assert posted(found, 4, 3, 2, 1)
    [record] = seen.records
    assert 0 < record.in_flight_seconds <= record.seconds - 0.4


class Earlier(Service):
    """A service that knows every request from an earlier process."""

    def __init__(self, **known: Any) -> None:
        super().__init__()
        self.facts = known

    async def announce(self, request: RewardAnnouncement) -> Stored:
        await super().announce(request)
        until = datetime.now(UTC) + timedelta(seconds=self.facts.pop("seconds", 60))
        result = self.facts.get("rewards")
        body = (
            orjson.dumps({"request_id": request.request_id, "rewards": result}) if result else None
        )
        poll_url = self.facts.get("poll_url")
        return Stored("http://dar.test/cb", until, True, poll_url, body)


async def test_a_result_that_an_earlier_process_has_got_is_used_and_nothing_is_sent(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    server = hostile()
    inbox = Earlier(rewards=[1, 2, 3, 4])
    assert posted(await ask(server.url, options=later, inbox=inbox), 1, 2, 3, 4)
    assert server.requests == []


async def test_what_an_earlier_process_has_sent_is_only_waited_for(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    def behave(request: ScoreRequest) -> None:
        assert (request.method, request.target) == ("GET", "/r")
        request_id = request.headers["webhook-id"]
        request.answer(orjson.dumps({"request_id": request_id, "rewards": [5, 6, 7, 8]}))

    server = hostile(behave)
    assert posted(await ask(server.url, options=later, inbox=Earlier(poll_url="/r")), 5, 6, 7, 8)
    assert len(server.requests) == 1


async def test_the_deadline_of_the_earlier_process_holds(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    server = hostile()
    found = await ask(server.url, options=later, inbox=Earlier(seconds=0.2))
    assert {result.code for result in found} == {"callback_late"}
    assert server.requests == []


async def test_waiting_for_results_takes_no_place_among_the_requests_in_flight(
    hostile: Callable[..., RewardServer],
    later: HttpOptions,
    make_samples: MakeSamples,
    context: RewardContext,
) -> None:
    service = Service()
    lock, posts = threading.Lock(), []

    def behave(request: ScoreRequest) -> None:
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
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    before = asyncio.all_tasks()
    waiting = asyncio.create_task(
        ask(hostile(Later("/r", not_yet)).url, options=later, inbox=Service())
    )
    await asyncio.sleep(0.3)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert asyncio.all_tasks() == before


async def test_the_same_samples_of_a_job_have_the_same_request_id_and_others_another(
    hostile: Callable[..., RewardServer],
    ask: Ask,
    later: HttpOptions,
    make_samples: MakeSamples,
) -> None:
    server = hostile()
    found = [await ask(server.url, options=later) for _ in range(2)]
    found.append(await ask(server.url, count=3, options=later))
    assert not any(isinstance(result, Failed) for results in found for result in results)
    first, second, third = (request.content["request_id"] for request in server.requests)
    assert first == second != third
    assert len(first) == 30


# --- why a result did not come --------------------------------------------------------------------


async def test_polling_that_ended_for_good_is_reported_at_once_and_again_at_the_deadline(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions
) -> None:
    events: list[tuple[float, str, Any]] = []
    observer = StepObserver(
        lambda _, message, data: events.append((time.monotonic(), message, data))
    )

    def gone(poll: ScoreRequest, _: ScoreRequest) -> None:
        poll.answer(b"no such result", 404, "text/plain")

    options = replace(hurried(later, 1.0), retry=later.retry.model_copy(update={"attempts": 1}))
    server = hostile(Later("/r", gone))
    found = await ask(server.url, options=options, inbox=Service(), observer=observer)
    ended = time.monotonic()
    assert {result.code for result in found} == {"callback_late"}
    assert "did not come before the deadline" in found[0].message
    assert "polling ended with http_404: HTTP 404: no such result" in found[0].message
    at, message, data = next(one for one in events if one[2]["kind"] == "reward_poll_ended")
    assert ended - at > 0.5
    assert "HTTP 404: no such result; only its callback can bring the result now" in message
    assert (data["code"], data["class"]) == ("http_404", "http_4xx")


@pytest.mark.parametrize(
    "what", ["a broken result", "a service that is away", "a refused callback"]
)
async def test_the_message_of_the_deadline_repeats_what_was_wrong(
    hostile: Callable[..., RewardServer], ask: Ask, later: HttpOptions, what: str
) -> None:
    service = Service()

    def poll(poll: ScoreRequest, post: ScoreRequest) -> None:
        if what == "a broken result":
            poll.answer(result_of(post, 1))
        elif what == "a service that is away":
            poll.answer(b"restarting", 503, "text/plain")
        else:
            service.problems[post.request_id] = "401: its token is missing or wrong"
            poll.answer(b"{}", "202 Accepted")

    options = replace(hurried(later, 0.6), retry=later.retry.model_copy(update={"attempts": 1}))
    found = await ask(hostile(Later("/r", poll)).url, options=options, inbox=service)
    expected = {
        "a broken result": "polling ended with contract.length: 1 rewards for 4 samples",
        "a service that is away": "the latest poll failed: HTTP 503: restarting",
        "a refused callback": "a callback was refused with 401: its token is missing or wrong",
    }
    assert {result.code for result in found} == {"callback_late"}
    assert expected[what] in found[0].message
