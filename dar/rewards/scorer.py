"""Rewards for a trainer: a synchronous face over sources that wait for networks.

    with scorer_from_functions([length, "https://rewards.example/score"], weights=[0.1, 1.0]) as scorer:
        totals = scorer.score(samples, RewardContext(step=1))

One thread runs one event loop for all sources, so that requests to several of them are in flight together while the
trainer's thread waits and can be told to stop.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from pydantic import TypeAdapter, ValidationError

from dar.errors import (
    ConfigurationError,
    InvalidRequestError,
    RewardContractError,
    RewardUnavailableError,
)
from dar.protocol.reward_spec import COMPONENT_NAME, Rewards, RewardURL
from dar.rewards.asynchronous import Inbox
from dar.rewards.base import (
    Failed,
    RewardContext,
    RewardResult,
    RewardSample,
    RewardSource,
    SampleReward,
    Scored,
)
from dar.rewards.combine import Results, WeightedSource, combine
from dar.rewards.concurrency import LoopThread, ScoringStoppedError, all_of
from dar.rewards.functions import FunctionReward, RewardFunction
from dar.rewards.http import HttpOptions, HttpReward

__all__ = [
    "RewardScorer",
    "ScoringStoppedError",
    "WeightedSource",
    "scorer_from_functions",
    "scorer_from_spec",
]
_REWARD_URL: TypeAdapter[str] = TypeAdapter(RewardURL)


class RewardScorer:
    """Scores samples with several sources at once and sums what they say.

    Args:
        components: The sources, with distinct names.
        on_wait: Called from the scorer's thread with a message whenever a retry is being waited for.
        job_id: Named in requests whose context names none.

    Raises:
        ConfigurationError: There is no component, or two have one name.
    """

    def __init__(
        self,
        components: Sequence[WeightedSource],
        *,
        on_wait: Callable[[str], None] | None = None,
        job_id: str | None = None,
    ) -> None:
        names = [component.source.name for component in components]
        if not names or len(set(names)) < len(names):
            raise ConfigurationError(f"rewards need components with distinct names, not {names}")
        self._components = tuple(components)
        for component in components:
            if on_wait is not None and isinstance(component.source, HttpReward):
                component.source.on_wait = on_wait
        self._job_id = job_id
        self._loop: LoopThread | None = None

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
        known_context = replace(context, job_id=context.job_id or self._job_id)
        if self._loop is None:
            self._loop = LoopThread()
        results = self._loop.run(lambda: self._ask_all(samples, known_context), should_stop)
        totals = combine(self._components, samples, results)
        if all(total.status == "error" for total in totals):
            raise _all_failed(results, len(samples))
        return totals

    def close(self) -> None:
        """Close all connections and end the scorer's thread; may be called again."""
        loop, self._loop = self._loop, None
        if loop is not None:
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

    async def _ask_all(self, samples: Sequence[RewardSample], context: RewardContext) -> Results:
        asked = await all_of(
            component.source.score(samples, context) for component in self._components
        )
        return {
            name: _checked(name, results, samples)
            for name, results in zip(self.names, asked, strict=True)
        }

    async def _close_sources(self) -> None:
        for component in self._components:
            await component.source.aclose()


def _checked(
    name: str, results: list[RewardResult], samples: Sequence[RewardSample]
) -> list[RewardResult]:
    """The same rules for every source, whoever wrote it: one result per sample, and only finite numbers."""
    if len(results) != len(samples):
        raise RewardContractError(
            f"reward component {name} returned {len(results)} results for {len(samples)} samples",
            code="contract.length",
        )
    return [
        Failed("nonfinite", f"the reward is {result.reward}", is_transient=False)
        if isinstance(result, Scored) and not math.isfinite(result.reward)
        else result
        for result in results
    ]


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


def scorer_from_spec(
    rewards: Rewards,
    *,
    secret: str | None,
    job_id: str | None,
    on_wait: Callable[[str], None] | None = None,
    inbox: Inbox | None = None,
) -> RewardScorer:
    """The scorer of a job.

    Args:
        rewards: The spec's ``rewards``.
        secret: Signs requests to inline URLs; None sends them unsigned.
        job_id: Named in the requests.
        on_wait: See `RewardScorer`.
        inbox: Takes callbacks of reward services.

    Raises:
        ConfigurationError: The secret is malformed.
    """
    components = [
        WeightedSource(
            HttpReward(
                component.name,
                component.url or "",
                secret=secret,
                options=HttpOptions(
                    component.columns,
                    component.batch,
                    component.limits,
                    component.timeouts,
                    component.retry,
                    allow_async=component.reply == "either",
                ),
                inbox=inbox,
            ),
            component.weight,
            None if component.clip is None else (component.clip[0], component.clip[1]),
        )
        for component in rewards.components
    ]
    return RewardScorer(components, on_wait=on_wait, job_id=job_id)


def scorer_from_functions(
    funcs: RewardFunction | str | Sequence[RewardFunction | str],
    *,
    weights: Sequence[float] | None = None,
    sources: Sequence[RewardSource] = (),
    secret: str | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> RewardScorer:
    """A scorer of reward functions and reward services.

    Args:
        funcs: One or several; a callable has TRL's signature (`RewardFunction`), a text is the URL of a reward
            service.
        weights: Factor of each in the sum, those of ``sources`` last; default 1.
        sources: Further sources, under their own names.
        secret: Signs requests to the URLs.
        on_wait: See `RewardScorer`.

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
    return RewardScorer(components, on_wait=on_wait)


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
