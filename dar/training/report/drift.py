"""`DriftWatch`: detects a jump in a component's raw rewards, as when its service or model changes.

Rewards should rise while a policy learns, so nothing is compared with the beginning of a job. The
rule, for each component:

- *now* is the mean of its last `drift_recent_steps` step means, and *before* that of up to
  `drift_window_steps` steps before these.
- *sigma* is the largest of: the deviation of the step means before; the standard error of a step's
  mean before, and that of a step's mean now. So neither a noisy service nor a first success after
  many steps without one is a jump. Nor is a steady rise over the window, which widens the deviation
  as fast as it moves the mean (a straight line is about 2 sigma, whatever its slope).
- A jump is ``|now - before| > drift_jump * sigma``, once there are `drift_warm_up_steps` steps
  before. It is reported once: it lasts until the distance is below `drift_calm` sigma again, which
  is soon, when the steps before include the new level.

The thresholds are those of `dar.protocol.hints`.

Steps without a reward of the component do not count.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dar.protocol.hints import HINTS

KEPT_STEPS = HINTS.drift_recent_steps + HINTS.drift_window_steps


@dataclass(frozen=True, slots=True)
class StepMean:
    """Raw rewards of one component in one step."""

    mean: float
    error: float
    """Standard error of the mean."""


@dataclass(frozen=True, slots=True)
class Drift:
    """A jump of a component's rewards."""

    component: str
    now: float
    """Mean reward of the last steps."""
    before: float
    """Mean reward of the steps before."""
    sigma: float
    """Ordinary deviation between steps; 0 if all were equal."""

    @property
    def message(self) -> str:
        """A warning for the owner of the job."""
        return (
            f"the rewards of component {self.component} have jumped from {self.before:.4g} to "
            f"{self.now:.4g} on average; earlier steps varied by {self.sigma:.2g}; check whether "
            "its service, model or scale was changed"
        )

    def data(self, step: int) -> dict[str, Any]:
        """Data of the job's event."""
        return {
            "kind": "reward_drift",
            "step": step,
            "component": self.component,
            "mean_now": self.now,
            "mean_before": self.before,
            "sigma": self.sigma,
            "steps_now": HINTS.drift_recent_steps,
        }


class DriftWatch:
    """Watches the step means of all components; the module's docstring has the rule."""

    def __init__(self) -> None:
        self._steps: dict[str, deque[StepMean]] = {}
        self._jumped: set[str] = set()

    def add(self, component: str, rewards: Sequence[float]) -> Drift | None:
        """Record a step.

        Args:
            component: Name of the component.
            rewards: Its raw rewards in the step, at least one.

        Returns:
            A jump, if one begins in this step.
        """
        steps = self._steps.setdefault(component, deque(maxlen=KEPT_STEPS))
        mean = math.fsum(rewards) / len(rewards)
        steps.append(StepMean(mean, statistics.pstdev(rewards, mean) / math.sqrt(len(rewards))))
        if len(steps) < HINTS.drift_recent_steps + HINTS.drift_warm_up_steps:
            return None
        now, before, sigma = _compared(list(steps))
        distance = abs(now - before)
        if component in self._jumped:
            if distance <= HINTS.drift_calm * sigma:
                self._jumped.discard(component)
            return None
        rounding = HINTS.drift_rounding * max(1.0, abs(now), abs(before))
        if distance <= max(HINTS.drift_jump * sigma, rounding):
            return None
        self._jumped.add(component)
        return Drift(component, now, before, sigma)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON."""
        return {
            "steps": {
                name: [[step.mean, step.error] for step in steps]
                for name, steps in self._steps.items()
            },
            "jumped": sorted(self._jumped),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        self._steps = {
            name: deque((StepMean(*step) for step in steps), maxlen=KEPT_STEPS)
            for name, steps in state["steps"].items()
        }
        self._jumped = set(state["jumped"])


def _compared(steps: list[StepMean]) -> tuple[float, float, float]:
    """Mean now, mean before, and sigma."""
    past, recent = steps[: -HINTS.drift_recent_steps], steps[-HINTS.drift_recent_steps :]
    now = math.fsum(step.mean for step in recent) / len(recent)
    before = math.fsum(step.mean for step in past) / len(past)
    deviation = math.sqrt(math.fsum((step.mean - before) ** 2 for step in past) / (len(past) - 1))
    errors = [
        math.sqrt(math.fsum(step.error**2 for step in part) / len(part)) for part in (past, recent)
    ]
    return now, before, max(deviation, *errors)
