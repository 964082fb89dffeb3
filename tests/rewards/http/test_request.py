"""How requests of concurrent calls are put together, bounded, shared and given up."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest

from dar.errors import ConfigurationError, RewardMisconfiguredError
from dar.protocol.reward_spec import RewardBatching, RewardLimits, RewardRetry
from dar.rewards.base import Failed, RewardContext, RewardSample, Scored
from dar.rewards.http.breaker import BreakerOptions
from dar.rewards.http.redaction import check_headers
from dar.rewards.http.retry import RetryBudgetOptions
from dar.rewards.http.signing import decode_secret, signed_headers, verify
from dar.rewards.http_reward import HttpOptions, HttpReward
from fakes.observer import Seen
from fakes.reward_server import RewardServer, ScoreRequest, fine
from fakes.reward_types import SourceOf

Ask = Callable[..., Any]
OTHER_SECRET = "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo="


def group(number: int, k: int = 4, completion: str = "c") -> list[RewardSample]:
    return [
        RewardSample(f"s{number * k + n}", f"g{number}", n, "p", None, completion, "stop", 1)
        for n in range(k)
    ]


def rewards(number: int, k: int = 4) -> list[Scored]:
    return [Scored((number * k + n) / 8) for n in range(k)]


async def arrived(server: RewardServer, count: int) -> None:
    """Wait for so many requests."""
    while len(server.requests) < count:  # noqa: ASYNC110 - the server is in another thread
        await asyncio.sleep(0.01)


@pytest.fixture
async def source_of(fast: HttpOptions) -> AsyncIterator[SourceOf]:
    opened: list[HttpReward] = []

    def make(url: str, options: HttpOptions = fast, **more: Any) -> HttpReward:
        opened.append(HttpReward(more.pop("name", "r"), url, options=options, **more))
        return opened[-1]

    yield make
    for source in opened:
        await source.aclose()


async def test_groups_of_concurrent_calls_share_requests(
    server: RewardServer, source_of: SourceOf, context: RewardContext
) -> None:
    source = source_of(server.at("fine"))
    found = await asyncio.gather(*[source.score(group(n), context) for n in range(10)])
    assert found == [rewards(n) for n in range(10)]
    assert [len(request.ids) for request in server.requests] == [16, 16, 8]


async def test_a_sample_is_encoded_once(
    server: RewardServer,
    source_of: SourceOf,
    context: RewardContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("dar.rewards.protocols.native.encode_sample")
    assert await source_of(server.at("fine")).score(group(1), context) == rewards(1)


async def test_steps_and_modes_do_not_share_requests(
    server: RewardServer, source_of: SourceOf
) -> None:
    source = source_of(server.at("fine"))
    contexts = [RewardContext(1), RewardContext(2), RewardContext(1, "eval")]
    await asyncio.gather(*[source.score(group(n), given) for n, given in enumerate(contexts)])
    sent = {(r.content["step"], r.content["mode"], len(r.ids)) for r in server.requests}
    assert sent == {(1, "train", 4), (2, "train", 4), (1, "eval", 4)}


async def test_the_same_ids_in_two_calls_do_not_share_a_request(
    server: RewardServer, source_of: SourceOf, context: RewardContext
) -> None:
    source = source_of(server.at("fine"))
    found = await asyncio.gather(*[source.score(group(0), context) for _ in range(2)])
    assert found == [rewards(0)] * 2
    assert [len(request.ids) for request in server.requests] == [4, 4]


async def test_bodies_keep_within_their_bytes(
    server: RewardServer, source_of: SourceOf, fast: HttpOptions, context: RewardContext
) -> None:
    source = source_of(
        server.at("fine"), replace(fast, batch=RewardBatching(max_samples=64, max_bytes=8192))
    )
    found = await asyncio.gather(
        *[source.score(group(n, completion="x" * 500), context) for n in range(8)]
    )
    assert found == [rewards(n) for n in range(8)]
    assert len(server.requests) == 4
    assert all(len(request.body) <= 8192 for request in server.requests)


async def test_a_request_that_is_not_full_lingers_for_more(
    server: RewardServer, source_of: SourceOf, fast: HttpOptions, context: RewardContext
) -> None:
    patient = replace(fast, batch=RewardBatching(max_samples=8, linger_ms=10_000))
    source = source_of(server.at("fine"), patient)
    first = asyncio.create_task(source.score(group(0), context))
    await asyncio.sleep(0.1)
    assert server.requests == []
    assert await source.score(group(1), context) == rewards(1)
    assert await first == rewards(0)
    assert [len(request.ids) for request in server.requests] == [8]


async def test_callers_are_held_back_while_too_many_requests_wait(
    server: RewardServer, source_of: SourceOf, fast: HttpOptions, context: RewardContext
) -> None:
    one_by_one = replace(
        fast, batch=RewardBatching(max_samples=4), limits=RewardLimits(concurrency=2)
    )
    source = source_of(server.at("no-answer"), one_by_one)
    calls = [asyncio.create_task(source.score(group(n), context)) for n in range(30)]
    await arrived(server, 2)
    await asyncio.sleep(0.05)
    assert len(server.requests) == 2
    batcher = source._batcher
    assert len(batcher._waiting) == 4 * 2
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert batcher._waiting == set()
    assert batcher._places._value == 8


async def test_no_more_requests_are_in_flight_than_allowed_over_all_sources_of_an_endpoint(
    server: RewardServer, source_of: SourceOf, fast: HttpOptions, context: RewardContext
) -> None:
    options = replace(fast, batch=RewardBatching(max_samples=4), limits=RewardLimits(concurrency=3))
    sources = [source_of(server.at("no-answer"), options, name=f"c{n}") for n in range(2)]
    calls = [asyncio.create_task(s.score(group(n), context)) for s in sources for n in range(6)]
    await arrived(server, 3)
    await asyncio.sleep(0.1)
    assert len(server.requests) == server.connections == 3
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_sources_that_differ_in_credentials_share_nothing(
    server: RewardServer, source_of: SourceOf, secret: str, context: RewardContext
) -> None:
    first, second = source_of(server.at("fine"), secret=secret), source_of(server.at("fine"))
    await first.score(group(0), context)
    await second.score(group(0), context)
    assert server.connections == 2
    third = source_of(server.at("fine"))
    await third.score(group(0), context)
    assert server.connections == 2


async def test_fifty_requests_in_flight_are_cancelled_within_a_second(
    server: RewardServer, source_of: SourceOf, seen: Seen, fast: HttpOptions, context: RewardContext
) -> None:
    options = replace(
        fast, batch=RewardBatching(max_samples=4), limits=RewardLimits(concurrency=50)
    )
    source = source_of(server.at("no-answer"), options, observer=seen)
    calls = [asyncio.create_task(source.score(group(n), context)) for n in range(50)]
    await arrived(server, 50)
    started = time.monotonic()
    for call in calls:
        call.cancel()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert time.monotonic() - started < 1
    assert all(isinstance(error, asyncio.CancelledError) for error in ended)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert seen.states == []
    assert source._endpoint.breaker.state == "closed"


async def test_a_cancelled_call_does_not_take_the_others_with_it(
    server: RewardServer, source_of: SourceOf, context: RewardContext
) -> None:
    source = source_of(server.at("fine"))
    calls = [asyncio.create_task(source.score(group(n), context)) for n in range(4)]
    await asyncio.sleep(0)
    calls[1].cancel()
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(found[1], asyncio.CancelledError)
    assert [found[n] for n in (0, 2, 3)] == [rewards(n) for n in (0, 2, 3)]


async def test_requests_begin_no_faster_than_the_rate(
    server: RewardServer, source_of: SourceOf, fast: HttpOptions, context: RewardContext
) -> None:
    options = replace(
        fast, batch=RewardBatching(max_samples=4), limits=RewardLimits(concurrency=8, rps=50)
    )
    source = source_of(server.at("fine"), options)
    started = time.monotonic()
    await asyncio.gather(*[source.score(group(n), context) for n in range(11)])
    assert time.monotonic() - started >= 10 / 50


async def test_an_open_breaker_holds_requests_back_only_so_long(
    server: RewardServer, source_of: SourceOf, seen: Seen, fast: HttpOptions, context: RewardContext
) -> None:
    options = replace(
        fast,
        batch=RewardBatching(max_samples=4),
        retry=RewardRetry(attempts=1),
        breaker=BreakerOptions(
            min_calls=2, open_seconds=30, pause_grace_seconds=0.2, failure_fraction=0.5
        ),
    )
    source = source_of(server.at("status/500"), options, observer=seen)
    for n in range(2):
        assert (await source.score(group(n), context))[0].code == "http_500"
    started = time.monotonic()
    found = await source.score(group(2), context)
    assert time.monotonic() - started >= 0.2
    assert {(type(result), result.code) for result in found} == {(Failed, "breaker_open")}
    assert all(result.is_transient for result in found)
    assert len(server.requests) == 2
    assert seen.states == ["open"]
    assert (seen.records[-1].outcome, seen.records[-1].is_final) == ("breaker_open", True)


async def test_the_deadline_stands_still_while_the_breaker_is_open(
    server: RewardServer, source_of: SourceOf, fast: HttpOptions, context: RewardContext
) -> None:
    options = replace(
        fast,
        batch=RewardBatching(max_samples=4),
        timeouts=fast.timeouts.model_copy(update={"deadline": 0.5}),
        retry=RewardRetry(attempts=1),
        breaker=BreakerOptions(min_calls=2, open_seconds=0.8),
    )
    source = source_of(server.at("status/500?first=2"), options)
    for n in range(2):
        await source.score(group(n), context)
    assert await source.score(group(2), context) == rewards(2)


async def test_too_large_requests_do_not_open_the_breaker(
    server: RewardServer, source_of: SourceOf, seen: Seen, fast: HttpOptions, context: RewardContext
) -> None:
    options = replace(fast, breaker=BreakerOptions(min_calls=1))
    source = source_of(server.at("at-most/1"), options, observer=seen)
    assert await source.score(group(0), context) == rewards(0)
    assert seen.states == []
    assert source.state() == {"max_samples": 1}


async def test_all_secrets_sign_so_that_one_can_replace_another(
    server: RewardServer, source_of: SourceOf, secret: str, context: RewardContext
) -> None:
    await source_of(server.at("fine"), secrets=[OTHER_SECRET, secret]).score(group(0), context)
    request = server.requests[0]
    assert request.headers["webhook-signature"].count("v1,") == 2
    for key in (secret, OTHER_SECRET):
        verify([decode_secret(key)], request.headers, request.body)


async def test_an_answer_that_must_be_signed_is(
    hostile: Callable[..., RewardServer],
    source_of: SourceOf,
    fast: HttpOptions,
    secret: str,
    context: RewardContext,
) -> None:
    def signed(key: str, tamper: bytes = b"") -> Callable[[Any], None]:
        def answer(request: ScoreRequest) -> None:
            content = {"request_id": request.content["request_id"], "rewards": [0.5] * 4}
            body = orjson.dumps(content)
            headers = signed_headers([decode_secret(key)], "rwr_1", int(time.time()), body)  # noqa: TID251 - an instant
            request.answer(body + tamper, **{n.replace("-", "_"): v for n, v in headers.items()})

        return answer

    strict = replace(fast, require_signed_responses=True)
    found = await source_of(hostile(signed(secret)).url, strict, secret=secret).score(
        group(0), context
    )
    assert found == [Scored(0.5)] * 4
    for behave in (signed(OTHER_SECRET), signed(secret, b" "), fine):
        bad = hostile(behave)
        found = await source_of(bad.url, strict, secret=secret).score(group(0), context)
        assert {result.code for result in found} == {"contract.signature"}
        assert len(bad.requests) == 2
    with pytest.raises(ConfigurationError, match="secret"):
        HttpReward("r", "https://rewards.example/", options=strict)


async def test_secret_headers_are_sent_and_never_shown(
    server: RewardServer, source_of: SourceOf, fast: HttpOptions, context: RewardContext
) -> None:
    secret = replace(fast, headers={"Authorization": "Bearer abcdefgh", "X-Team": "blue"})
    await source_of(server.at("fine"), secret).score(group(0), context)
    assert server.requests[0].headers["authorization"] == "Bearer abcdefgh"
    assert server.requests[0].headers["x-team"] == "blue"
    assert "abcdefgh" not in repr(secret)


@pytest.mark.parametrize(
    "name",
    [
        "Host",
        "content-length",
        "Content-Type",
        "transfer-encoding",
        "connection",
        "te",
        "upgrade",
        "webhook-id",
        "Webhook-Signature",
        "idempotency-key",
        "x-dar-attempt",
        "a b",
        "a:",
        "",
        "ä",
    ],
)
def test_headers_that_frame_or_sign_a_request_cannot_be_given(name: str) -> None:
    with pytest.raises(ConfigurationError):
        check_headers({name: "v"})


@pytest.mark.parametrize("value", ["no\r\nb: c", "no\nb", "no\0b", "nö", "  no", "no\x7f"])
def test_values_that_break_out_of_a_header_are_refused_and_not_shown(value: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_headers({"x-key": value})
    assert value not in caught.value.message


@pytest.mark.parametrize("name", ["authorization: Bearer s3cret", "Bearer s3cret", "s3cret/+", ":"])
def test_a_value_that_was_written_into_a_name_is_not_shown(name: str) -> None:
    with pytest.raises(ConfigurationError, match="the name of") as caught:
        check_headers({name: ""})
    assert "s3cret" not in caught.value.message


async def test_a_prompt_format_of_text_sends_what_the_policy_saw(
    server: RewardServer, source_of: SourceOf, fast: HttpOptions, context: RewardContext
) -> None:
    message = {"role": "user", "content": "hi"}
    sample = RewardSample("s0", "g0", 0, None, [message], "c", "stop", 1, prompt_text="<u>hi")
    for form in ("auto", "text"):
        source = source_of(server.at("fine"), replace(fast, prompt_format=form))
        await source.score([sample], context)
    first, second = (request.content["samples"][0] for request in server.requests)
    assert (first["prompt"], first["messages"]) == (None, [message])
    assert (second["prompt"], second["messages"]) == ("<u>hi", None)


async def test_a_probe_that_shares_nothing_is_not_held_back_by_others(
    server: RewardServer, source_of: SourceOf, fast: HttpOptions, context: RewardContext
) -> None:
    url = server.at("status/401?first=1")
    with pytest.raises(RewardMisconfiguredError):
        await source_of(url).score(group(0), context)
    alone = source_of(url, replace(fast, is_shared=False))
    assert await alone.score(group(0), context) == rewards(0)


async def test_attempts_of_one_request_are_told_to_the_observer(
    server: RewardServer, source_of: SourceOf, seen: Seen, fast: HttpOptions, context: RewardContext
) -> None:
    options = replace(fast, budget=RetryBudgetOptions(minimum=1))
    source = source_of(server.at("status/503,busy?first=1"), options, observer=seen)
    assert await source.score(group(0), context) == rewards(0)
    first, second = seen.records
    assert (first.outcome, first.status, first.quote) == ("http_503", 503, "busy")
    assert (second.outcome, second.status, second.attempt) == ("ok", 200, 2)
    assert first.request_id == second.request_id == server.requests[0].request_id
    assert first.bytes_out == len(server.requests[0].body)
    assert (first.step, first.mode, first.samples) == (3, "train", 4)
    assert second.bytes_in > 0
