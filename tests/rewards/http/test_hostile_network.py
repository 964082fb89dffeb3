"""A reward service that is slow, breaks off, is down, refuses or redirects: what is tried again,
and what ends at once.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_spec import RewardBatching, RewardLimits, RewardRetry, RewardTimeouts
from dar.rewards.base import Failed, RewardContext, Scored
from dar.rewards.http.breaker import BreakerOptions
from dar.rewards.http.retry import RetryBudgetOptions
from dar.rewards.http_reward import HttpOptions, HttpReward
from dar.rewards.protocols.openrlhf import OpenRLHFProtocol
from fakes.observer import Seen
from fakes.reward_server import RewardServer
from fakes.reward_types import MakeSamples

Ask = Callable[..., Any]
SENT = [Scored(n / 8) for n in range(4)]


@pytest.fixture
def hasty(credentials: HttpOptions) -> HttpOptions:
    """Time limits that are meant to be reached."""
    timeouts = RewardTimeouts(connect=10, read=20, attempt=0.4, deadline=60)
    return replace(credentials, timeouts=timeouts)


@pytest.mark.parametrize("path", ["slow-body", "slow-headers", "endless-1xx", "no-answer"])
async def test_an_answer_without_end_is_cut_off_and_its_slot_freed(
    server: RewardServer, score: Ask, hasty: HttpOptions, path: str
) -> None:
    alone = replace(hasty, limits=RewardLimits(concurrency=1))
    found = await score(server.at(path), options=alone)
    assert [(type(result), result.code) for result in found] == [(Failed, "timeout")] * 4
    assert all(result.is_transient for result in found)
    assert len(server.requests) == 3
    assert await score(server.at(f"{path}?first=1"), options=alone) == SENT


async def test_a_black_hole_is_given_up_after_the_connect_timeout(
    score: Ask, credentials: HttpOptions, black_hole: str
) -> None:
    timeouts = RewardTimeouts(connect=0.2, read=20, attempt=20, deadline=60)
    found = await score(black_hole, options=replace(credentials, timeouts=timeouts))
    assert {(result.code, result.is_transient) for result in found} == {("connect_timeout", True)}


PASSING_FAILURES = {
    "reset-in-head": "connect",
    "reset-in-body": "connect",
    "short-body": "protocol",
    "closes-at-once": "protocol",
    "no-http": "protocol",
    "http-09": "protocol",
    "huge-cookie": "protocol",
    **{f"status/{code}": f"http_{code}" for code in (408, 425, 429, 500, 502, 503, 504, 529)},
}


@pytest.mark.parametrize("path", PASSING_FAILURES)
async def test_a_passing_failure_is_tried_again_as_often_as_told(
    server: RewardServer, score: Ask, path: str
) -> None:
    found = await score(server.at(path))
    code = PASSING_FAILURES[path]
    assert [(type(result), result.code) for result in found] == [(Failed, code)] * 4
    assert all(result.is_transient for result in found)
    assert len(server.requests) == 3
    assert await score(server.at(f"{path}?first=2")) == SENT
    ids = [request.headers["webhook-id"] for request in server.requests]
    assert len(set(ids[:3])) == len(set(ids[3:])) == 1
    assert len({request.body for request in server.requests[:3]}) == 1


async def ask_in_turn(
    url: str, options: HttpOptions, samples: Any, context: RewardContext, times: int
) -> None:
    """Ask one source several times, so that its connection is used again."""
    source = HttpReward("r", url, options=options)
    for _ in range(times):
        assert await source.score(samples, context) == SENT
        await asyncio.sleep(0.05)  # what the server does to the idle connection arrives
    await source.aclose()


async def test_a_connection_that_was_closed_while_idle_costs_nothing(
    server: RewardServer,
    credentials: HttpOptions,
    make_samples: MakeSamples,
    context: RewardContext,
) -> None:
    once = replace(credentials, retry=RewardRetry(attempts=1))
    await ask_in_turn(server.at("closes-idle"), once, make_samples(4), context, 3)
    assert [request.connection_number for request in server.requests] == [1, 2, 3]


async def test_an_abort_on_a_used_connection_costs_no_attempt(
    server: RewardServer,
    credentials: HttpOptions,
    make_samples: MakeSamples,
    context: RewardContext,
) -> None:
    once = replace(credentials, retry=RewardRetry(attempts=1))
    await ask_in_turn(server.at("aborts-reused"), once, make_samples(4), context, 3)
    assert [request.connection_number for request in server.requests] == [1, 1, 2, 2]
    assert {request.headers["x-dar-attempt"] for request in server.requests} == {"1"}
    aborted, repeated = server.requests[1:3]
    assert aborted.body == repeated.body


@pytest.mark.parametrize("framing", ["sized", "chunked"])
@pytest.mark.parametrize(
    ("behaviour", "connections"), [("answers-twice", [1, 2, 3, 4]), ("answers-once", [1, 1, 1, 1])]
)
async def test_an_answer_that_is_sent_twice_answers_no_other_request(
    server: RewardServer,
    credentials: HttpOptions,
    make_samples: MakeSamples,
    context: RewardContext,
    behaviour: str,
    connections: list[int],
    framing: str,
) -> None:
    options = replace(credentials, protocol=OpenRLHFProtocol())
    source = HttpReward("r", server.at(f"{behaviour}/{framing}"), options=options)
    found = [await source.score(make_samples(4), context) for _ in range(4)]
    await source.aclose()
    assert found == [[Scored(float(number))] * 4 for number in (1, 2, 3, 4)]
    assert [request.connection_number for request in server.requests] == connections


async def test_no_cookie_is_kept(
    server: RewardServer,
    credentials: HttpOptions,
    make_samples: MakeSamples,
    context: RewardContext,
) -> None:
    source = HttpReward("r", server.at("cookie"), options=credentials)
    for _ in range(2):
        await source.score(make_samples(4), context)
    await source.aclose()
    assert [("cookie" in request.headers) for request in server.requests] == [False, False]


async def test_a_burst_of_failures_loses_no_sample(
    server: RewardServer, score: Ask, seen: Seen, credentials: HttpOptions
) -> None:
    options = replace(
        credentials,
        batch=RewardBatching(max_samples=4, linger_ms=0),
        limits=RewardLimits(concurrency=8),
        retry=RewardRetry(attempts=20, base=0.005, cap=0.02),
        breaker=BreakerOptions(min_calls=10, open_seconds=0.1, max_open_seconds=0.4),
        budget=RetryBudgetOptions(window_seconds=0.5),
    )
    found = await score(server.at("status/500?first=20"), 160, options)
    assert found == [Scored(n / 8) for n in range(160)]
    assert seen.states[0] == "open"
    assert seen.states[-1] == "closed"
    retries = sum(record.attempt > 1 for record in seen.records)
    assert len(seen.records) == len(server.requests) == 40 + retries
    assert retries == 20
    # At most 10 + 7 were on their way when it opened; from then on each pause let one through.
    assert seen.states.count("open") >= 3


async def test_retries_stay_within_their_budget(
    server: RewardServer, score: Ask, credentials: HttpOptions
) -> None:
    options = replace(
        credentials,
        batch=RewardBatching(max_samples=4, linger_ms=0),
        timeouts=RewardTimeouts(connect=10, read=20, attempt=20, deadline=30),
        breaker=BreakerOptions(min_calls=1000),
        budget=RetryBudgetOptions(fraction=0.2, minimum=3, window_seconds=1000),
    )
    found = await score(server.at("status/500"), 40, options)
    assert {result.code for result in found} == {"http_500"}
    assert len(server.requests) == 10 + 3


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("0.1", "0.1 s"),
        ("999999", "0.2 s"),
        ("Sun, 06 Nov 1994 08:49:37 GMT", "0.0 s"),
        ("-1", "0.0 s"),
        ("soon", "0.0 s"),
        ("1e999", "0.0 s"),
    ],
)
async def test_retry_after_is_kept_within_bounds(
    server: RewardServer, score: Ask, seen: Seen, value: str, wait: str
) -> None:
    started = time.monotonic()
    assert await score(server.at(f"retry-after/{value}".replace(" ", "%20"))) == SENT
    assert time.monotonic() - started >= float(wait.split()[0])
    assert [message.rpartition(" in ")[2] for message in seen.messages] == [wait]


async def test_a_wait_beyond_the_deadline_fails_at_once(
    server: RewardServer, score: Ask, credentials: HttpOptions, seen: Seen
) -> None:
    patient = replace(credentials, retry=RewardRetry(attempts=3, base=0.005, retry_after_cap=60))
    found = await score(server.at("retry-after/100"), options=patient)
    assert seen.messages == []
    assert all(result.code == "http_429" and result.is_transient for result in found)
    assert len(server.requests) == 1


PERMANENT = {
    "redirect/302,http:%2F%2F169.254.169.254%2F": "config.redirect",
    "redirect/307,%2Ffine": "config.redirect",
    **{f"status/{code},no": f"http_{code}" for code in (401, 403, 404, 405, 410, 415, 418)},
}


@pytest.mark.parametrize("path", PERMANENT)
async def test_a_refusal_for_good_stops_at_once(
    server: RewardServer, score: Ask, seen: Seen, path: str
) -> None:
    with pytest.raises(RewardMisconfiguredError) as caught:
        await score(server.at(path))
    assert caught.value.error_code == PERMANENT[path]
    assert "/".join(path.split("/")[:2]) in caught.value.message
    assert [request.path for request in server.requests] == [f"/{path}"]
    assert seen.states == ["misconfigured"]


async def test_after_a_refusal_nothing_is_sent_until_it_may_have_been_mended(
    server: RewardServer, score: Ask, credentials: HttpOptions
) -> None:
    one_by_one = replace(
        credentials,
        batch=RewardBatching(max_samples=4, linger_ms=0),
        limits=RewardLimits(concurrency=1),
        breaker=BreakerOptions(open_seconds=0.3),
    )
    url = server.at("status/401?first=1")
    with pytest.raises(RewardMisconfiguredError):
        await score(url, 40, one_by_one)
    with pytest.raises(RewardMisconfiguredError, match="HTTP 401"):
        await score(url, 4, one_by_one)
    assert len(server.requests) == 1
    await asyncio.sleep(0.3)
    assert await score(url, 4, one_by_one) == SENT


@pytest.mark.parametrize("code", [400, 422])
async def test_refused_samples_fail_without_a_retry(
    server: RewardServer, score: Ask, seen: Seen, code: int
) -> None:
    found = await score(server.at(f"status/{code},too odd"))
    assert {(result.code, result.is_transient) for result in found} == {(f"http_{code}", False)}
    assert "too odd" in found[0].message
    assert seen.records[0].quote == "too odd"
    assert len(server.requests) == 1


async def test_a_request_that_is_too_large_is_halved_between_groups(
    server: RewardServer, score: Ask, seen: Seen
) -> None:
    assert await score(server.at("at-most/8"), 16) == [Scored(n / 8) for n in range(16)]
    groups = [{s["group_id"] for s in item.content["samples"]} for item in server.requests]
    assert groups == [{"g0", "g1", "g2", "g3"}, {"g0", "g1"}, {"g2", "g3"}]
    assert len({item.headers["webhook-id"] for item in server.requests}) == 3
    assert seen.states == []


SECRETS_ECHOED = [
    "401",
    "403",
    "500",
    "503",
    "feedback",
    "reason",
    "error",
    "request_id",
    "header",
    "type",
]


@pytest.mark.parametrize("where", SECRETS_ECHOED)
async def test_secrets_that_a_service_sends_back_are_shown_nowhere(
    server: RewardServer, score: Ask, where: str
) -> None:
    """The fixture searches results, errors, records, messages and logs."""
    if where in {"401", "403"}:
        with pytest.raises(RewardMisconfiguredError) as caught:
            await score(server.at(f"echo/{where}"))
        assert "....." in caught.value.message
    else:
        assert len(await score(server.at(f"echo/{where}"))) == 4


async def test_samples_that_the_service_could_not_score_for_now_are_sent_again_alone(
    server: RewardServer, score: Ask, seen: Seen
) -> None:
    assert await score(server.at("judge/1")) == SENT
    first, second = server.requests
    assert (first.ids, second.ids) == (["s0", "s1", "s2", "s3"], ["s1", "s3"])
    assert first.request_id != second.request_id
    assert [(record.outcome, record.samples) for record in seen.records] == [("ok", 4), ("ok", 2)]


async def test_samples_that_stay_unscored_are_given_up_after_all_attempts(
    server: RewardServer, score: Ask
) -> None:
    found = await score(server.at("judge/99"))
    assert found[::2] == SENT[::2]
    failed = Failed("service.judge_timeout", "the judge slept", is_transient=True)
    assert found[1::2] == [failed] * 2
    assert [len(request.ids) for request in server.requests] == [4, 2, 2]


async def test_the_same_samples_of_a_job_have_the_same_request_id_in_every_process(
    server: RewardServer, score: Ask
) -> None:
    for _ in range(2):
        await score(server.at("fine"))
    first, again = server.requests
    assert first.request_id == again.request_id
    assert first.headers["webhook-id"] == again.headers["webhook-id"] == first.request_id
