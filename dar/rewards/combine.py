"""From the results of several components to one reward per sample.

For each component: clip, normalise, weight. Their sum is clipped once more. It goes over the same components for all samples
of a group: sums over different components cannot be compared, and comparing is all that an advantage does.

- A component of weight 0 only watches: nothing that it says or fails to say changes a reward.
- A *required* component that fails makes its sample an error. One that all samples of a group skip is left out for the group;
  one that only some of them skip makes the group a skip.
- A component that is not required never does either: unless it has a reward for every sample of a group that is still to be
  summed, it is left out for the whole group.
- A sample for which no component is left has no reward.

No failure becomes a number here; what becomes of samples without a reward says `dar.rewards.group_policy`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dar.protocol.reward_spec import Normalize
from dar.protocol.samples import RewardStatus
from dar.rewards.base import (
    Failed,
    RewardContext,
    RewardResult,
    RewardSample,
    RewardSource,
    SampleReward,
    Scored,
    Skipped,
)
from dar.rewards.normalize import Moments, RunningMoments, normalized


@dataclass(frozen=True, slots=True)
class WeightedSource:
    """A reward source as a component of a sum."""

    source: RewardSource
    weight: float = 1.0
    """0: the component only watches."""
    clip: tuple[float, float] | None = None
    """Bounds that the raw reward is held to before it is normalised and weighted."""
    normalize: Normalize = "none"
    required: bool = True
    """Whether a sample that it fails on has no reward."""

    @property
    def name(self) -> str:
        """Component name."""
        return self.source.name

    def clipped(self, reward: float) -> float:
        """``reward`` within the bounds."""
        return _within(reward, self.clip)


Results = Mapping[str, Sequence[RewardResult]]
"""Results of each component, by name, in the order of the samples."""


def combine(
    components: Sequence[WeightedSource],
    samples: Sequence[RewardSample],
    results: Results,
    *,
    clip: tuple[float, float] | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> list[SampleReward]:
    """The total of each sample, as this module says.

    Args:
        components: The terms of the sum.
        samples: Whole groups.
        results: What each component said.
        clip: Bounds of the sum.
        moments: For the components that are normalised by ``running``.
    """
    totals: dict[int, SampleReward] = {}
    for positions in _groups(samples):
        group = _Group(components, positions, results)
        totals |= group.totals(clip, moments or {})
    return [totals[position] for position in range(len(samples))]


class Combination:
    """How the components of a job become one reward, with what is remembered from step to step.

    Args:
        components: The terms of the sum.
        clip: Bounds of the sum.
    """

    def __init__(
        self,
        components: Sequence[WeightedSource],
        *,
        clip: tuple[float, float] | None = None,
    ) -> None:
        self._components = tuple(components)
        self._clip = clip
        self._running = [one for one in components if one.normalize == "running"]
        self._moments = RunningMoments([one.name for one in self._running])

    def __call__(
        self, samples: Sequence[RewardSample], results: Results, context: RewardContext
    ) -> list[SampleReward]:
        """The total of each sample of whole groups; in training their rewards are noted for `end_step`.

        To be called once for each group, in any order within a step, but after `end_step` of the step before.
        """
        moments = self._moments.after(context.steps_done)
        totals = combine(self._components, samples, results, clip=self._clip, moments=moments)
        if context.mode == "train":
            for one in self._running:
                scored = [r.reward for r in results[one.name] if isinstance(r, Scored)]
                self._moments.note(context.step, one.name, map(one.clipped, scored))
        return totals

    def end_step(self, step: int) -> None:
        """All groups of ``step`` are combined: their rewards count from the next step on."""
        self._moments.end_step(step)

    def drop_step(self, step: int) -> None:
        """``step`` is given up and will be sampled again."""
        self._moments.drop_step(step)

    def state(self, step: int) -> dict[str, object]:
        """What a checkpoint of ``step`` keeps, as JSON."""
        return self._moments.state(step)

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: It is of other components, or no such state.
        """
        self._moments.restore(state)


def _within(reward: float, bounds: tuple[float, float] | None) -> float:
    return reward if bounds is None else min(max(reward, bounds[0]), bounds[1])


def _groups(samples: Sequence[RewardSample]) -> list[list[int]]:
    """Positions of the samples of each group."""
    groups: dict[str, list[int]] = {}
    for position, sample in enumerate(samples):
        groups.setdefault(sample.group_id, []).append(position)
    return list(groups.values())


class _Group:
    """One group on its way to its totals."""

    def __init__(
        self, components: Sequence[WeightedSource], positions: Sequence[int], results: Results
    ) -> None:
        self._positions = positions
        self._results = results
        self._terms = [one for one in components if one.weight != 0]
        self._found: dict[int, SampleReward] = {}

    def totals(
        self, clip: tuple[float, float] | None, moments: Mapping[str, Moments]
    ) -> dict[int, SampleReward]:
        for position in self._positions:
            if (lack := self._lack(position)) is not None:
                self._put(position, None, *lack)
        rest = [position for position in self._positions if position not in self._found]
        used, lack = self._used(rest)
        if lack is not None:
            for position in rest:
                self._put(position, None, *lack)
            return self._found
        columns = [self._column(one, rest, moments) for one in used]
        for place, position in enumerate(rest):
            total = math.fsum(column[place] for column in columns)
            self._put(position, _within(total, clip), "reward", None)
        return self._found

    def _column(
        self, one: WeightedSource, rest: Sequence[int], moments: Mapping[str, Moments]
    ) -> list[float]:
        """The weighted terms of one component."""
        raw = [result.reward for result in self._of(one, rest) if isinstance(result, Scored)]
        assert len(raw) == len(rest)  # a component that is used has a reward for each of them
        clipped = [one.clipped(reward) for reward in raw]
        terms = normalized(clipped, one.normalize, moments.get(one.name, Moments()))
        return [one.weight * term for term in terms]

    def _of(self, one: WeightedSource, positions: Sequence[int]) -> list[RewardResult]:
        return [self._results[one.name][position] for position in positions]

    def _lack(self, position: int) -> tuple[RewardStatus, str] | None:
        """Why a sample has no total whatever the others of its group have, or None."""
        skips: list[str] = []
        failures: list[str] = []
        has_reward = False
        for one in self._terms:
            result = self._results[one.name][position]
            if isinstance(result, Failed):
                message = f"component {one.name}: {result.code}: {result.message}"
                if one.required:
                    return "error", message
                failures.append(message)
            elif isinstance(result, Skipped):
                skips.append(f"component {one.name}: {result.reason}" if result.reason else "")
            else:
                has_reward = True
        if has_reward:
            return None
        if failures and not skips:
            return "error", failures[0]
        return "skip", "; ".join(
            filter(None, skips)
        ) or "every reward component skipped this sample"

    def _used(
        self, rest: Sequence[int]
    ) -> tuple[list[WeightedSource], tuple[RewardStatus, str] | None]:
        """The components that count for the group, or why none can."""
        used = []
        for one in self._terms:
            outcomes = self._of(one, rest)
            skipped = sum(isinstance(outcome, Skipped) for outcome in outcomes)
            if all(isinstance(outcome, Scored) for outcome in outcomes):
                used.append(one)
            elif one.required and skipped < len(outcomes):
                return [], (
                    "skip",
                    f"component {one.name} skipped {skipped} of the {len(outcomes)} completions of this prompt; "
                    "sums over different components cannot be compared, so all of them are left out",
                )
        if used or not rest:
            return used, None
        return [], self._nothing_left(rest)

    def _nothing_left(self, rest: Sequence[int]) -> tuple[RewardStatus, str]:
        """Why no component counts: each of those that are not required lacks a reward for some sample."""
        for one in self._terms:
            for position in self._positions:
                result = self._results[one.name][position]
                if isinstance(result, Failed):
                    return (
                        "error",
                        f"no component has a reward for all completions of this prompt; component {one.name}: {result.code}: "
                        f"{result.message}",
                    )
        return "skip", f"no component has a reward for all {len(rest)} completions of this prompt"

    def _put(
        self, position: int, reward: float | None, status: RewardStatus, message: str | None
    ) -> None:
        """Note a total with what each component said about the sample."""
        components: dict[str, float | None] = {}
        feedback: dict[str, str] = {}
        for name, outcomes in self._results.items():
            outcome = outcomes[position]
            if not isinstance(outcome, Scored):
                components[name] = None
                continue
            components[name] = outcome.reward
            components |= {f"{name}/{part}": value for part, value in outcome.components.items()}
            if outcome.feedback:
                feedback[name] = outcome.feedback
        left_out = tuple(
            name
            for name, outcomes in self._results.items()
            if isinstance(outcomes[position], Failed) and status != "error"
        )
        self._found[position] = SampleReward(
            reward, status, message, components, feedback, left_out=left_out
        )
