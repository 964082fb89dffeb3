"""Rewards for a trainer: a synchronous face over sources that wait for networks.

    with scorer_from_functions([length, "https://rewards.example/score"], weights=[0.1, 1.0]) as scorer:
        totals = scorer.score(samples, RewardContext(step=1))

One thread runs one event loop for all sources, so that requests to several of them are in flight together while the
trainer's thread does something else, or waits and can be told to stop:

    tickets = [scorer.submit(group, context) for group in groups_as_they_are_sampled]
    for ticket, totals in scorer.collect(tickets, "completion"):
        ...
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from dar.errors import (
    ConfigurationError,
    InvalidRequestError,
    RewardContractError,
    RewardUnavailableError,
)
from dar.protocol.reward_spec import COMPONENT_NAME, RewardURL
from dar.protocol.spec import Order
from dar.rewards.base import (
    Failed,
    RewardContext,
    RewardObserver,
    RewardResult,
    RewardSample,
    RewardSource,
    SampleReward,
)
from dar.rewards.functions import FunctionReward, RewardFunction
from dar.rewards.http_reward import HttpReward
from dar.rewards.scoring.combine import Combination, Results, WeightedSource, checked_gates
from dar.rewards.scoring.in_flight import InFlight, Ticket
from dar.rewards.threads import LoopThread, ScoringStoppedError

__all__ = [
    "RewardScorer",
    "ScoringStoppedError",
    "Ticket",
    "WeightedSource",
    "scorer_from_functions",
]
_REWARD_URL: TypeAdapter[str] = TypeAdapter(RewardURL)


class RewardScorer:
    """Scores samples with several sources at once and sums what they say.

    Args:
        components: The sources, with distinct names.
        on_wait: Called from the scorer's thread with a message whenever a retry is being waited for.
        job_id: Named in requests whose context names none.
        observer: Is told what happens between us and reward services.
        combination: How they become one reward; default: their weighted sum.

    Raises:
        ConfigurationError: There is no component, two have one name, or none adds to the sum.
    """

    def __init__(
        self,
        components: Sequence[WeightedSource],
        *,
        on_wait: Callable[[str], None] | None = None,
        job_id: str | None = None,
        observer: RewardObserver | None = None,
        combination: Combination | None = None,
    ) -> None:
        names = [component.source.name for component in components]
        if not names or len(set(names)) < len(names):
            raise ConfigurationError(f"rewards need components with distinct names, not {names}")
        if not any(component.weight and not component.is_gate for component in components):
            raise ConfigurationError(
                "every reward has weight 0 or is a gate, so no sample would get a reward"
            )
        self._components = tuple(components)
        self.combination = combination or Combination(components)
        for component in components:
            if on_wait is not None and isinstance(component.source, HttpReward):
                component.source.on_wait = on_wait
            if observer is not None and isinstance(component.source, HttpReward):
                component.source.observer = observer
        self._job_id = job_id
        self._loop: LoopThread | None = None
        self._flight: InFlight | None = None

    @property
    def names(self) -> list[str]:
        """Names of the components, in order."""
        return [component.source.name for component in self._components]

    def score(
        self,
        samples: Sequence[RewardSample],
        context: RewardContext,
        *,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[SampleReward]:
        """The total reward of each sample, in order; a missing one is None, never a number.

        Args:
            samples: Completions to be scored, with distinct ids.
            context: What they have in common.
            should_stop: Polled every 50 ms; once it is true everything in flight is cancelled.

        Raises:
            ScoringStoppedError: ``should_stop`` became true.
            RewardMisconfiguredError: A source refuses for good.
            RewardUnavailableError: Every sample failed, and each for a passing reason.
            RewardContractError: Every sample failed, and at least one for a reason that will not pass; or a reward
                function returned something else than one number or None per sample.
            Exception: Whatever a reward function of the user raised.
        """
        if not samples:
            return []
        ticket = self.submit(samples, context, should_stop=should_stop)
        [(_, totals)] = self.collect([ticket], should_stop=should_stop)
        return totals

    def submit(
        self,
        samples: Sequence[RewardSample],
        context: RewardContext,
        *,
        should_stop: Callable[[], bool] | None = None,
    ) -> Ticket:
        """Have a group scored while the caller goes on; waits only while thousands of groups are under way.

        Args:
            samples: Whole groups, in most cases one; their ids are distinct in the step.
            context: What they have in common.
            should_stop: As for `score`.

        Returns:
            What `collect` takes.

        Raises:
            ScoringStoppedError: ``should_stop`` became true.
        """
        known_context = replace(context, job_id=context.job_id or self._job_id)
        ticket = Ticket(samples, known_context)
        self._under_way().submit(ticket, should_stop)
        return ticket

    def complete(self, tickets: Sequence[Ticket]) -> None:
        """Say that ``tickets`` are a whole step: a source that wants all of its samples in one call is asked now.

        `collect` does the same; this is for who has something else to do before.
        """
        self._under_way().complete(tickets)

    def collect(
        self,
        tickets: Sequence[Ticket],
        order: Order = "fixed",
        *,
        may_all_fail: bool = False,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[Ticket, list[SampleReward]]]:
        """Give each of ``tickets`` with the total rewards of its samples, once they are there.

        Args:
            tickets: A whole step.
            order: ``fixed``: as they are given. ``completion``: as their rewards come.
            may_all_fail: Whether it is no error when every sample failed.
            should_stop: As for `score`.

        Raises:
            ScoringStoppedError: ``should_stop`` became true; everything in flight is cancelled.
            RewardMisconfiguredError: A source refuses for good.
            RewardUnavailableError: Every sample of the step failed, and each for a passing reason.
            RewardContractError: Every sample of the step failed, and at least one for a reason that will not pass; or a reward
                function returned something else than one number or None per sample.
            Exception: Whatever a reward function of the user raised.
        """
        under_way = self._under_way()
        under_way.complete(tickets)
        left = list(tickets)
        has_failed = not may_all_fail
        results: dict[str, list[RewardResult]] = {name: [] for name in self.names}
        while left:
            ticket = under_way.next_of(left, order, should_stop)
            left.remove(ticket)
            totals = self.combination(ticket.samples, ticket.results, ticket.context)
            has_failed = has_failed and all(total.status == "error" for total in totals)
            if has_failed:
                for name, found in checked_gates(self._components, ticket.results).items():
                    results[name] += found
                if not left:
                    raise _all_failed(self._needed(results), sum(len(t.samples) for t in tickets))
            yield ticket, totals

    def _needed(self, results: Results) -> Results:
        """Without what only watches or may be missing: that has made no sample fail."""
        needed = {one.name for one in self._components if one.required and one.weight}
        found = {name: outcomes for name, outcomes in results.items() if name in needed}
        has_failed = any(isinstance(one, Failed) for outcomes in found.values() for one in outcomes)
        return found if has_failed else results

    def end_step(self, step: int) -> None:
        """All rewards of ``step`` are collected: what they tell of a component's scale counts from the next step on."""
        self.combination.end_step(step)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint of ``step`` keeps, as JSON: what is remembered of rewards, and learned about services."""
        learned = {
            one.source.name: one.source.state()
            for one in self._components
            if isinstance(one.source, HttpReward)
        }
        return {"combination": self.combination.state(step), "services": learned}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: It is of other components, or no such state.
        """
        self.combination.restore(state["combination"])
        for one in self._components:
            if isinstance(one.source, HttpReward):
                one.source.restore(state["services"].get(one.source.name, {}))

    def close(self) -> None:
        """Cancel what is in flight, close all connections and end the scorer's thread; may be called again."""
        loop, self._loop = self._loop, None
        under_way, self._flight = self._flight, None
        if loop is not None and under_way is not None:
            under_way.cancel()
            loop.run(self._close_sources)
            loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _under_way(self) -> InFlight:
        if self._loop is None or self._flight is None:
            self._loop = LoopThread()
            self._flight = InFlight([one.source for one in self._components], self._loop)
        return self._flight

    async def _close_sources(self) -> None:
        for component in self._components:
            await component.source.aclose()


def _all_failed(results: Results, count: int) -> RewardUnavailableError | RewardContractError:
    failures = [
        (name, result)
        for name, outcomes in results.items()
        for result in outcomes
        if isinstance(result, Failed)
    ]
    lasting = [(name, failure) for name, failure in failures if not failure.is_transient]
    name, failure = (lasting or failures)[0]
    message = f"all {count} samples of the step failed; component {name}: {failure.message}"
    if lasting:
        return RewardContractError(f"{message} ({failure.code})", code=failure.code)
    return RewardUnavailableError(message)


def scorer_from_functions(
    funcs: RewardFunction | str | Sequence[RewardFunction | str],
    *,
    weights: Sequence[float] | None = None,
    sources: Sequence[RewardSource] = (),
    secret: str | None = None,
    on_wait: Callable[[str], None] | None = None,
    observer: RewardObserver | None = None,
) -> RewardScorer:
    """A scorer of reward functions and reward services.

    Args:
        funcs: One or several; a callable has TRL's signature (`RewardFunction`), a text is the URL of a reward
            service.
        weights: Factor of each in the sum, those of ``sources`` last; default 1.
        sources: Further sources, under their own names.
        secret: Signs requests to the URLs.
        on_wait: See `RewardScorer`.
        observer: See `RewardScorer`.

    Raises:
        ConfigurationError: ``weights`` has another length, the secret is malformed, or a function cannot take
            ``completions``.
        InvalidRequestError: A text is no usable URL.
    """
    given = [funcs] if isinstance(funcs, str) or callable(funcs) else list(funcs)
    count = len(given) + len(sources)
    factors = [1.0] * count if weights is None else list(weights)
    if len(factors) != count:
        raise ConfigurationError(
            f"{len(factors)} reward weights for {count} rewards: give one for each function, then for each model"
            if sources
            else f"{len(factors)} reward weights for {count} reward functions"
        )
    components: list[WeightedSource] = []
    taken = {source.name for source in sources}
    for function, weight in zip(given, factors, strict=False):
        source: HttpReward | FunctionReward
        if isinstance(function, str):
            url = _checked_url(function)
            source = HttpReward(_free_name("remote", taken), url, secret=secret)
        else:
            source = FunctionReward(function, _free_name(FunctionReward(function).name, taken))
        components.append(WeightedSource(source, weight))
    components += map(WeightedSource, sources, factors[len(given) :])
    return RewardScorer(components, on_wait=on_wait, observer=observer)


def _checked_url(url: str) -> str:
    """``url``, by the rules of job specs; the message of an error does not repeat it, as it may hold a password."""
    try:
        return _REWARD_URL.validate_python(url)
    except ValidationError as error:
        raise InvalidRequestError(error.errors()[0]["msg"], param="reward_funcs") from None


def _free_name(name: str, taken: set[str]) -> str:
    """``name``, numbered if it is taken; fit to be a component name."""
    assert re.fullmatch(COMPONENT_NAME, name)
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name[: 31 - len(str(number))]}_{number}"
    taken.add(free)
    return free
