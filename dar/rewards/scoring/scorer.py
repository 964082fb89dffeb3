"""`RewardScorer`: the synchronous interface of a trainer to its reward sources.

    funcs = [length, "https://rewards.example/score"]
    with scorer_from_functions(funcs, weights=[0.1, 1.0]) as scorer:
        totals = scorer.score(samples, RewardContext(step=1))

One thread runs an event loop for all sources, so that requests to several of them are in flight
while the trainer samples or trains. Waiting can be stopped:

    tickets = [scorer.submit(group, context) for group in groups_as_they_are_sampled]
    for ticket, totals in scorer.collect(tickets, "completion"):
        ...
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from dar.errors import (
    ConfigurationError,
    InvalidRequestError,
    RewardContractError,
    RewardUnavailableError,
)
from dar.protocol.reward_spec import COMPONENT_NAME, RewardURL
from dar.protocol.spec import TrainingOrder
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
    """Scores samples with several sources and combines their results.

    Args:
        components: The sources, with distinct names.
        on_wait: Called from the scorer's thread with a message whenever a request waits.
        job_id: Used for contexts without a job id.
        observer: Receives events of requests to reward services.
        combination: How the results become one reward; default: their weighted sum.

    Raises:
        ConfigurationError: There is no component, two have the same name, or none adds to the sum.
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
                "every reward has weight 0 or is a gate, so there is no reward"
            )
        self._components = tuple(components)
        self.combination = combination or Combination(components)
        for component in components:
            if on_wait is not None and isinstance(component.source, HttpReward):
                component.source.on_wait = on_wait
            if observer is not None and isinstance(component.source, HttpReward):
                component.source.observer = observer
        self._job_id = job_id
        self._observer = observer
        self._loop: LoopThread | None = None
        self._calls: InFlight | None = None

    @property
    def names(self) -> list[str]:
        return [component.source.name for component in self._components]

    def score(
        self,
        samples: Sequence[RewardSample],
        context: RewardContext,
        *,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[SampleReward]:
        """The reward of each sample, in order; a missing reward is None, never a number.

        Args:
            samples: Completions to score, with distinct ids.
            context: Their context.
            should_stop: Polled every 50 ms; once it is true everything in flight is cancelled.

        Raises:
            ScoringStoppedError: ``should_stop`` became true.
            RewardMisconfiguredError: A source cannot succeed until the configuration changes.
            RewardUnavailableError: Every sample failed, each for a transient reason.
            RewardContractError: Every sample failed, at least one for a lasting reason; or a reward
                function did not return one number or None per sample.
            Exception: A reward function raised it.
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
        """Start scoring a group. Waits only while thousands of groups are being scored.

        Args:
            samples: Whole groups, usually one; their ids are distinct in the step.
            context: Their context.
            should_stop: As for `score`.

        Returns:
            The ticket for `collect`.

        Raises:
            ScoringStoppedError: ``should_stop`` became true.
        """
        known_context = replace(context, job_id=context.job_id or self._job_id)
        ticket = Ticket(samples, known_context)
        self._started().submit(ticket, should_stop)
        return ticket

    def complete(self, tickets: Sequence[Ticket]) -> None:
        """Mark ``tickets`` as a whole step: sources that take whole steps are called now.

        `collect` does the same; call this first if other work comes in between.
        """
        self._started().complete(tickets)

    def collect(
        self,
        tickets: Sequence[Ticket],
        order: TrainingOrder = "fixed",
        *,
        may_all_fail: bool = False,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[Ticket, list[SampleReward]]]:
        """Yield each of ``tickets`` with the rewards of its samples, as soon as they are complete.

        Args:
            tickets: A whole step.
            order: ``fixed``: as given. ``completion``: as their rewards arrive.
            may_all_fail: Whether a step may end without an error if every sample failed.
            should_stop: As for `score`.

        Raises:
            ScoringStoppedError: ``should_stop`` became true; everything in flight is cancelled.
            RewardMisconfiguredError: A source cannot succeed until the configuration changes.
            RewardUnavailableError: Every sample of the step failed, each for a transient reason.
            RewardContractError: Every sample of the step failed, at least one for a lasting reason;
                or a reward function did not return one number or None per sample.
            Exception: A reward function raised it.
        """
        in_flight = self._started()
        in_flight.complete(tickets)
        left = list(tickets)
        has_failed = not may_all_fail
        results: dict[str, list[RewardResult]] = {name: [] for name in self.names}
        while left:
            ticket = in_flight.next_of(left, order, should_stop)
            left.remove(ticket)
            totals = self.combination(ticket.samples, ticket.results, ticket.context)
            if self._observer is not None and ticket.context.mode == "train":
                self._observer.scored(ticket.context.step, totals)
            has_failed = has_failed and all(total.status == "error" for total in totals)
            if has_failed:
                for name, found in checked_gates(self._components, ticket.results).items():
                    results[name] += found
                if not left:
                    raise _all_failed(self._needed(results), sum(len(t.samples) for t in tickets))
            yield ticket, totals

    def _needed(self, results: Results) -> Results:
        """Results of the components that can make a sample fail, if any of them failed."""
        needed = {one.name for one in self._components if one.required and one.weight}
        found = {name: outcomes for name, outcomes in results.items() if name in needed}
        has_failed = any(isinstance(one, Failed) for outcomes in found.values() for one in outcomes)
        return found if has_failed else results

    def end_step(self, step: int) -> None:
        """Include the rewards of ``step`` in the running moments from the next step on."""
        self.combination.moments.end_step(step)

    def state(self, step: int) -> dict[str, Any]:
        """State for a checkpoint of ``step``, as JSON: running moments and limits of services."""
        learned = {
            one.source.name: one.source.state()
            for one in self._components
            if isinstance(one.source, HttpReward)
        }
        return {"combination": self.combination.moments.state(step), "services": learned}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a `state`.

        Raises:
            CheckpointError: It is invalid, or of other components.
        """
        self.combination.moments.restore(state["combination"])
        for one in self._components:
            if isinstance(one.source, HttpReward):
                one.source.restore(state["services"].get(one.source.name, {}))

    def close(self) -> None:
        """Cancel what is in flight, close all connections and stop the thread.

        May be called again.
        """
        loop, self._loop = self._loop, None
        in_flight, self._calls = self._calls, None
        if loop is not None and in_flight is not None:
            in_flight.cancel()
            loop.run(self._close_sources)
            loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> InFlight:
        if self._loop is None or self._calls is None:
            self._loop = LoopThread()
            self._calls = InFlight([one.source for one in self._components], self._loop)
        return self._calls

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
    state_of: Callable[[RewardContext], object] | None = None,
) -> RewardScorer:
    """A scorer of reward functions and reward services.

    Args:
        funcs: One or several: callables with TRL's signature (`RewardFunction`) or URLs of reward
            services.
        weights: Factor of each in the sum, those of ``sources`` last; default 1.
        sources: Further sources, with their own names.
        secret: Signs requests to the URLs.
        on_wait: See `RewardScorer`.
        observer: See `RewardScorer`.
        state_of: See `dar.rewards.functions.FunctionReward`.

    Raises:
        ConfigurationError: ``weights`` has the wrong length, the secret is malformed, or a function
            does not accept ``completions``.
        InvalidRequestError: A URL is invalid.
    """
    given = [funcs] if isinstance(funcs, str) or callable(funcs) else list(funcs)
    count = len(given) + len(sources)
    factors = [1.0] * count if weights is None else list(weights)
    if len(factors) != count:
        order = ", then for each model" if sources else ""
        raise ConfigurationError(
            f"the number of reward weights is {len(factors)}, but that of rewards is {count}; give "
            f"one weight for each function{order}"
        )
    components: list[WeightedSource] = []
    taken = {source.name for source in sources}
    for function, weight in zip(given, factors, strict=False):
        source: HttpReward | FunctionReward
        if isinstance(function, str):
            url = _checked_url(function)
            source = HttpReward(_free_name("remote", taken), url, secret=secret)
        else:
            name = _free_name(FunctionReward(function).name, taken)
            source = FunctionReward(function, name, state_of=state_of)
        components.append(WeightedSource(source, weight))
    components += map(WeightedSource, sources, factors[len(given) :])
    return RewardScorer(components, on_wait=on_wait, observer=observer)


def _checked_url(url: str) -> str:
    """Check ``url`` by the rules of job specs. Errors do not show it, as it may hold a password."""
    try:
        return _REWARD_URL.validate_python(url)
    except ValidationError as error:
        raise InvalidRequestError(error.errors()[0]["msg"], param="reward_funcs") from None


def _free_name(name: str, taken: set[str]) -> str:
    """``name``, with a number if it is taken."""
    assert re.fullmatch(COMPONENT_NAME, name)
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name[: 31 - len(str(number))]}_{number}"
    taken.add(free)
    return free
