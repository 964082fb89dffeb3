"""From the results of several components to one reward per sample.

For each component: clip, normalise, weight. Their sum is multiplied by the gates and clipped once more. It goes over the same
components for all samples of a group: sums over different components cannot be compared, and comparing is all that an
advantage does.

- A component of weight 0 only watches: nothing that it says or fails to say changes a reward.
- A *required* component that fails makes its sample an error. One that all samples of a group skip is left out for the group;
  one that only some of them skip makes the group a skip.
- A component that is not required never does either: unless it has a reward for every sample of a group that is still to be
  summed, it is left out for the whole group.
- A *gate* says 0 or 1 for each sample; any other number is the failure ``contract.gate``. A sample that it fails on is an error, one
  that it skips a skip, whatever the others of the group have: a gate is never left out, so nothing passes it unseen.
- A sample for which no component is left has no reward.
- Where the job says ``on_partial_skip: zero``, a component that skips some samples of a group, but not all, adds 0 to the sums of
  those; `SampleReward.zeroed` names it. A sample that all components skip stays a skip.

No failure becomes a number here, and no skip but by that option; what becomes of samples without a reward says `dar.rewards.scoring.failures`.
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
    """A reward source as a component of a sum."""

    source: RewardSource
    weight: float = 1.0
    """0: the component only watches."""
    clip: tuple[float, float] | None = None
    """Bounds that the raw reward is held to before it is normalised and weighted."""
    normalize: Normalize = "none"
    required: bool = True
    """Whether a sample that it fails on has no reward."""
    is_gate: bool = False
    """Whether the sum is multiplied by its rewards, which are 0 or 1, instead of their being added."""

    @property
    def name(self) -> str:
        """Component name."""
        return self.source.name

    def clipped(self, reward: float) -> float:
        """``reward`` within the bounds."""
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
    """The total of each sample, as this module says.

    Args:
        components: The terms of the sum.
        samples: Whole groups.
        results: What each component said.
        clip: Bounds of the sum.
        moments: For the components that are normalised by ``running``.
        is_zeroing: Whether a component counts as 0 for what it skips of a group that it does not skip as a whole.
    """
    totals: dict[int, SampleReward] = {}
    results = checked_gates(components, results)
    for positions in _groups(samples):
        group = _Group(components, positions, results, is_zeroing=is_zeroing)
        totals |= group.totals(clip, moments or {})
    return [totals[position] for position in range(len(samples))]


def checked_gates(components: Sequence[WeightedSource], results: Results) -> Results:
    """``results``, in which what a gate says beside 0 and 1 is a failure: no threshold is guessed."""
    return {
        **results,
        **{
            one.name: [_as_gate(result) for result in results[one.name]]
            for one in components
            if one.is_gate
        },
    }


def _as_gate(result: RewardResult) -> RewardResult:
    if not isinstance(result, Scored) or result.reward in GATE_REWARDS:
        return result
    message = f"a gate gives 0 or 1, not {result.reward:.6g}"
    return Failed(GATE_CODE, message, is_transient=False)


class Combination:
    """How the components of a job become one reward, with what is remembered from step to step.

    Args:
        components: The terms of the sum.
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
        self._moments = RunningMoments([one.name for one in self._running])

    def __call__(
        self, samples: Sequence[RewardSample], results: Results, context: RewardContext
    ) -> list[SampleReward]:
        """The total of each sample of whole groups; in training their rewards are noted for `end_step`.

        To be called once for each group, in any order within a step, but after `end_step` of the step before.
        """
        moments = self._moments.after(context.steps_done)
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
                self._moments.note(context.step, one.name, map(one.clipped, scored))
        return totals

    def end_step(self, step: int) -> None:
        """All groups of ``step`` are combined: their rewards count from the next step on."""
        self._moments.end_step(step)

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
            else:  # zeros alone are no reward
                self._put(position, None, "skip", "every component that counts skipped this sample")
        return self._found

    def _column(
        self, one: WeightedSource, rest: Sequence[int], moments: Mapping[str, Moments]
    ) -> dict[int, float]:
        """The weighted terms of one component, by position, without what it skipped."""
        found = zip(rest, self._of(one, rest), strict=True)
        raw = {place: result.reward for place, result in found if isinstance(result, Scored)}
        clipped = [one.clipped(reward) for reward in raw.values()]
        terms = normalized(clipped, one.normalize, moments.get(one.name, Moments()))
        return {place: one.weight * term for place, term in zip(raw, terms, strict=True)}

    def _passes(self, position: int) -> bool:
        """Whether all gates are open; a sample that one of them says nothing about does not come here."""
        results = [self._results[gate.name][position] for gate in self._gates]
        return all(isinstance(result, Scored) and result.reward == 1 for result in results)

    def _is_skipped(self, one: WeightedSource, position: int) -> bool:
        return isinstance(self._results[one.name][position], Skipped)

    def _of(self, one: WeightedSource, positions: Sequence[int]) -> list[RewardResult]:
        return [self._results[one.name][position] for position in positions]

    def _lack(self, position: int) -> tuple[RewardStatus, str] | None:
        """Why a sample has no total whatever the others of its group have, or None."""
        lacks = [self._lack_of_gates(position), self._lack_of_terms(position)]
        told = [lack for lack in lacks if lack is not None]
        return min(told, key=lambda lack: lack[0] != "error", default=None)

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
            scored = sum(isinstance(outcome, Scored) for outcome in outcomes)
            if scored == len(outcomes) or (
                self._is_zeroing and scored and scored + skipped == len(outcomes)
            ):
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
        self,
        position: int,
        reward: float | None,
        status: RewardStatus,
        message: str | None,
        zeroed: Sequence[str] = (),
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
            reward,
            status,
            message,
            components,
            feedback,
            zeroed=tuple(zeroed),
            left_out=left_out,
        )
