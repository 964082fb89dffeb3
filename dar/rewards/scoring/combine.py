"""Combines the results of several components into one reward per sample.

Each component is clipped, normalised and weighted. Their sum is multiplied by the gates and
clipped. All samples of a group are summed over the same components: an advantage compares them, and
sums over different components cannot be compared.

- A component of weight 0 is reported only and never changes a reward.
- A sample that no component scores is a skip, or an error, by itself; the rules on groups concern
  the others. So a single component may skip some samples of a group.
- If a *required* component fails, the sample is an error. If it skips all samples of a group, it is
  dropped for the group; if it skips some, the group is a skip.
- A component that is not required is dropped for the group unless it has a reward for every sample
  that is still to be summed.
- A *gate* gives 0 or 1; any other number is the failure ``contract.gate``. A sample is an error if
  a gate fails and a skip if it skips, whatever the rest of the group has: a gate is never dropped.
- A sample without any component left has no reward.
- With ``on_partial_skip: zero`` a component that skips some samples of a group, but not all, adds 0
  for those; `SampleReward.zeroed` names it. A sample that all components skip stays a skip.

No failure becomes a number here, and a skip only by that option. `dar.rewards.scoring.failures`
handles samples without a reward.
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
from dar.rewards.scoring.normalize import Moments, RunningMoments, normalized


@dataclass(frozen=True, slots=True)
class WeightedSource:
    """A reward source as a component of the sum."""

    source: RewardSource
    weight: float = 1.0
    """0: the component is reported only."""
    clip: tuple[float, float] | None = None
    """Bounds of the raw reward, applied before it is normalised and weighted."""
    normalize: Normalize = "none"
    required: bool = True
    """Whether a sample has no reward if the component fails."""
    is_gate: bool = False
    """Whether its rewards, 0 or 1, multiply the sum instead of being added."""

    @property
    def name(self) -> str:
        return self.source.name

    def clipped(self, reward: float) -> float:
        """Clip ``reward`` to the bounds."""
        return _within(reward, self.clip)


GATE_REWARDS = (0.0, 1.0)
GATE_CODE = "contract.gate"
Results = Mapping[str, Sequence[RewardResult]]
"""Results of each component, by name, in the order of the samples."""


def combine(
    components: Sequence[WeightedSource],
    samples: Sequence[RewardSample],
    results: Results,
    *,
    clip: tuple[float, float] | None = None,
    moments: Mapping[str, Moments] | None = None,
    is_zeroing: bool = False,
) -> list[SampleReward]:
    """The reward of each sample, by the rules of this module.

    Args:
        components: Terms and gates.
        samples: Whole groups.
        results: Results of each component.
        clip: Bounds of the sum.
        moments: Moments of the components normalised by ``running``.
        is_zeroing: Whether ``on_partial_skip`` is ``zero``.
    """
    totals: dict[int, SampleReward] = {}
    results = checked_gates(components, results)
    for positions in _groups(samples):
        group = _Group(components, positions, results, is_zeroing=is_zeroing)
        totals |= group.totals(clip, moments or {})
    return [totals[position] for position in range(len(samples))]


def checked_gates(components: Sequence[WeightedSource], results: Results) -> Results:
    """``results`` with a failure for every number of a gate other than 0 and 1."""
    gates = [one.name for one in components if one.is_gate]
    return {**results, **{name: list(map(_as_gate, results[name])) for name in gates}}


def _as_gate(result: RewardResult) -> RewardResult:
    if not isinstance(result, Scored) or result.reward in GATE_REWARDS:
        return result
    message = f"a gate gives 0 or 1, not {result.reward:.6g}"
    return Failed(GATE_CODE, message, is_transient=False)


class Combination:
    """Combines the components of a job, with the running moments kept from step to step.

    Args:
        components: Terms and gates.
        clip: Bounds of the sum.
        is_zeroing: See `combine`.
    """

    def __init__(
        self,
        components: Sequence[WeightedSource],
        *,
        clip: tuple[float, float] | None = None,
        is_zeroing: bool = False,
    ) -> None:
        self._components = tuple(components)
        self._clip = clip
        self._is_zeroing = is_zeroing
        self._running = [one for one in components if one.normalize == "running"]
        self.moments = RunningMoments([one.name for one in self._running])

    def __call__(
        self, samples: Sequence[RewardSample], results: Results, context: RewardContext
    ) -> list[SampleReward]:
        """The reward of each sample of whole groups; in training they are recorded for `end_step`.

        Call it once per group, in any order within a step, after `end_step` of the previous step.
        """
        moments = self.moments.after(context.steps_done)
        totals = combine(
            self._components,
            samples,
            results,
            clip=self._clip,
            moments=moments,
            is_zeroing=self._is_zeroing,
        )
        if context.mode == "train":
            for one in self._running:
                scored = [r.reward for r in results[one.name] if isinstance(r, Scored)]
                self.moments.record(context.step, one.name, map(one.clipped, scored))
        return totals


def _within(reward: float, bounds: tuple[float, float] | None) -> float:
    return reward if bounds is None else min(max(reward, bounds[0]), bounds[1])


def _groups(samples: Sequence[RewardSample]) -> list[list[int]]:
    """Positions of the samples, by group."""
    groups: dict[str, list[int]] = {}
    for position, sample in enumerate(samples):
        groups.setdefault(sample.group_id, []).append(position)
    return list(groups.values())


class _Group:
    """The computation of one group's rewards."""

    def __init__(
        self,
        components: Sequence[WeightedSource],
        positions: Sequence[int],
        results: Results,
        *,
        is_zeroing: bool,
    ) -> None:
        self._positions = positions
        self._results = results
        self._terms = [one for one in components if one.weight != 0 and not one.is_gate]
        self._gates = [one for one in components if one.is_gate]
        self._is_zeroing = is_zeroing
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
        for position in rest:
            terms = [column[position] for column in columns if position in column]
            if terms:
                total = math.fsum(terms) if self._passes(position) else 0.0
                zeroed = [one.name for one in used if self._is_skipped(one, position)]
                self._put(position, _within(total, clip), "reward", None, zeroed)
            else:  # zeros alone make no reward
                self._put(position, None, "skip", "every component that counts skipped this sample")
        return self._found

    def _column(
        self, one: WeightedSource, rest: Sequence[int], moments: Mapping[str, Moments]
    ) -> dict[int, float]:
        """The weighted terms of one component, by position, without skipped samples."""
        found = zip(rest, self._of(one, rest), strict=True)
        raw = {place: result.reward for place, result in found if isinstance(result, Scored)}
        clipped = [one.clipped(reward) for reward in raw.values()]
        terms = normalized(clipped, one.normalize, moments.get(one.name, Moments()))
        return {place: one.weight * term for place, term in zip(raw, terms, strict=True)}

    def _passes(self, position: int) -> bool:
        """Whether all gates are 1. Samples without a result of a gate are already excluded."""
        results = [self._results[gate.name][position] for gate in self._gates]
        return all(isinstance(result, Scored) and result.reward == 1 for result in results)

    def _is_skipped(self, one: WeightedSource, position: int) -> bool:
        return isinstance(self._results[one.name][position], Skipped)

    def _of(self, one: WeightedSource, positions: Sequence[int]) -> list[RewardResult]:
        return [self._results[one.name][position] for position in positions]

    def _lack(self, position: int) -> tuple[RewardStatus, str] | None:
        """Why a sample has no reward, whatever its group has; None: it may have one."""
        lacks = [self._lack_of_gates(position), self._lack_of_terms(position)]
        found = [lack for lack in lacks if lack is not None]
        return min(found, key=lambda lack: lack[0] != "error", default=None)

    def _lack_of_gates(self, position: int) -> tuple[RewardStatus, str] | None:
        lack: tuple[RewardStatus, str] | None = None
        for gate in self._gates:
            result = self._results[gate.name][position]
            if isinstance(result, Failed):
                return "error", f"component {gate.name}: {result.code}: {result.message}"
            if isinstance(result, Skipped):
                reason = f": {result.reason}" if result.reason else ""
                lack = "skip", f"component {gate.name}: the gate skipped this sample{reason}"
        return lack

    def _lack_of_terms(self, position: int) -> tuple[RewardStatus, str] | None:
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
        return "skip", "; ".join(filter(None, skips)) or "every component skipped this sample"

    def _used(
        self, rest: Sequence[int]
    ) -> tuple[list[WeightedSource], tuple[RewardStatus, str] | None]:
        """The components that are summed for the group, or why there is none."""
        used = []
        for one in self._terms:
            outcomes = self._of(one, rest)
            skipped = sum(isinstance(outcome, Skipped) for outcome in outcomes)
            scored = sum(isinstance(outcome, Scored) for outcome in outcomes)
            if scored == len(outcomes) or (
                self._is_zeroing and scored and scored + skipped == len(outcomes)
            ):
                used.append(one)
            elif one.required and skipped < len(outcomes):
                return [], (
                    "skip",
                    f"component {one.name} skipped {skipped} of the {len(outcomes)} completions of this prompt; "
                    "sums over different components cannot be compared, so all of them are dropped",
                )
        if used or not rest:
            return used, None
        return [], self._nothing_left(rest)

    def _nothing_left(self, rest: Sequence[int]) -> tuple[RewardStatus, str]:
        """Why no component is summed: each lacks a reward for some sample."""
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
        self,
        position: int,
        reward: float | None,
        status: RewardStatus,
        message: str | None,
        zeroed: Sequence[str] = (),
    ) -> None:
        """Store a reward together with the results of each component."""
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
            reward, status, message, components, feedback, zeroed=tuple(zeroed), left_out=left_out
        )
