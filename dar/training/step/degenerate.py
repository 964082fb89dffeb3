"""`DegenerateWatch`: detects steps from whose rewards nothing can be learned.

Three kinds are reported, each once in a run, after `FEW_STEPS` such steps in a row of at least
`FEW_PROMPTS` prompts, or at the end of a run that has fewer:

- *constant*: in every group that is compared, all rewards are equal, so all advantages are 0.
- *truncated*: every completion was cut off, so the policy never sees the end of an answer.
- *skipped*: a reward component skipped every completion.

A message names the component and two prompts, so that its owner sees what to look at.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from dar.training.step.records import ScoredStep, group_rows

FEW_STEPS = 3
FEW_PROMPTS = 8
"""A rare reward is often absent from one or two prompts, so more must be seen."""
SHOWN_PROMPTS = 2
SHOWN_CHARACTERS = 80
"""Longest part of a prompt in a message."""
DegenerateKind = Literal["constant", "truncated", "skipped"]
KINDS: tuple[DegenerateKind, ...] = get_args(DegenerateKind)


class DegenerateWatch:
    """Counts such steps in a row, and warns once of each kind."""

    def __init__(self) -> None:
        self._streaks: dict[DegenerateKind, int] = dict.fromkeys(KINDS, 0)
        self._prompts: dict[DegenerateKind, int] = dict.fromkeys(KINDS, 0)
        self._warned: set[DegenerateKind] = set()

    def add(self, step: ScoredStep, last_step: int) -> list[tuple[str, dict[str, Any]]]:
        """Count a step after its optimizer step.

        Args:
            step: The step.
            last_step: The last one of the run, whose warnings cannot wait for more steps.

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
            is_enough = streak >= FEW_STEPS and self._prompts[kind] >= FEW_PROMPTS
            is_whole_run = step.number >= last_step and streak >= step.number
            if kind in self._warned or not (is_enough or is_whole_run):
                continue
            self._warned.add(kind)
            due.append((_message(kind, names, step, streak), _data(kind, names, step)))
        return due

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
    given = f"the reward {values.pop():.4g}" if len(values) == 1 else "equal rewards"
    return (
        f"{who} gave all completions of a prompt {given} in {steps}, {prompts}, so nothing is "
        "learned from the rewards: check that it depends on the completion"
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
