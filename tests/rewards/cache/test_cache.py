"""Rewards that need not be asked for: what travels, what is remembered, and for whom."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_spec import Rewards
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import Failed, RewardContext, RewardSample, Scored, Skipped
from dar.rewards.cache.cache import CachePlace, ResultCache, SampleKey
from dar.rewards.cache.store import FILE, CacheStore
from dar.rewards.from_spec import RewardAccess, scorer_from_spec
from dar.rewards.http_reward import HttpOptions, HttpReward
from fakes.observer import Seen
from fakes.reward_server import RewardServer, ScoreRequest, status

STEP = RewardContext(step=1, job_id="ftjob-1")
NEXT = RewardContext(step=2, job_id="ftjob-1")
CHATTY = {
    "results": lambda request: [
        {"id": i, "reward": 0.1, "components": {"style": -0.3}, "feedback": "söme\n"}
        for i in request.ids
    ]
}


def sample(completion: str, number: int = 0, group: int = 0, **values: Any) -> RewardSample:
    base: dict[str, Any] = {
        "prompt": "p",
        "messages": None,
        "finish_reason": "stop",
        "completion_tokens": 2,
        **values,
    }
    return RewardSample(f"s{number}", f"g{group}", number, completion=completion, **base)


def samples(*completions: str, group: int = 0, start: int = 0) -> list[RewardSample]:
    return [sample(c, start + n, group) for n, c in enumerate(completions)]


def by_length(request: ScoreRequest) -> None:
    """The reward is the completion's length: another one for each that differs."""
    request.rewards([float(len(one["completion"])) for one in request.content["samples"]])


def sent(service: Any) -> list[list[str]]:
    return [[one["completion"] for one in r.content["samples"]] for r in service.requests]


@pytest.fixture
async def remember(
    fast: HttpOptions, tmp_path: Path, seen: Seen
) -> AsyncIterator[Callable[..., HttpReward]]:
    """A source that remembers; by default all of them in one folder."""
    opened: list[HttpReward] = []

    def start(
        url: str,
        asked: Any = None,
        *,
        columns: list[str] | None = None,
        store: CacheStore | None = None,
        **options: Any,
    ) -> HttpReward:
        key = SampleKey(asked or {"endpoint": "e"}, columns)
        cache = ResultCache(store or CacheStore(tmp_path / "cache"), key, ttl_seconds=600)
        own = replace(fast, columns=columns, **options)
        opened.append(HttpReward("r", url, options=own, observer=seen, cache=cache))
        return opened[-1]

    yield start
    for source in opened:
        await source.aclose()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


# --- equal samples of a step ----------------------------------------------------------------------


async def test_equal_samples_of_a_call_travel_once(
    hostile: Callable[..., RewardServer], remember: Callable[..., HttpReward], seen: Seen
) -> None:
    service = hostile(by_length)
    results = await remember(service.url).score(samples("a", "bbb", "a", "a", "bbb"), STEP)
    assert results == [Scored(1.0), Scored(3.0), Scored(1.0), Scored(1.0), Scored(3.0)]
    assert sent(service) == [["a", "bbb"]]
    assert seen.samples_not_sent == [(0, 3)]


async def test_equal_samples_of_concurrent_calls_travel_once(
    hostile: Callable[..., RewardServer], remember: Callable[..., HttpReward], seen: Seen
) -> None:
    service = hostile(by_length)
    source = remember(service.url)
    calls = [samples("a", "bb", "ccc"[:n], group=n, start=10 * n) for n in (1, 2, 3)]
    results = await asyncio.gather(*(source.score(call, STEP) for call in calls))
    assert [[one.reward for one in call] for call in results] == [[1, 2, 1], [1, 2, 2], [1, 2, 3]]
    travelled = [completion for request in sent(service) for completion in request]
    assert sorted(travelled) == ["a", "bb", "c", "cc", "ccc"]
    assert sum(copies for _, copies in seen.samples_not_sent) == 4


async def test_what_is_no_reward_is_shared_in_its_step_and_forgotten(
    hostile: Callable[..., RewardServer], remember: Callable[..., HttpReward], seen: Seen
) -> None:
    def skip_one_fail_one(request: ScoreRequest) -> None:
        error = {"code": "odd", "message": "no", "retryable": False}
        said = {"skip": {"skip": True, "reason": "none"}, "fail": {"error": error}}
        results = [
            {"id": one["id"], **said.get(one["completion"], {"reward": 1})}
            for one in request.content["samples"]
        ]
        content = {"request_id": request.content["request_id"], "results": results}
        request.answer(orjson.dumps(content))

    service = hostile(skip_one_fail_one)
    source = remember(service.url)
    results = await source.score(samples("skip", "fail", "skip", "fail", "x"), STEP)
    assert results[0] == results[2] == Skipped("none")
    assert results[1] == results[3]
    assert isinstance(results[1], Failed)
    await source.score(samples("skip", "fail", "x"), NEXT)
    assert sent(service) == [["skip", "fail", "x"], ["skip", "fail"]]
    assert seen.samples_not_sent == [(0, 2), (1, 0)]


async def test_a_failed_request_is_nothing_to_remember(
    hostile: Callable[..., RewardServer], remember: Callable[..., HttpReward]
) -> None:
    service = hostile(status(422, b"no"), by_length)
    source = remember(service.url)
    refused = await source.score(samples("a", "a"), STEP)
    assert [type(one) for one in refused] == [Failed, Failed]
    assert await source.score(samples("a", "a"), STEP) == [Scored(1.0), Scored(1.0)]


async def test_a_cancelled_call_takes_nothing_from_others(
    hostile: Callable[..., RewardServer], remember: Callable[..., HttpReward]
) -> None:
    may_answer, is_here = threading.Event(), threading.Event()

    def late(request: ScoreRequest) -> None:
        is_here.set()
        may_answer.wait(20)
        by_length(request)

    service = hostile(late)
    source = remember(service.url)
    first = asyncio.create_task(source.score(samples("a", "bb"), STEP))
    await asyncio.to_thread(is_here.wait, 20)
    second = asyncio.create_task(source.score(samples("a", group=1, start=5), STEP))
    await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    may_answer.set()
    assert await second == [Scored(1.0)]
    assert sent(service) == [["a", "bb"]]


async def test_what_nobody_waits_for_is_dropped_and_asked_for_anew(
    hostile: Callable[..., RewardServer], remember: Callable[..., HttpReward]
) -> None:
    is_here = threading.Event()

    def hang(request: ScoreRequest) -> None:
        is_here.set()
        request.hang()

    service = hostile(hang, by_length)
    source = remember(service.url)
    calls = [asyncio.create_task(source.score(samples("a"), STEP)) for _ in range(3)]
    await asyncio.to_thread(is_here.wait, 20)
    for call in calls:
        call.cancel()
    await asyncio.sleep(0)
    assert await source.score(samples("a"), STEP) == [Scored(1.0)]
    assert [call.cancelled() for call in calls] == [True] * 3


async def test_a_refusal_reaches_all_who_wait(
    hostile: Callable[..., RewardServer], remember: Callable[..., HttpReward]
) -> None:
    source = remember(hostile(status(401, b"who?")).url)
    calls = [source.score(samples("a", group=n), STEP) for n in range(3)]
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [RewardMisconfiguredError] * 3


async def test_request_ids_are_those_of_what_is_sent(
    hostile: Callable[..., RewardServer], remember: Callable[..., HttpReward], fast: HttpOptions
) -> None:
    service = hostile(by_length)
    await remember(service.url).score(samples("a", "bb", "a"), STEP)
    await remember(service.url, store=CacheStore(None)).score(samples("a", "bb", "a"), STEP)
    plain = HttpReward("r", service.url, options=fast)
    await plain.score(samples("a", "bb"), STEP)
    await plain.aclose()
    ids = [request.content["request_id"] for request in service.requests]
    assert len(ids) == 3
    assert len(set(ids)) == 1


async def test_completions_that_differ_in_their_thinking_alone_travel_once(
    hostile: Callable[..., RewardServer], remember: Callable[..., HttpReward]
) -> None:
    service = hostile(by_length)
    thoughts = samples("<think>a</think>xy", "<think>b</think>xy", "xy")
    source = remember(service.url)
    plain = await source.score(thoughts, STEP)
    await source.aclose()  # what it has to remember is written by now
    assert plain == [Scored(18.0), Scored(18.0), Scored(2.0)]
    stripped = remember(service.url, strip_thinking=True)
    assert await stripped.score(thoughts, STEP) == [Scored(2.0)] * 3, (
        "none of the long ones' reward"
    )
    assert sent(service) == [[one.completion for one in thoughts]], "xy was remembered"


# --- remembered rewards ---------------------------------------------------------------------------


async def test_a_reward_is_remembered_with_all_that_was_said(
    hostile: Callable[..., RewardServer], remember: Callable[..., HttpReward], seen: Seen
) -> None:
    def chatty(request: ScoreRequest) -> None:
        content = {
            "request_id": request.content["request_id"],
            "results": CHATTY["results"](request),
        }
        request.answer(orjson.dumps(content))

    service = hostile(chatty)
    source = remember(service.url)
    fresh = await source.score(samples("a"), STEP)
    assert fresh == [Scored(0.1, {"style": -0.3}, fresh[0].feedback)]
    assert fresh[0].feedback
    assert await source.score(samples("a", "a"), NEXT) == fresh * 2
    evaluation = RewardContext(step=2, mode="eval", job_id="ftjob-2")
    assert await source.score(samples("a"), evaluation) == fresh
    await source.aclose()
    assert await remember(service.url).score(samples("a"), STEP) == fresh, "in another process"
    assert len(service.requests) == 1
    assert seen.samples_not_sent == [(2, 0), (1, 0), (1, 0)]


async def test_a_validation_always_asks(
    hostile: Callable[..., RewardServer], remember: Callable[..., HttpReward]
) -> None:
    service = hostile(by_length)
    source = remember(service.url)
    for _ in range(2):
        await source.score(samples("a", "a"), RewardContext(step=1, mode="validate"))
    assert sent(service) == [["a", "a"], ["a", "a"]]


async def test_without_a_usable_file_everything_is_asked_for(
    hostile: Callable[..., RewardServer],
    remember: Callable[..., HttpReward],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = hostile(by_length)
    source = remember(service.url)
    await source.score(samples("a"), STEP)
    await source.aclose()
    (tmp_path / "cache" / FILE).write_bytes(b"damaged" * 1000)
    assert await source.score(samples("a"), NEXT) == [Scored(1.0)]
    assert await source.score(samples("a"), NEXT) == [Scored(1.0)]
    assert len(service.requests) == 2
    assert "are damaged" in caplog.text
    caplog.clear()
    (tmp_path / "file").write_text("")
    store = CacheStore(tmp_path / "file" / "no-folder")
    helpless = remember(service.url, store=store)
    for context in (STEP, NEXT):
        assert await helpless.score(samples("a"), context) == [Scored(1.0)]
    assert len(service.requests) == 4
    assert len(caplog.records) == 1


@pytest.mark.parametrize("revision", [1, 2])
def test_a_job_remembers_over_attempts_until_the_revision_changes(
    hostile: Callable[..., RewardServer], tmp_path: Path, revision: int
) -> None:
    service = hostile(by_length)
    place = CachePlace(tmp_path / "job", tmp_path)
    rewards = Rewards.model_validate({"components": [{"name": "r", "endpoint": "rwe_" + "0" * 26}]})
    known = ComponentAccess(
        url=service.url, secrets=[], headers={}, endpoint_id="rwe_1", is_deterministic=True
    )
    for number in (1, revision):
        reached = {"r": known.model_copy(update={"revision": number})}
        access = RewardAccess(reached, cache=place)
        with scorer_from_spec(rewards, access, job_id="ftjob-1") as scorer:
            totals = scorer.score(samples("a", "bb", "a"), STEP)
        assert [total.reward for total in totals] == [1.0, 2.0, 1.0]
    assert len(service.requests) == revision


def test_without_a_place_nothing_is_remembered(hostile: Callable[..., RewardServer]) -> None:
    service = hostile(by_length)
    one = {"name": "r", "url": service.url, "cache": {"enabled": True}}
    rewards = Rewards.model_validate({"components": [one]})
    with scorer_from_spec(rewards, RewardAccess()) as scorer:
        for context in (STEP, NEXT):
            scorer.score(samples("a", "a"), context)
    assert sent(service) == [["a", "a"], ["a", "a"]]


Groups = st.lists(
    st.lists(st.sampled_from(["a", "bb", "ccc", "skip", "é\ud800"]), min_size=1, max_size=4),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(Groups, min_size=1, max_size=3), is_split=st.booleans())
def test_rewards_are_the_same_with_and_without(
    hostile: Callable[..., RewardServer],
    fast: HttpOptions,
    steps: list[list[list[str]]],
    is_split: bool,
) -> None:
    def answer(request: ScoreRequest) -> None:
        texts = [one["completion"] for one in request.content["samples"]]
        request.rewards([None if text == "skip" else len(text) / 7 for text in texts])

    service = hostile(answer)

    async def rewards_with(cache: ResultCache | None) -> list[Any]:
        source = HttpReward("r", service.url, options=fast, cache=cache)
        found: list[Any] = []
        for step, groups in enumerate(steps, start=1):
            numbers = itertools.count()
            made = [
                [sample(text, next(numbers), place) for text in group]
                for place, group in enumerate(groups)
            ]
            calls = made if is_split else [[one for group in made for one in group]]
            context = RewardContext(step=step, job_id="ftjob-1")
            found += await asyncio.gather(*(source.score(call, context) for call in calls))
        await source.aclose()
        return found

    plain = asyncio.run(rewards_with(None))
    before = len(service.requests)
    store = CacheStore(None)
    assert asyncio.run(rewards_with(ResultCache(store, SampleKey({}), ttl_seconds=60))) == plain
    travelled = [text for request in sent(service)[before:] for text in request]
    scored = [text for text in travelled if text != "skip"]
    assert len(scored) == len(set(scored)), "each reward is asked for once"
