"""Normalisation of a component's rewards, before they are weighted and summed.

``running`` keeps state, which changes only between steps: all groups of a step are normalised by
the moments after the last step that was trained when they were sampled, and its rewards are added
at its end, in sums that are rounded once. So neither the order of the groups nor their batching
into requests changes a bit, and a resumed run is identical to one that never stopped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dar.errors import CheckpointError
from dar.protocol.reward_spec import MinMax, Normalize, Tanh

WARM_UP = 256
"""Rewards that are needed before ``running`` has an effect."""
MIN_STD = 1e-6
"""With a smaller standard deviation rewards are equal but for rounding."""

KEPT_STEPS = 8
"""Steps whose moments are kept; more than sampling can be ahead of training."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations (Welford; merged as by Chan et al.)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 0 or self.squares < 0 or not math.isfinite(self.mean + self.squares):
            raise ValueError(f"invalid reward moments: {self.count}, {self.mean}, {self.squares}")

    @property
    def std(self) -> float:
        """Biased standard deviation; 0 without rewards."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def with_step(self, rewards: Sequence[float]) -> "Moments":
        """The moments including the rewards of another step, in any order."""
        if not rewards:
            return self
        added = len(rewards)
        mean = math.fsum(rewards) / added
        squares = math.fsum((reward - mean) ** 2 for reward in rewards)
        count = self.count + added
        gap = mean - self.mean
        return Moments(
            count,
            self.mean + gap * added / count,
            self.squares + squares + gap * gap * self.count * added / count,
        )

    def apply(self, reward: float) -> float:
        """``reward`` in standard deviations from the mean; unchanged during the warm-up.

        As long as all rewards are equal it is only centred.
        """
        if self.count < WARM_UP:
            return reward
        centred = reward - self.mean
        return centred if self.std < MIN_STD else centred / self.std


def normalized(
    rewards: Sequence[float], how: Normalize, moments: Moments = Moments()
) -> list[float]:
    """Normalise the clipped rewards of one component and one group.

    Args:
        rewards: Rewards of the samples that are compared.
        how: The component's ``normalize``.
        moments: For ``running``.
    """
    if isinstance(how, MinMax):
        low, high = how.minmax
        return [min(max((reward - low) / (high - low), 0.0), 1.0) for reward in rewards]
    if isinstance(how, Tanh):
        return [math.tanh(reward / how.tanh) for reward in rewards]
    if how == "running":
        return [moments.apply(reward) for reward in rewards]
    if how == "group":
        return _z_scores(rewards)
    return list(rewards)


def _z_scores(rewards: Sequence[float]) -> list[float]:
    """Deviations from the mean in biased standard deviations, at least `MIN_STD`."""
    if not rewards or min(rewards) == max(rewards):
        return [0.0] * len(rewards)  # the mean of equal numbers may differ in its last digit
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    return [(reward - mean) / max(std, MIN_STD) for reward in rewards]


class RunningMoments:
    """The moments of each component that is normalised by ``running``.

    The rewards of a step may be collected while an earlier step is still trained, and must not be
    part of a checkpoint of that step. So the moments after each of the last steps are kept.

    Args:
        names: Names of the components.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = tuple(names)
        self._after: dict[int, dict[str, Moments]] = {0: dict.fromkeys(names, Moments())}
        self._recorded: dict[int, dict[str, list[float]]] = {}

    def after(self, step: int) -> Mapping[str, Moments]:
        """Moments of all finished steps up to ``step``."""
        known = [number for number in self._after if number <= step]
        return self._after[max(known, default=min(self._after))]

    def record(self, step: int, name: str, rewards: Iterable[float]) -> None:
        """Record clipped rewards of a step in progress, in any order."""
        if name in self._names:
            self._recorded.setdefault(step, {}).setdefault(name, []).extend(rewards)

    def end_step(self, step: int) -> None:
        """Add the recorded rewards of ``step``; a step that has already ended is unchanged."""
        recorded = self._recorded.pop(step, {})
        if step in self._after or step < min(self._after):
            return
        before = self.after(step)
        self._after[step] = {
            name: before[name].with_step(recorded.get(name, ())) for name in self._names
        }
        for number in sorted(self._after)[:-KEPT_STEPS]:
            del self._after[number]

    def state(self, step: int) -> dict[str, Any]:
        """State for a checkpoint of ``step``, as JSON."""
        moments = {name: [m.count, m.mean, m.squares] for name, m in self.after(step).items()}
        return {"step": step, "moments": moments}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a `state`.

        Raises:
            CheckpointError: It is invalid, or of other components.
        """
        try:
            step = int(state["step"])
            found = {
                name: Moments(int(count), float(mean), float(squares))
                for name, (count, mean, squares) in state["moments"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"invalid reward moments in the checkpoint: {error!r}") from error
        if found.keys() != set(self._names):
            raise CheckpointError(
                f"the checkpoint holds moments of the components {sorted(found)}, but {sorted(self._names)} are normalised by them"
            )
        self._after, self._recorded = {step: found}, {}
