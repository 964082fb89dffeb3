"""Normalisation of a component's rewards, before they are weighted and summed.

``running`` needs a memory. It is moved on between steps alone: all groups of a step are normalised by what was known when
the step began, and the step's own rewards are taken in at its end, in sums that are rounded once. So neither the order in which
groups come back nor how they are put into requests changes a single bit, and a resumed run goes on as if it had not stopped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dar.errors import CheckpointError
from dar.protocol.reward_spec import MinMax, Normalize, Tanh

WARM_UP = 256
"""Rewards that must be known before ``running`` changes anything."""
MIN_STD = 1e-6
"""Standard deviation below which rewards are taken as equal but for rounding."""

KEPT_STEPS = 8
"""Steps whose moments are kept in memory: more than any overlap runs ahead of the step that is trained."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of all rewards so far (Welford's, merged step by step as Chan et al. do)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 0 or self.squares < 0 or not math.isfinite(self.mean + self.squares):
            raise ValueError(f"no moments of rewards: {self.count}, {self.mean}, {self.squares}")

    @property
    def std(self) -> float:
        """Biased standard deviation; 0 without rewards."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def with_step(self, rewards: Sequence[float]) -> "Moments":
        """The moments with the rewards of one more step, in whatever order they are given."""
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

        While all rewards were equal there is no scale: then it is centred only.
        """
        if self.count < WARM_UP:
            return reward
        centred = reward - self.mean
        return centred if self.std < MIN_STD else centred / self.std


def normalized(
    rewards: Sequence[float], how: Normalize, moments: Moments = Moments()
) -> list[float]:
    """The clipped rewards of one component and one group, normalised.

    Args:
        rewards: Those of the samples that are compared with each other.
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
    """Deviations from the mean in biased standard deviations, of which there are at least `MIN_STD`."""
    if not rewards or min(rewards) == max(rewards):
        return [0.0] * len(rewards)  # the mean of equal numbers may be off by its last digit
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    return [(reward - mean) / max(std, MIN_STD) for reward in rewards]


class RunningMoments:
    """What ``running`` remembers of each component that asks for it.

    Rewards of a step may be collected while an earlier one is still trained, and a checkpoint of that earlier one must not
    hold them: so the moments after each of the last steps are kept.

    Args:
        names: Those components.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = tuple(names)
        self._after: dict[int, dict[str, Moments]] = {0: dict.fromkeys(names, Moments())}
        self._noted: dict[int, dict[str, list[float]]] = {}

    def after(self, step: int) -> Mapping[str, Moments]:
        """Moments of the rewards of all steps up to ``step``, as far as they have ended."""
        known = [number for number in self._after if number <= step]
        return self._after[max(known, default=min(self._after))]

    def note(self, step: int, name: str, rewards: Iterable[float]) -> None:
        """Take down clipped rewards of a step in progress, in any order."""
        if name in self._names:
            self._noted.setdefault(step, {}).setdefault(name, []).extend(rewards)

    def end_step(self, step: int) -> None:
        """What was noted of ``step`` counts from now on; a step that has ended before stays as it was."""
        noted = self._noted.pop(step, {})
        if step in self._after or step < min(self._after):
            return
        before = self.after(step)
        self._after[step] = {
            name: before[name].with_step(noted.get(name, ())) for name in self._names
        }
        for number in sorted(self._after)[:-KEPT_STEPS]:
            del self._after[number]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint of ``step`` keeps, as JSON."""
        moments = {name: [m.count, m.mean, m.squares] for name, m in self.after(step).items()}
        return {"step": step, "moments": moments}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: It is of other components, or no such state.
        """
        try:
            step = int(state["step"])
            found = {
                name: Moments(int(count), float(mean), float(squares))
                for name, (count, mean, squares) in state["moments"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint holds no moments of rewards: {error!r}"
            ) from error
        if found.keys() != set(self._names):
            raise CheckpointError(
                f"the checkpoint holds moments of the components {sorted(found)}, but {sorted(self._names)} are normalised by them"
            )
        self._after, self._noted = {step: found}, {}
