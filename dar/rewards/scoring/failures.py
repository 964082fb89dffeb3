"""The failure policy of a job: missing rewards within a group, and the failure budget of the job.

A sample that failed counts against the budget; a skipped one does not.
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
"""Failures that may end without a change of the job."""
KNOWN: dict[str, Family] = {
    "timeout": "timeout", "deadline": "timeout", "http_408": "timeout",
    "connect": "connect", "connect_timeout": "connect", "protocol": "connect", "tls.timeout": "connect", "tls.alert": "connect", "tls.broken": "connect", "breaker_open": "connect",
    "dns": "dns",
    "http_425": "http_429", "http_429": "http_429",
    "nonfinite": "nonfinite", "contract.nonfinite": "nonfinite", "contract.length": "length",
    "callback_late": "callback_late",
}  # fmt: skip
PREFIXES: dict[str, Family] = {
    "http_4": "http_4xx", "http_5": "http_5xx", "tls": "tls", "contract": "contract", "egress": "egress", "dns": "dns",
}  # fmt: skip
REMEMBERED = 64
"""Failures that an error describes."""
SHOWN_IDS = 8
SHOWN_CHARACTERS = 700
_MESSAGE = re.compile(r"component (?P<component>[a-z][a-z0-9_]*): (?P<code>[A-Za-z0-9_.-]+): ")


def family_of(code: str) -> Family:
    """The class of a failure code like ``http_503`` or ``contract.length``."""
    if code in KNOWN:
        return KNOWN[code]
    return next((family for start, family in PREFIXES.items() if code.startswith(start)), "other")


def code_of(result: SampleReward) -> str:
    """The code of a sample's first failure; ``unknown`` if its message has none."""
    found = _MESSAGE.match(result.message or "")
    return found["code"] if found else "unknown"


class FailureBudget:
    """Counts failed samples over a window of groups, and steps without a usable group.

    The budget is exhausted when more samples of the window failed than ``max_failed_fraction`` of a
    *full* window allows; missing groups count as scored. So a single failure at the start of a job
    does not stop it, and a service that always fails does long before the window is full.

    `state` is as of the last `end_step`, like a checkpoint. When the budget is exhausted, counting
    starts again. A job that resumes from a checkpoint has at least half of its budget, so that its
    next failure does not pause it again.

    Args:
        policy: The failure policy of the job.
    """

    def __init__(self, policy: FailurePolicy) -> None:
        self._policy = policy
        self._groups: deque[tuple[int, int]] = deque(maxlen=policy.window_groups)
        self._failed = self._samples = 0
        self._empty_steps = 0
        self._last_step: dict[str, Any] = self._counts()
        self._recent: deque[tuple[str, str | None, str]] = deque(maxlen=REMEMBERED)
        """Code, sample id and message of the newest failures."""

    @property
    def failed_fraction(self) -> float:
        """Share of failed samples in the window, with missing groups counted as scored."""
        if not self._groups:
            return 0.0
        per_group = self._samples / len(self._groups)
        return self._failed / (per_group * self._policy.window_groups)

    def add_group(self, results: Sequence[SampleReward], ids: Sequence[str] = ()) -> None:
        """Count the samples of one prompt.

        Args:
            results: Their rewards, before any is replaced or dropped.
            ids: Their ids, for an error; optional.

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
            self._exhaust(
                f"{self._failed} of the last {self._samples} samples could not be scored, more than "
                f"{self._policy.max_failed_fraction:.3g} of {self._policy.window_groups} groups"
            )

    def end_step(self, usable_groups: int) -> None:
        """Count a finished step.

        Args:
            usable_groups: Groups with enough scored samples to learn from, ties included.

        Raises:
            RewardBudgetError: The last ``max_empty_steps`` steps had none.
        """
        self._empty_steps = 0 if usable_groups else self._empty_steps + 1
        if self._empty_steps >= self._policy.max_empty_steps:
            self._exhaust(
                f"the last {self._empty_steps} steps had no group with enough scored samples to learn from"
            )
        self._last_step = self._counts()

    def state(self) -> dict[str, Any]:
        """The counts as of the last `end_step`, as JSON."""
        return self._last_step

    def _counts(self) -> dict[str, Any]:
        return {"groups": list(map(list, self._groups)), "empty_steps": self._empty_steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a `state`. The oldest failures beyond half of the budget are forgotten."""
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
        self._last_step = self._counts()

    def _forget(self) -> None:
        self._groups.clear()
        self._recent.clear()
        self._failed = self._samples = self._empty_steps = 0
        self._last_step = self._counts()

    def _exhaust(self, why: str) -> None:
        error = budget_error(why, list(self._recent))
        self._forget()
        raise error


def budget_error(why: str, failures: Iterable[tuple[str, str | None, str]]) -> RewardBudgetError:
    """The error that pauses a job.

    Args:
        why: Which limit was exceeded.
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
    """Apply the failure policy to the rewards of a group; a dropped group has none.

    A ``fallback_value`` replaces the reward of each completion that could not be scored: its status
    stays ``error``, and `SampleReward.is_fallback` is set. A skipped completion has no reward.

    A group of one completion is compared with other prompts, so ``min_valid`` does not apply to it.

    Args:
        policy: The failure policy of the job.
        group: Rewards of the K completions of a prompt.

    Raises:
        TrainingError: A completion could not be scored, and ``on_error`` is ``fail_job``.
    """
    failed = next((reward for reward in group if reward.status == "error"), None)
    if failed is not None and policy.on_error == "fail_job":
        raise TrainingError(
            f"a completion could not be scored, and failure.on_error is fail_job: {failed.message}",
            code="missing_reward",
            param="method.dar.rewards.failure.on_error",
        )
    if failed is not None and policy.on_error == "drop_group":
        return _dropped(group, f"another completion of this prompt got no reward: {failed.message}")
    if isinstance(policy.on_error, FallbackValue):
        group = [
            replace(reward, reward=policy.on_error.fallback_value, is_fallback=True)
            if reward.status == "error"
            else reward
            for reward in group
        ]
    scored = sum(reward.reward is not None for reward in group)
    if scored < min(policy.min_valid, len(group)):
        return _dropped(
            group,
            f"only {scored} of {len(group)} completions of this prompt have a reward, and min_valid is {policy.min_valid}",
        )
    return list(group)


def _dropped(group: Sequence[SampleReward], message: str) -> list[SampleReward]:
    return [_without_reward(reward, message) for reward in group]


def _without_reward(reward: SampleReward, message: str) -> SampleReward:
    if reward.reward is None:
        return reward
    if reward.is_fallback:  # status and message of the failure stay
        return replace(reward, reward=None, is_fallback=False)
    return replace(reward, reward=None, status="skip", message=message, zeroed=())
