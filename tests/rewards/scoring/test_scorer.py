"""Rewards as a trainer gets them: summed, or missing, or an error.

And stopped at once on request.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from dar.errors import (
    ConfigurationError,
    InvalidRequestError,
    RewardContractError,
    RewardMisconfiguredError,
    RewardUnavailableError,
)
from dar.protocol.reward_spec import Rewards
from dar.rewards.base import (
    Failed,
    RewardContext,
    RewardResult,
    RewardSample,
    Scored,
    Skipped,
)
from dar.rewards.from_spec import RewardAccess, scorer_from_spec
from dar.rewards.functions import FunctionReward
from dar.rewards.http_reward import HttpOptions, HttpReward
from dar.rewards.scoring.scorer import (
    RewardScorer,
    ScoringStoppedError,
    WeightedSource,
    scorer_from_functions,
)
from fakes.reward_server import RewardServer, fine, hang, status
from fakes.reward_types import MakeSamples


class Fixed:
    """A source that always says the same."""

    def __init__(self, name: str, results: Sequence[RewardResult]) -> None:
        self.name = name
        self.results = list(results)
        self.contexts: list[RewardContext] = []
        self.is_closed = False

    async def score(
        self, samples: Sequence[RewardSample], context: RewardContext
    ) -> list[RewardResult]:
        self.contexts.append(context)
        return self.results

    async def aclose(self) -> None:
        self.is_closed = True


GOOD = Scored(1.0)
BAD = Failed("timeout", "late", is_transient=True)
WORSE = Failed("contract.length", "short", is_transient=False)
SKIP = Skipped("no maths")


def totals(make_samples: MakeSamples, k: int, *columns: Sequence[RewardResult]) -> list[Any]:
    sources = [WeightedSource(Fixed(f"c{n}", column)) for n, column in enumerate(columns)]
    with RewardScorer(sources) as scorer:
        return scorer.score(make_samples(len(columns[0]), k), RewardContext(1))


def test_the_total_is_the_weighted_sum_of_clipped_rewards(make_samples: MakeSamples) -> None:
    first = Fixed("a", [Scored(3.0), Scored(-9.0)])
    second = Fixed("b", [Scored(0.5), Scored(0.25)])
    sources = [WeightedSource(first, 2.0, (-5, 2.5)), WeightedSource(second, -1.0)]
    with RewardScorer(sources, job_id="ftjob-9") as scorer:
        found = scorer.score(make_samples(2), RewardContext(1))
    assert [total.reward for total in found] == [4.5, -10.25]
    assert [total.status for total in found] == ["reward", "reward"]
    assert found[1].components == {"a": -9.0, "b": 0.25}
    assert found[1].feedback == {}
    assert first.contexts == [RewardContext(1, job_id="ftjob-9")]
    assert first.is_closed
    assert second.is_closed


def test_what_services_say_beside_their_reward_is_kept_and_not_counted(
    make_samples: MakeSamples,
) -> None:
    told = Scored(1.0, {"correct": 5.0, "style": -3.0}, "well done")
    found = totals(make_samples, 2, [told, GOOD], [GOOD, BAD])
    assert found[0].reward == 2.0
    assert found[0].components == {"c0": 1.0, "c0/correct": 5.0, "c0/style": -3.0, "c1": 1.0}
    assert [total.feedback for total in found] == [{"c0": "well done"}, {}]


def test_a_failed_component_makes_the_sample_an_error(make_samples: MakeSamples) -> None:
    found = totals(make_samples, 2, [GOOD, GOOD], [GOOD, BAD])
    assert [total.status for total in found] == ["reward", "error"]
    assert found[1].reward is None
    assert found[1].message == "component c1: timeout: late"
    assert found[1].components == {"c0": 1.0, "c1": None}


def test_a_component_that_a_whole_group_skips_is_left_out(make_samples: MakeSamples) -> None:
    found = totals(make_samples, 2, [GOOD] * 4, [SKIP, SKIP, GOOD, GOOD])
    assert [total.reward for total in found] == [1.0, 1.0, 2.0, 2.0]


def test_a_component_that_part_of_a_group_skips_spoils_the_group(
    make_samples: MakeSamples,
) -> None:
    found = totals(make_samples, 2, [GOOD] * 4, [SKIP, GOOD, GOOD, GOOD])
    assert [total.status for total in found] == ["skip", "skip", "reward", "reward"]
    assert [total.reward for total in found] == [None, None, 2.0, 2.0]
    assert "cannot be compared" in found[0].message


def test_a_sample_that_everything_skips_is_left_out_by_itself(make_samples: MakeSamples) -> None:
    found = totals(make_samples, 3, [SKIP, GOOD, GOOD])
    assert [total.reward for total in found] == [None, 1.0, 1.0]
    assert [total.status for total in found] == ["skip", "reward", "reward"]
    assert found[0].message == "component c0: no maths"


def test_a_group_that_everything_skips_is_a_skip_with_the_reason(
    make_samples: MakeSamples,
) -> None:
    found = totals(make_samples, 2, [SKIP] * 2)
    assert [total.status for total in found] == ["skip", "skip"]
    assert found[0].message == "component c0: no maths"


def test_failed_samples_do_not_count_as_skipped_by_others(make_samples: MakeSamples) -> None:
    found = totals(make_samples, 3, [GOOD] * 3, [SKIP, BAD, SKIP])
    assert [total.status for total in found] == ["reward", "error", "reward"]


def test_a_source_cannot_smuggle_in_what_is_no_number(make_samples: MakeSamples) -> None:
    found = totals(make_samples, 2, [GOOD, Scored(math.nan)])
    assert (found[1].reward, found[1].status) == (None, "error")
    scorer = RewardScorer([WeightedSource(Fixed("a", [GOOD]))])
    with scorer, pytest.raises(RewardContractError, match="1 results for 2"):
        scorer.score(make_samples(2), RewardContext(1))


def test_when_all_fail_for_passing_reasons_the_source_is_unavailable(
    make_samples: MakeSamples,
) -> None:
    with pytest.raises(RewardUnavailableError, match=r"all 2 samples .* late"):
        totals(make_samples, 2, [BAD, BAD])


def test_when_all_fail_and_one_for_good_the_contract_is_broken(make_samples: MakeSamples) -> None:
    with pytest.raises(RewardContractError, match="short") as caught:
        totals(make_samples, 2, [BAD, WORSE])
    assert caught.value.error_code == "contract.length"


def test_what_only_watches_is_not_blamed_for_a_step_without_rewards(
    make_samples: MakeSamples,
) -> None:
    watcher = WeightedSource(Fixed("watcher", [WORSE, WORSE]), weight=0.0)
    spare = WeightedSource(Fixed("spare", [WORSE, WORSE]), required=False)
    main = WeightedSource(Fixed("main", [BAD, BAD]))
    with (
        RewardScorer([watcher, spare, main]) as scorer,
        pytest.raises(RewardUnavailableError, match="component main: late"),
    ):
        scorer.score(make_samples(2), RewardContext(1))


def test_nothing_to_score_asks_nobody(make_samples: MakeSamples) -> None:
    source = Fixed("a", [])
    with RewardScorer([WeightedSource(source)]) as scorer:
        assert scorer.score([], RewardContext(1)) == []
    assert not source.contexts


def test_what_a_function_raises_comes_out_and_the_others_are_cancelled(
    make_samples: MakeSamples,
) -> None:
    error = KeyError("mine")
    cancelled = threading.Event()

    def broken(completions: list[str]) -> list[float]:
        raise error

    async def slow(completions: list[str]) -> list[float]:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return []

    with scorer_from_functions([slow, broken]) as scorer:
        with pytest.raises(KeyError) as caught:
            scorer.score(make_samples(2), RewardContext(1))
        assert caught.value is error
        assert cancelled.is_set()


class Panic(BaseException):
    """Like the panic of a library in Rust, which is no Exception."""


RAISED = [
    SystemExit(3), KeyboardInterrupt(), Panic("mine"), asyncio.CancelledError("mine"),
    GeneratorExit("mine"), BaseExceptionGroup("mine", [Panic()]), TimeoutError("mine"),
]  # fmt: skip


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_a_function_raises_ends_the_call_with_it(
    make_samples: MakeSamples, error: BaseException
) -> None:
    def plain(completions: list[str]) -> list[float]:
        raise error

    async def later(completions: list[str]) -> list[float]:
        raise error

    class Judge:
        async def __call__(self, completions: list[str]) -> list[float]:
            raise error

    def generated(completions: list[str]) -> Iterator[float]:
        yield 1.0
        raise error

    functions: list[Any] = [plain, later, Judge(), generated]
    for function in functions:
        with scorer_from_functions(function) as scorer:
            for _ in range(2):
                with pytest.raises(type(error)) as caught:
                    scorer.score(make_samples(2), RewardContext(1))
                assert caught.value is error


def test_a_function_that_awaits_a_cancelled_task_ends_the_call(make_samples: MakeSamples) -> None:
    async def awaiting(completions: list[str]) -> list[float]:
        task = asyncio.create_task(asyncio.sleep(30))
        task.cancel()
        await task
        return []

    with (
        scorer_from_functions(awaiting) as scorer,
        pytest.raises(asyncio.CancelledError),
    ):
        scorer.score(make_samples(1), RewardContext(1))


def test_a_function_whose_next_finds_nothing_is_said_so(make_samples: MakeSamples) -> None:
    def judge(completions: list[str]) -> list[float]:
        return [next(iter(()))]

    with (
        scorer_from_functions(judge) as scorer,
        pytest.raises(RuntimeError, match=r"StopIteration was raised: next\(\) found no"),
    ):
        scorer.score(make_samples(1), RewardContext(1))


@pytest.fixture
def scorer_of(fast: HttpOptions) -> Callable[..., RewardScorer]:
    def make(url: str, **more: Any) -> RewardScorer:
        return RewardScorer([WeightedSource(HttpReward("r", url, options=fast))], **more)

    return make


def test_a_stop_cancels_everything_in_flight_at_once(
    hostile: Callable[..., RewardServer], make_samples: MakeSamples
) -> None:
    server = hostile(hang)
    with scorer_from_functions([server.url]) as scorer:
        asked_at = 0.0

        def should_stop() -> bool:
            nonlocal asked_at
            if len(server.requests) < 8:
                return False
            asked_at = asked_at or time.monotonic()
            return True

        with pytest.raises(ScoringStoppedError):
            scorer.score(make_samples(400, 4), RewardContext(1), should_stop=should_stop)
        assert time.monotonic() - asked_at < 10  # not the 30 s after which the requests give up
        assert scorer._loop is not None
        assert len(asyncio.all_tasks(scorer._loop._loop)) == 1
        # Closed by us, so the server reads the end of every connection.
        assert all(r.connection.recv(1) == b"" for r in server.requests)
    assert not [thread for thread in threading.enumerate() if thread.name == "reward-scorer"]


def test_a_blocked_function_does_not_hold_up_a_stop(make_samples: MakeSamples) -> None:
    released = threading.Event()

    def blocked(completions: list[str]) -> list[float]:
        released.wait(20)
        return [0.0] * len(completions)

    with scorer_from_functions(blocked) as scorer:
        started = time.monotonic()
        with pytest.raises(ScoringStoppedError):
            scorer.score(make_samples(1), RewardContext(1), should_stop=lambda: True)
        assert time.monotonic() - started < 10  # not the 20 s that the function takes
    released.set()


def test_after_a_stop_the_scorer_works_on(
    hostile: Callable[..., RewardServer], make_samples: MakeSamples, scorer_of: Any
) -> None:
    server = hostile(hang, fine)
    with scorer_of(server.url) as scorer:
        with pytest.raises(ScoringStoppedError):
            scorer.score(
                make_samples(4), RewardContext(1), should_stop=lambda: bool(server.requests)
            )
        assert [t.reward for t in scorer.score(make_samples(4), RewardContext(2))] == [0.5] * 4


def test_waits_are_reported_with_reason_and_attempt(
    hostile: Callable[..., RewardServer], make_samples: MakeSamples, scorer_of: Any
) -> None:
    messages: list[str] = []
    server = hostile(status(503, b"private"), fine)
    with scorer_of(server.url, on_wait=messages.append) as scorer:
        scorer.score(make_samples(4), RewardContext(1))
    (message,) = messages
    assert message == f"reward service {server.url}: HTTP 503; attempt 2 of 3 in 0.0 s"


def test_a_service_that_is_down_is_unavailable_and_said_so_while_waiting(
    make_samples: MakeSamples, scorer_of: Any
) -> None:
    messages: list[str] = []
    scorer = scorer_of("http://127.0.0.1:9/score", on_wait=messages.append)
    with scorer, pytest.raises(RewardUnavailableError, match="connection refused"):
        scorer.score(make_samples(4), RewardContext(1))
    assert [message.split("; ")[1][:12] for message in messages] == ["attempt 2 of", "attempt 3 of"]
    assert all("connection refused" in message for message in messages)


def test_a_misconfigured_service_stops_the_call(
    hostile: Callable[..., RewardServer], make_samples: MakeSamples, scorer_of: Any
) -> None:
    server = hostile(status(404, b"no such path"))
    scorer = scorer_of(server.url)
    with scorer, pytest.raises(RewardMisconfiguredError, match="no such path"):
        scorer.score(make_samples(4), RewardContext(1))


def test_the_spec_makes_components_with_their_options(
    hostile: Callable[..., RewardServer], make_samples: MakeSamples, secret: str
) -> None:
    server = hostile()
    component = {"url": server.url, "columns": ["level"], "batch": {"max_samples": 2}}
    rewards = Rewards.model_validate(
        {
            "components": [
                {"name": "a", "weight": 2.0, "clip": [-1, 0.25], **component},
                {"name": "b", **component},
            ]
        }
    )
    with scorer_from_spec(rewards, RewardAccess(secret=secret), job_id="ftjob-1") as scorer:
        assert scorer.names == ["a", "b"]
        found = scorer.score(make_samples(4, 2, columns={"level": 1}), RewardContext(7))
    assert [total.reward for total in found] == [1.0] * 4
    assert len(server.requests) == 4
    content = server.requests[0].content
    assert (content["job_id"], content["step"]) == ("ftjob-1", 7)
    assert content["samples"][0]["columns"] == {"level": 1}
    assert "webhook-signature" in server.requests[0].headers


def test_functions_and_urls_are_mixed_with_weights(
    hostile: Callable[..., RewardServer], make_samples: MakeSamples
) -> None:
    def length(completions: list[str]) -> list[int]:
        return [len(text) for text in completions]

    functions = [length, hostile().url, length]
    with scorer_from_functions(functions, weights=[1, 10, 100]) as scorer:
        assert scorer.names == ["length", "remote", "length_2"]
        assert scorer.score(make_samples(1), RewardContext(1))[0].reward == 207.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: scorer_from_functions([]),
        lambda: scorer_from_functions("http://x/", weights=[1, 2]),
        lambda: scorer_from_functions("http://x/", secret="nonsense"),
        lambda: RewardScorer([WeightedSource(FunctionReward(lambda completions: [], "a"))] * 2),
    ],
)
def test_a_scorer_that_cannot_work_is_not_made(make: Callable[[], RewardScorer]) -> None:
    with pytest.raises(ConfigurationError):
        make()


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://host/score", "http://user:hunter2@host/score", "http://:hunter2@"]
)
def test_a_text_that_is_no_usable_url_is_refused_before_anything_is_sampled(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="not a usable reward URL") as caught:
        scorer_from_functions(url)
    assert "hunter2" not in caught.value.message


def test_closing_twice_is_harmless(make_samples: MakeSamples) -> None:
    scorer = scorer_from_functions(lambda completions: [1.0] * len(completions))
    scorer.score(make_samples(2), RewardContext(1))
    scorer.close()
    scorer.close()
