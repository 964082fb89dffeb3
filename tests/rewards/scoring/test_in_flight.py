"""Groups handed over one by one, and collected in either order."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from dar.errors import RewardMisconfiguredError, RewardUnavailableError
from dar.rewards.base import Failed, RewardContext, RewardResult, RewardSample, Scored
from dar.rewards.functions import FunctionReward
from dar.rewards.scoring.scorer import RewardScorer, ScoringStoppedError, WeightedSource
from fakes.reward_types import MakeSamples

Answer = Callable[[Sequence[RewardSample]], Any]


class ByGroup:
    """A source whose answers the test sets; it records its requests."""

    name = "by_group"

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.asked: list[list[str]] = []
        self.cancelled = 0

    async def score(
        self, samples: Sequence[RewardSample], context: RewardContext
    ) -> list[RewardResult]:
        self.asked.append([sample.id for sample in samples])
        try:
            found: list[RewardResult] = await self._answer(samples)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return found

    async def aclose(self) -> None:
        """Nothing to free."""


def index_of(sample: RewardSample) -> int:
    return int(sample.id[1:])


async def later_first(samples: Sequence[RewardSample]) -> list[RewardResult]:
    await asyncio.sleep(0.6 - 0.1 * index_of(samples[0]) / len(samples))
    return [Scored(float(index_of(sample))) for sample in samples]


async def never(samples: Sequence[RewardSample]) -> list[RewardResult]:
    await asyncio.sleep(600)
    return [Scored(0.0)] * len(samples)


@pytest.fixture
def open_scorer() -> Iterator[Callable[..., RewardScorer]]:
    opened: list[RewardScorer] = []

    def start(*sources: Any) -> RewardScorer:
        opened.append(RewardScorer([WeightedSource(source) for source in sources]))
        return opened[-1]

    yield start
    for scorer in opened:
        scorer.close()


@pytest.fixture
def groups(make_samples: MakeSamples) -> list[list[RewardSample]]:
    samples = make_samples(12)
    return [samples[i : i + 4] for i in range(0, 12, 4)]


def test_groups_come_back_as_they_were_given_or_as_they_are_answered(
    open_scorer: Callable[..., RewardScorer],
    groups: list[list[RewardSample]],
    context: RewardContext,
) -> None:
    source = ByGroup(later_first)
    scorer = open_scorer(source)
    for order, expected in (("fixed", [0, 1, 2]), ("completion", [2, 1, 0])):
        tickets = [scorer.submit(group, context) for group in groups]
        collected = list(scorer.collect(tickets, order))  # type: ignore[arg-type]  # one of the two literals
        assert [tickets.index(ticket) for ticket, _ in collected] == expected
        for ticket, totals in collected:
            assert [total.reward for total in totals] == [index_of(s) for s in ticket.samples]
            assert ticket.done_at is not None
            assert ticket.done_at >= ticket.answered_at["by_group"]
    assert source.asked == 2 * [[sample.id for sample in group] for group in groups]


def test_what_wants_a_whole_step_is_called_once_and_beside_the_others(
    open_scorer: Callable[..., RewardScorer],
    groups: list[list[RewardSample]],
    context: RewardContext,
) -> None:
    calls: list[list[str]] = []

    def function(completions: list[str]) -> list[float]:
        calls.append(completions)
        return [0.5] * len(completions)

    source = ByGroup(later_first)
    scorer = open_scorer(source, FunctionReward(function))
    tickets = [scorer.submit(group, context) for group in groups]
    time.sleep(0.2)
    assert (len(source.asked), calls) == (3, [])
    scorer.complete(tickets)
    found = [total.reward for _, totals in scorer.collect(tickets) for total in totals]
    assert found == [i + 0.5 for i in range(12)]
    assert calls == [[f"c{i}" for i in range(12)]]


def test_a_stop_cancels_all_that_is_in_flight_and_so_does_closing(
    open_scorer: Callable[..., RewardScorer],
    groups: list[list[RewardSample]],
    context: RewardContext,
) -> None:
    source = ByGroup(never)
    scorer = open_scorer(source)
    tickets = [scorer.submit(group, context) for group in groups]
    with pytest.raises(ScoringStoppedError):
        next(scorer.collect(tickets[:1], should_stop=lambda: len(source.asked) == 3))
    assert source.cancelled == 3
    scorer.submit(groups[0], context)
    while len(source.asked) < 4:
        time.sleep(0.01)
    scorer.close()
    assert source.cancelled == 4


def test_too_many_groups_in_flight_hold_the_sampler_back_until_it_is_stopped(
    open_scorer: Callable[..., RewardScorer],
    groups: list[list[RewardSample]],
    context: RewardContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dar.rewards.scoring.in_flight.MOST_UNDER_WAY", 2)
    scorer = open_scorer(ByGroup(never))
    stop = threading.Event()
    scorer.submit(groups[0], context)
    scorer.submit(groups[1], context)
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(ScoringStoppedError):
        scorer.submit(groups[2], context, should_stop=stop.is_set)
    assert stop.is_set()


def test_an_error_stops_whoever_would_submit_more(
    open_scorer: Callable[..., RewardScorer],
    groups: list[list[RewardSample]],
    context: RewardContext,
) -> None:
    async def refuse(_: Sequence[RewardSample]) -> list[RewardResult]:
        raise RewardMisconfiguredError("a wrong path")

    scorer = open_scorer(ByGroup(refuse))
    ticket = scorer.submit(groups[0], context)
    while ticket.done_at is None:
        time.sleep(0.01)
    with pytest.raises(RewardMisconfiguredError):
        scorer.submit(groups[1], context)


def test_a_step_in_which_everything_failed_is_an_error_unless_that_is_allowed(
    open_scorer: Callable[..., RewardScorer],
    groups: list[list[RewardSample]],
    context: RewardContext,
) -> None:
    async def fail(samples: Sequence[RewardSample]) -> list[RewardResult]:
        return [Failed("timeout", "too late", is_transient=True)] * len(samples)

    scorer = open_scorer(ByGroup(fail))
    tickets = [scorer.submit(group, context) for group in groups]
    with pytest.raises(RewardUnavailableError, match="all 12 samples"):
        list(scorer.collect(tickets))
    tickets = [scorer.submit(group, context) for group in groups]
    collected = list(scorer.collect(tickets, may_all_fail=True))
    assert [total.reward for _, totals in collected for total in totals] == [None] * 12
