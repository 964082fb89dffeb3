"""`DegenerateWatch`: detects steps from whose rewards nothing can be learned.

Three kinds are reported, each once in a run, after `degenerate_steps` such steps in a row of at
least `degenerate_prompts` prompts (`dar.protocol.hints`), or at the end of a run that has fewer:

- *constant*: in every group that is compared, all rewards are equal, so all advantages are 0.
- *truncated*: every completion was cut off, so the policy never sees the end of an answer.
- *skipped*: a reward component skipped every completion.

A message names the component and two prompts, so that its owner sees what to look at. That of
constant rewards also says how they deviate, and what, if anything, would change that.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dar.protocol.hints import HINTS
from dar.training.config.config import DARConfig
from dar.training.step.records import ScoredStep, group_rows

SHOWN_PROMPTS = 2
SHOWN_CHARACTERS = 80
"""Longest part of a prompt in a message."""
DegenerateKind = Literal["constant", "truncated", "skipped"]
KINDS: tuple[DegenerateKind, ...] = get_args(DegenerateKind)


class DegenerateWatch:
    """Counts such steps in a row, and warns once of each kind.

    Args:
        config: The arguments of the run.
    """

    def __init__(self, config: DARConfig) -> None:
        self._config = config
        self._streaks: dict[DegenerateKind, int] = dict.fromkeys(KINDS, 0)
        self._prompts: dict[DegenerateKind, int] = dict.fromkeys(KINDS, 0)
        self._warned: set[DegenerateKind] = set()

    def add(
        self, step: ScoredStep, last_step: int, *, learning_rate: float
    ) -> list[tuple[str, dict[str, Any]]]:
        """Count a step after its optimizer step.

        Args:
            step: The step.
            last_step: The last one of the run, whose warnings cannot wait for more steps.
            learning_rate: With which the optimizer has stepped.

        Returns:
            Message and data of each event that is due.
        """
        blamed: dict[DegenerateKind, list[str] | None] = {
            "constant": _constant(step),
            "truncated": [] if _is_truncated(step) else None,
            "skipped": _skipped(step) or None,
        }
        due = []
        for kind, names in blamed.items():
            if names is None:
                self._streaks[kind] = self._prompts[kind] = 0
                continue
            self._streaks[kind] += 1
            self._prompts[kind] += len(step.prompts)
            streak = self._streaks[kind]
            is_enough = (
                streak >= HINTS.degenerate_steps and self._prompts[kind] >= HINTS.degenerate_prompts
            )
            is_whole_run = step.number >= last_step and streak >= step.number
            if kind in self._warned or not (is_enough or is_whole_run):
                continue
            self._warned.add(kind)
            message, data = _message(kind, names, step, streak), _data(kind, names, step)
            if kind == "constant":
                spread = RewardSpread.of(step)
                message += self._why_constant(step, spread, learning_rate)
                data |= spread.data() | {"learning_rate": learning_rate}
            due.append((message, data))
        return due

    def _why_constant(self, step: ScoredStep, spread: "RewardSpread", learning_rate: float) -> str:
        """The rest of the message about rewards that do not distinguish completions."""
        if spread.within:
            advice = (
                f"lower tie_tolerance, which is {self._config.tie_tolerance:g}; without it, alpha "
                f"+ beta = {spread.fitting:.2g} would fit"
            )
        elif _are_copies(step):
            advice = (
                "the completions of a prompt are all the same text, so let them differ (by a "
                "higher temperature, top_p or top_k, or another model); no alpha + beta would fit"
            )
        else:
            advice = "check that it depends on the completion; no alpha + beta would fit"
        return (
            f": {advice}; std(reward) is {spread.total:.3g}, and {spread.within:.3g} within a "
            f"prompt; the learning rate is {learning_rate:.3g}"
        )

    def state(self) -> dict[str, Any]:
        """The counts, as JSON."""
        return {
            "streaks": self._streaks,
            "prompts": self._prompts,
            "warned": sorted(self._warned),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._streaks = {name: int(state["streaks"][name]) for name in KINDS}
        self._prompts = {name: int(state["prompts"][name]) for name in KINDS}
        self._warned = set(state["warned"])


@dataclass(frozen=True, slots=True)
class RewardSpread:
    """Biased standard deviations of a step's rewards."""

    total: float
    within: float
    """Within the groups that are compared; 0 if all rewards of each are equal."""

    @classmethod
    def of(cls, step: ScoredStep) -> "RewardSpread":
        """The spread of a step with at least one group."""
        groups = [
            [step.rewards[row].reward for row in group if row >= 0]
            for group in group_rows(step.counts).tolist()
        ]
        scored = [[value for value in group if value is not None] for group in groups]
        values = [value for group in scored for value in group]
        around = [value - math.fsum(group) / len(group) for group in scored for value in group]
        is_equal = all(len(set(group)) <= 1 for group in scored)  # then the rest is rounding
        return cls(statistics.pstdev(values), 0.0 if is_equal else statistics.pstdev(around))

    @property
    def fitting(self) -> float:
        """The alpha + beta that would fit; 0 if none does."""
        return self.within / HINTS.advantages_fitting

    def data(self) -> dict[str, Any]:
        """The same, for an event."""
        return {"reward_std": self.total, "fitting_alpha_plus_beta": self.fitting or None}


# --- what a step shows ---------------------------------------------------------------------------


def _constant(step: ScoredStep) -> list[str] | None:
    """Components that give no differences; None if some rewards that are compared differ."""
    if not step.group_count or step.tied_count < step.group_count:
        return None
    names = _components(step)
    return [name for name in names if _is_constant(step, name)] or names


def _is_constant(step: ScoredStep, name: str) -> bool:
    """Whether a component gives all completions that are compared with each other the same."""
    for group in group_rows(step.counts).tolist():
        values = {step.rewards[row].components.get(name) for row in group if row >= 0} - {None}
        if len(values) > 1:
            return False
    return True


def _are_copies(step: ScoredStep) -> bool:
    """Whether the completions that are compared with each other are all the same text."""
    groups = group_rows(step.counts).tolist()
    return all(len({step.texts[row] for row in group if row >= 0}) == 1 for group in groups)


def _is_truncated(step: ScoredStep) -> bool:
    """Whether every completion was cut off; stored ones may lack an end token on purpose."""
    return step.staleness is not None and set(step.finish_reasons) == {"length"}


def _skipped(step: ScoredStep) -> list[str]:
    """Components that skipped every completion."""
    return [
        name
        for name in _components(step)
        if all(
            reward.components.get(name) is None
            and reward.status != "error"
            and name not in reward.left_out
            for reward in step.rewards
        )
    ]


def _components(step: ScoredStep) -> list[str]:
    """Names of the components, without their parts; none where the data hold the rewards."""
    names = dict.fromkeys(name for reward in step.rewards for name in reward.components)
    return [name for name in names if "/" not in name]


# --- messages ------------------------------------------------------------------------------------


def _message(kind: DegenerateKind, names: list[str], step: ScoredStep, streak: int) -> str:
    steps = f"step {step.number}" if streak == 1 else f"the last {streak} steps"
    prompts = " and ".join(map(repr, _prompts(step)))
    prompts = f"for example after {prompts}"
    who = f"reward component {' and '.join(names)}" if names else "the reward"
    if kind == "truncated":
        return (
            f"every completion of {steps} was cut off before its end, {prompts}: raise "
            "max_new_tokens or max_length, or check that the model has learned to end an answer"
        )
    if kind == "skipped":
        return (
            f"{who} skipped every completion of {steps}, {prompts}: check that it applies to these "
            "prompts, and that it returns null only where it does not"
        )
    values = {reward.reward for reward in step.rewards} - {None}
    one = f"the reward {values.pop():.4g}" if len(values) == 1 else None
    given = one or ("equal rewards" if not RewardSpread.of(step).within else "nearly equal rewards")
    return (
        f"{who} gave all completions of a prompt {given} in {steps}, {prompts}, so nothing is "
        "learned from the rewards"
    )


def _prompts(step: ScoredStep) -> list[str]:
    """The beginnings of two different prompts, or of the only one."""
    texts = dict.fromkeys(prompt.text for prompt in step.prompts)
    return [
        text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
        for text in list(texts)[:SHOWN_PROMPTS]
    ]


def _data(kind: DegenerateKind, names: list[str], step: ScoredStep) -> dict[str, Any]:
    return {
        "kind": f"{kind}_steps",
        "step": step.number,
        "components": names,
        "prompts": _prompts(step),
    }
