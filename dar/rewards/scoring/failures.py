"""When so many rewards are missing that a job should not go on: the failure budget of its spec.

A sample whose source *failed* counts against the budget; one that a source *skipped* was answered and does not.
"""

import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from dar.errors import RewardBudgetError, TrainingError
from dar.protocol.reward_spec import FailurePolicy, FallbackValue
from dar.protocol.reward_stats import Family
from dar.rewards.base import SampleReward

OUTAGES: frozenset[Family] = frozenset(
    {"timeout", "connect", "dns", "http_429", "http_5xx", "callback_late"}
)
"""Failures that pass by themselves."""
KNOWN: dict[str, Family] = {
    "timeout": "timeout", "deadline": "timeout", "http_408": "timeout",
    "connect": "connect", "connect_timeout": "connect", "protocol": "connect", "breaker_open": "connect",
    "dns": "dns",
    "http_425": "http_429", "http_429": "http_429",
    "nonfinite": "nonfinite", "contract.nonfinite": "nonfinite", "contract.length": "length",
    "callback_late": "callback_late",
}  # fmt: skip
PREFIXES: dict[str, Family] = {
    "http_4": "http_4xx", "http_5": "http_5xx", "tls": "tls", "contract": "contract", "egress": "egress", "dns": "dns",
}  # fmt: skip
REMEMBERED = 64
"""Failures that an error tells of."""
SHOWN_IDS = 8
SHOWN_CHARACTERS = 700
_MESSAGE = re.compile(r"component (?P<component>[a-z][a-z0-9_]*): (?P<code>[A-Za-z0-9_.]+): ")


def family_of(code: str) -> Family:
    """The kind of failure that a code like ``http_503`` or ``contract.length`` belongs to."""
    if code in KNOWN:
        return KNOWN[code]
    return next((family for start, family in PREFIXES.items() if code.startswith(start)), "other")


def code_of(result: SampleReward) -> str:
    """The code of a failed sample's first failure; ``unknown`` where its message names none."""
    found = _MESSAGE.match(result.message or "")
    return found["code"] if found else "unknown"


class FailureBudget:
    """Counts failures over a window of groups, and steps without anything usable.

    The budget is spent when more samples of the window have failed than ``max_failed_fraction`` of a *full* window allows:
    groups that the window still lacks count as good. So a single failure at the beginning of a job is no reason to stop, and a
    service that fails altogether is one long before the window is full.

    What `state` gives is as of the last `end_step`, as a checkpoint is: groups of a step that was dropped are counted when that
    step is made again. Once the budget is spent, counting starts anew; and a job that goes on from a checkpoint, which may have been
    written just before, has at least half of its budget, so that its next failure is no reason to pause it again.

    Args:
        policy: The job's.
    """

    def __init__(self, policy: FailurePolicy) -> None:
        self._policy = policy
        self._groups: deque[tuple[int, int]] = deque(maxlen=policy.window_groups)
        self._failed = self._samples = 0
        self._empty_steps = 0
        self._edge: dict[str, Any] = {"groups": [], "empty_steps": 0}
        self._recent: deque[tuple[str, str | None, str]] = deque(maxlen=REMEMBERED)
        """Code, sample id and message of the newest failures."""

    @property
    def failed_fraction(self) -> float:
        """Share of the window's samples that failed, missing groups counted as good ones; 0 of an empty window."""
        if not self._groups:
            return 0.0
        per_group = self._samples / len(self._groups)
        return self._failed / (per_group * self._policy.window_groups)

    def add_group(self, results: Sequence[SampleReward], ids: Sequence[str] = ()) -> None:
        """Count the samples of one prompt.

        Args:
            results: What became of each, before any of them is replaced or dropped.
            ids: Their ids, to be named in an error; may be left out.

        Raises:
            RewardBudgetError: Too many samples have failed.
        """
        if not results:
            return
        failed = [(n, result) for n, result in enumerate(results) if result.status == "error"]
        for n, result in failed:
            sample_id = ids[n] if n < len(ids) else None
            self._recent.append((code_of(result), sample_id, result.message or ""))
        if len(self._groups) == self._policy.window_groups:
            old_failed, old_samples = self._groups[0]
            self._failed -= old_failed
            self._samples -= old_samples
        self._groups.append((len(failed), len(results)))
        self._failed += len(failed)
        self._samples += len(results)
        if failed and self.failed_fraction > self._policy.max_failed_fraction:
            self._spend(
                f"{self._failed} of the last {self._samples} samples could not be scored, more than "
                f"{self._policy.max_failed_fraction:.3g} of {self._policy.window_groups} groups"
            )

    def end_step(self, usable_groups: int) -> None:
        """Count a step that is done.

        Args:
            usable_groups: Its groups with enough scored samples to learn from, tied ones included.

        Raises:
            RewardBudgetError: The last steps had none.
        """
        self._empty_steps = 0 if usable_groups else self._empty_steps + 1
        if self._empty_steps >= self._policy.max_empty_steps:
            self._spend(
                f"the last {self._empty_steps} steps had no group with enough scored samples to learn from"
            )
        self._edge = {"groups": list(self._groups), "empty_steps": self._empty_steps}

    def state(self) -> dict[str, Any]:
        """What has been counted up to the last step edge, as JSON."""
        return {
            "groups": [list(group) for group in self._edge["groups"]],
            "empty_steps": self._edge["empty_steps"],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, perhaps with another window; the oldest failures beyond half of the budget are forgiven."""
        self._forget()
        self._groups.extend((int(failed), int(samples)) for failed, samples in state["groups"])
        self._failed = sum(failed for failed, _ in self._groups)
        self._samples = sum(samples for _, samples in self._groups)
        for place, (failed, samples) in enumerate(self._groups):
            if self.failed_fraction <= self._policy.max_failed_fraction / 2:
                break
            self._groups[place] = (0, samples)
            self._failed -= failed
        self._empty_steps = min(int(state["empty_steps"]), self._policy.max_empty_steps // 2)
        self._edge = {"groups": list(self._groups), "empty_steps": self._empty_steps}

    def _forget(self) -> None:
        self._groups.clear()
        self._recent.clear()
        self._failed = self._samples = self._empty_steps = 0
        self._edge = {"groups": [], "empty_steps": 0}

    def _spend(self, why: str) -> None:
        error = budget_error(why, list(self._recent))
        self._forget()
        raise error


def budget_error(why: str, failures: Iterable[tuple[str, str | None, str]]) -> RewardBudgetError:
    """The error that pauses a job.

    Args:
        why: What was counted.
        failures: Code, sample id and message of failures, the newest last.
    """
    found = list(failures)
    errors = Counter(code for code, _, _ in found)
    ids = [sample_id for _, sample_id, _ in found if sample_id is not None]
    parts = [why]
    if errors:
        parts.append(", ".join(f"{code} {count}" for code, count in errors.most_common(5)))
        parts.append(f"the newest: {found[-1][2][:SHOWN_CHARACTERS]}")
    if ids:
        parts.append(f"samples {', '.join(ids[-SHOWN_IDS:])}")
    return RewardBudgetError(
        "; ".join(parts),
        errors=errors,
        sample_ids=ids[-SHOWN_IDS:],
        is_outage=bool(errors) and all(family_of(code) in OUTAGES for code in errors),
    )


def under_policy(policy: FailurePolicy, group: Sequence[SampleReward]) -> list[SampleReward]:
    """The rewards of a group, all missing where the policy leaves the whole group out.

    With a ``fallback_value`` it stands in for the reward of each completion that could not be scored: the status stays ``error``,
    and `SampleReward.is_fallback` is set. What a source skipped stays without a reward.

    A group of one completion is compared with those of other prompts, so ``min_valid`` does not apply to it.

    Args:
        policy: Of the job.
        group: Totals of the K completions of a prompt.

    Raises:
        TrainingError: A completion could not be scored, and the policy says ``fail_job``.
    """
    failed = next((reward for reward in group if reward.status == "error"), None)
    if failed is not None and policy.on_error == "fail_job":
        raise TrainingError(
            f"a completion could not be scored, and failure.on_error is fail_job: {failed.message}",
            code="missing_reward",
            param="method.dar.rewards.failure.on_error",
        )
    if failed is not None and policy.on_error == "drop_group":
        return _left_out(
            group, f"another completion of this prompt could not be scored: {failed.message}"
        )
    if isinstance(policy.on_error, FallbackValue):
        group = [
            replace(reward, reward=policy.on_error.fallback_value, is_fallback=True)
            if reward.status == "error"
            else reward
            for reward in group
        ]
    scored = sum(reward.reward is not None for reward in group)
    if scored < min(policy.min_valid, len(group)):
        return _left_out(
            group,
            f"only {scored} of {len(group)} completions of this prompt have a reward, and min_valid is {policy.min_valid}",
        )
    return list(group)


def _left_out(group: Sequence[SampleReward], message: str) -> list[SampleReward]:
    return [_without_reward(reward, message) for reward in group]


def _without_reward(reward: SampleReward, message: str) -> SampleReward:
    if reward.reward is None:
        return reward
    if reward.is_fallback:  # what it stood in for stays to be told
        return replace(reward, reward=None, is_fallback=False)
    return replace(reward, reward=None, status="skip", message=message, zeroed=())
