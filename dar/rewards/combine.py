"""From the results of several components to one reward per sample.

The total is the weighted sum of clipped rewards, over the same components for all samples of a group: sums over different
components cannot be compared, and comparing is all that an advantage does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dar.protocol.samples import RewardStatus
from dar.rewards.base import (
    Failed,
    RewardResult,
    RewardSample,
    RewardSource,
    SampleReward,
    Scored,
    Skipped,
)


@dataclass(frozen=True, slots=True)
class WeightedSource:
    """A reward source as a component of a sum."""

    source: RewardSource
    weight: float = 1.0
    clip: tuple[float, float] | None = None
    """Bounds that the raw reward is held to before it is weighted."""


Results = Mapping[str, Sequence[RewardResult]]
"""Results of each component, by name, in the order of the samples."""


def combine(
    components: Sequence[WeightedSource], samples: Sequence[RewardSample], results: Results
) -> list[SampleReward]:
    """The total of each sample.

    A sample on which a component fails is an error. A sample that every component skips is a skip by itself. Among the
    others of a group, a component that all of them skip is left out; one that only some skip makes the group a skip.
    """
    groups: dict[str, list[int]] = {}
    for position, sample in enumerate(samples):
        groups.setdefault(sample.group_id, []).append(position)
    totals: dict[int, SampleReward] = {}
    for positions in groups.values():
        totals.update(_combine_group(components, positions, results))
    return [totals[position] for position in range(len(samples))]


def _combine_group(
    components: Sequence[WeightedSource], positions: Sequence[int], results: Results
) -> dict[int, SampleReward]:
    totals: dict[int, SampleReward] = {}
    for position in positions:
        if (failure := _failure(results, position)) is not None:
            totals[position] = _sample_reward(None, "error", failure, results, position)
        elif (skip := _skip(results, position)) is not None:
            totals[position] = _sample_reward(None, "skip", skip, results, position)
    scored = [position for position in positions if position not in totals]
    used, skip_message = _used_components(components, scored, results)
    for position in scored:
        if skip_message is not None:
            totals[position] = _sample_reward(None, "skip", skip_message, results, position)
        else:
            terms = (_term(one, results[one.source.name][position]) for one in used)
            totals[position] = _sample_reward(float(sum(terms)), "reward", None, results, position)
    return totals


def _used_components(
    components: Sequence[WeightedSource], scored: Sequence[int], results: Results
) -> tuple[list[WeightedSource], str | None]:
    """The components that count for a group, or why none can."""
    used = []
    for component in components:
        name = component.source.name
        skips = [isinstance(results[name][position], Skipped) for position in scored]
        if not any(skips):
            used.append(component)
        elif not all(skips):
            return [], (
                f"component {name} skipped {sum(skips)} of the {len(skips)} completions of this prompt; "
                "sums over different components cannot be compared, so all of them are left out"
            )
    return used, None


def _skip(results: Results, position: int) -> str | None:
    """Why every component skips the sample, or None when one does not."""
    outcomes = {name: outcomes[position] for name, outcomes in results.items()}
    skips = {name: one for name, one in outcomes.items() if isinstance(one, Skipped)}
    if len(skips) < len(outcomes):
        return None
    reasons = [f"component {name}: {skip.reason}" for name, skip in skips.items() if skip.reason]
    return "; ".join(reasons) or "every reward component skipped this sample"


def _failure(results: Results, position: int) -> str | None:
    for name, outcomes in results.items():
        outcome = outcomes[position]
        if isinstance(outcome, Failed):
            return f"component {name}: {outcome.code}: {outcome.message}"
    return None


def _sample_reward(
    reward: float | None,
    status: RewardStatus,
    message: str | None,
    results: Results,
    position: int,
) -> SampleReward:
    """A total with what each component said about the sample."""
    components: dict[str, float | None] = {}
    feedback: dict[str, str] = {}
    for name, outcomes in results.items():
        outcome = outcomes[position]
        if not isinstance(outcome, Scored):
            components[name] = None
            continue
        components[name] = outcome.reward
        components |= {f"{name}/{part}": value for part, value in outcome.components.items()}
        if outcome.feedback:
            feedback[name] = outcome.feedback
    return SampleReward(reward, status, message, components, feedback)


def _term(component: WeightedSource, result: RewardResult) -> float:
    assert isinstance(result, Scored)  # a component that counts was neither skipped nor failed
    reward = result.reward
    if component.clip is not None:
        low, high = component.clip
        reward = min(max(reward, low), high)
    return component.weight * reward
