"""`DriftWatch`: tells when the raw rewards of a component jump, as those of a service do that is changed or begins to lie.

Rewards are meant to rise while a policy learns, so nothing is compared with the beginning of a job. The rule, for each component:

- *now* is the mean of its last `RECENT` step means, and *before* that of up to `WINDOW` steps that lie before them.
- *sigma* is the largest of: the deviation of the step means before; the standard error of a step's mean before, and that of one now. So
  neither a noisy service nor a first success after many steps of nothing is a jump, and a rise that goes on over the window is none
  either: it widens the deviation as fast as it moves the mean (a straight line is about 2 sigma, however steep).
- A jump is ``|now - before| > JUMP * sigma``, once `WARM_UP` steps lie before. It is told once: the episode lasts until the distance is
  below `CALM` sigma again, as it is soon after, when the new level is part of what lies before.

A step without a reward of the component is no step here.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RECENT = 4
WINDOW = 32
WARM_UP = 16
JUMP = 6.0
CALM = 3.0
ROUNDING = 1e-9
"""Share of the rewards' size, or of 1, below which a difference is rounding."""


@dataclass(frozen=True, slots=True)
class StepMean:
    """Raw rewards of one component in one step."""

    mean: float
    error: float
    """Standard error of the mean."""


@dataclass(frozen=True, slots=True)
class Drift:
    """A jump."""

    component: str
    now: float
    """Mean reward of the last steps."""
    before: float
    """Mean reward of those before."""
    sigma: float
    """What ordinary steps differ by; 0 where all were the same."""

    @property
    def message(self) -> str:
        """For the owner of the job."""
        return (
            f"the rewards of component {self.component} have jumped from {self.before:.4g} to {self.now:.4g} on average, while steps "
            f"before differed by {self.sigma:.2g}; see whether its service, model or scale was changed"
        )

    def data(self, step: int) -> dict[str, Any]:
        """For the job's event."""
        return {
            "kind": "reward_drift",
            "step": step,
            "component": self.component,
            "mean_now": self.now,
            "mean_before": self.before,
            "sigma": self.sigma,
            "steps_now": RECENT,
        }


class DriftWatch:
    """Watches the step means of all components; see this module for the rule."""

    def __init__(self) -> None:
        self._steps: dict[str, deque[StepMean]] = {}
        self._jumped: set[str] = set()

    def add(self, component: str, rewards: Sequence[float]) -> Drift | None:
        """Take in a step.

        Args:
            component: Its name.
            rewards: Its raw rewards, at least one.

        Returns:
            A jump, if one begins here.
        """
        steps = self._steps.setdefault(component, deque(maxlen=RECENT + WINDOW))
        mean = math.fsum(rewards) / len(rewards)
        steps.append(StepMean(mean, statistics.pstdev(rewards, mean) / math.sqrt(len(rewards))))
        if len(steps) < RECENT + WARM_UP:
            return None
        now, before, sigma = _compared(list(steps))
        distance = abs(now - before)
        if component in self._jumped:
            if distance <= CALM * sigma:
                self._jumped.discard(component)
            return None
        if distance <= max(JUMP * sigma, ROUNDING * max(1.0, abs(now), abs(before))):
            return None
        self._jumped.add(component)
        return Drift(component, now, before, sigma)

    def state(self) -> dict[str, Any]:
        """What is remembered, as JSON."""
        return {
            "steps": {
                name: [[step.mean, step.error] for step in steps]
                for name, steps in self._steps.items()
            },
            "jumped": sorted(self._jumped),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._steps = {
            name: deque((StepMean(*step) for step in steps), maxlen=RECENT + WINDOW)
            for name, steps in state["steps"].items()
        }
        self._jumped = set(state["jumped"])


def _compared(steps: list[StepMean]) -> tuple[float, float, float]:
    """Mean now, mean before, and sigma."""
    past, recent = steps[:-RECENT], steps[-RECENT:]
    now = math.fsum(step.mean for step in recent) / len(recent)
    before = math.fsum(step.mean for step in past) / len(past)
    deviation = math.sqrt(math.fsum((step.mean - before) ** 2 for step in past) / (len(past) - 1))
    errors = [
        math.sqrt(math.fsum(step.error**2 for step in part) / len(part)) for part in (past, recent)
    ]
    return now, before, max(deviation, *errors)
