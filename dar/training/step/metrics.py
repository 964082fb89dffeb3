"""Metrics and samples of a step. Names, units and meanings: `dar.protocol.metrics`."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dar.protocol.metrics import current_values
from dar.protocol.samples import ReportedSample
from dar.rewards.scoring.step_report import (
    StepObserver,
    StepRequests,
    component_rewards,
    sample_metrics,
)
from dar.training.config.config import DARConfig
from dar.training.loss import MAX_LOG_WEIGHT, dar_loss, effective_sample_size
from dar.training.report.drift import DriftWatch
from dar.training.report.sink import Sink
from dar.training.step.degenerate import DegenerateWatch
from dar.training.step.learning import LearningWatch
from dar.training.step.records import ScoredStep

SHOWN_CHARACTERS = 8192
"""Longest text of a reported prompt or completion."""


def step_metrics(step: ScoredStep) -> dict[str, float]:
    """Metrics of one step, without those that have no value because nothing was scored.

    Args:
        step: After its training pass.
    """
    rewards = [reward.reward for reward in step.rewards if reward.reward is not None]
    lengths = [len(pair.completion_ids) for pair in step.pairs]
    fallbacks = sum(reward.is_fallback for reward in step.rewards)
    zeroed = sum(bool(reward.zeroed) for reward in step.rewards)
    cut = sum(reason == "length" for reason in step.finish_reasons)
    values = {
        "rewards/missing_fraction": 1 - len(rewards) / len(step.pairs),
        "rewards/fallback_fraction": fallbacks / len(step.pairs),
        "rewards/zeroed_fraction": zeroed / len(step.pairs),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/truncated_fraction": cut / len(lengths),
        "rewards/dropped_groups": step.dropped_count,
        "rewards/refilled_groups": step.refilled_count,
        **sample_metrics(step.rewards),
    }
    if step.staleness is not None:
        values["dar/staleness"] = step.staleness
    if step.group_count:
        values["rewards/zero_variance_fraction"] = step.tied_count / step.group_count
    if rewards:
        values |= _moments("dar/rewards", torch.tensor(rewards, dtype=step.advantages_B.dtype))
    if step.valid_count:
        values |= _weight_metrics(step)
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _weight_metrics(step: ScoredStep) -> dict[str, float]:
    rows = step.valid_rows
    weights, policy = step.weights_B[rows], step.policy_logps_B[rows]
    behavior = step.behavior_logps_B[rows]
    values = {
        "dar/loss": dar_loss(weights, policy).item(),
        **_moments("dar/advantages", step.advantages_B[rows]),
        "dar/weights_mean": weights.mean().item(),
        "dar/weights_max": weights.max().item(),
        "dar/logps_policy": policy.mean().item(),
        "dar/logps_behavior": behavior.mean().item(),
        "dar/entropy": step.entropies_B[rows].sum().item() / step.tokens,
        "dar/weights_clip_fraction": step.clipped_B[rows].float().mean().item(),
        "dar/effective_sample_size": effective_sample_size(weights).item(),
    }
    if step.ref_logps_B is not None:
        reference = step.ref_logps_B[rows]
        values["dar/logps_ref"] = reference.mean().item()
        values |= _divergences(reference - behavior)
    return values | _preferences(step)


def _preferences(step: ScoredStep) -> dict[str, float]:
    """By how much the policy prefers chosen completions to rejected ones, over pairs that count.

    As in DPO, a completion is measured against the reference, if there is one.
    """
    starts = step.starts
    pairs = [
        (starts[p], starts[p] + 1)
        for p, prompt in enumerate(step.prompts)
        if prompt.is_preference and step.valid_B[starts[p] : starts[p + 1]].all()
    ]
    if not pairs:
        return {}
    gains_B = step.policy_logps_B
    if step.ref_logps_B is not None:
        gains_B = gains_B - step.ref_logps_B
    chosen, rejected = map(list, zip(*pairs, strict=True))
    margins = gains_B[chosen] - gains_B[rejected]
    return {
        "dar/preference_margin": margins.mean().item(),
        "dar/preference_accuracy": (margins > 0).float().mean().item(),
    }


def _divergences(log_ratios: Tensor) -> dict[str, float]:
    """KL(behavior || reference) of whole completions, estimated on the sampled ones.

    Both estimators are unbiased. k3 is never negative, and it varies less while the two are close
    but explodes when they are not.

    Args:
        log_ratios: log(reference / behavior) of each completion.
    """
    ratios = log_ratios.clamp(max=MAX_LOG_WEIGHT).exp()
    return {
        "dar/kl_ref": -log_ratios.mean().item(),
        "dar/kl_ref_k3": (ratios - 1 - log_ratios).mean().item(),
    }


def _moments(name: str, values: Tensor) -> dict[str, float]:
    return {f"{name}_mean": values.mean().item(), f"{name}_std": values.std(unbiased=False).item()}


def sample_rows(step: ScoredStep) -> list[ReportedSample]:
    """All completions of the step, with everything that decided their weight."""
    places = step.places
    return [
        ReportedSample(
            group=places[row][0],
            index=places[row][1],
            prompt=step.prompts[places[row][0]].text[:SHOWN_CHARACTERS],
            completion=step.texts[row][:SHOWN_CHARACTERS],
            finish_reason=step.finish_reasons[row],
            completion_tokens=len(step.pairs[row].completion_ids),
            reward=step.rewards[row].reward,
            reward_status=step.rewards[row].status,
            reward_message=step.rewards[row].message,
            components=dict(step.rewards[row].components),
            feedback=dict(step.rewards[row].feedback),
            advantage=_where_valid(step, step.advantages_B, row),
            weight=_where_valid(step, step.weights_B, row),
            logp_policy=_where_valid(step, step.policy_logps_B, row),
            logp_ref=_where_valid(step, step.ref_logps_B, row),
            logp_behavior=step.behavior_logps_B[row].item(),
        )
        for row in range(len(step.texts))
        if step.behavior_logps_B[row].isfinite()
    ]


def _where_valid(step: ScoredStep, values_B: Tensor | None, row: int) -> float | None:
    if values_B is None or not step.valid_B[row]:
        return None
    return values_B[row].item()


class MetricsWindow:
    """Metrics since the last report: means over steps, sums of counts, extremes, last counters."""

    LAST = frozenset({"train/learning_rate", "train/epoch", "train/tokens"})
    SUMS = "reward_requests/n_"
    """Prefix of the names of counts."""
    EXTREMES: Mapping[str, Callable[[float, float], float]] = {
        "dar/weights_max": max,
        "completions/max_length": max,
        "completions/min_length": min,
    }

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, float]) -> None:
        """Add the metrics of a step."""
        for name, value in values.items():
            if name in self.LAST:
                self._sums[name], self._counts[name] = value, 1
            elif name.startswith(self.SUMS):
                self._sums[name], self._counts[name] = self._sums.get(name, 0.0) + value, 1
            elif extreme := self._extreme(name):
                self._sums[name] = extreme(value, self._sums.get(name, value))
                self._counts[name] = 1
            else:
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    def _extreme(self, name: str) -> Callable[[float, float], float] | None:
        of_component = {"min": min, "max": max}.get(name.rpartition("/")[2])
        return self.EXTREMES.get(name) or of_component

    def take(self) -> dict[str, float]:
        """The values of the window; it is empty afterwards."""
        values = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return values

    def state(self) -> dict[str, Any]:
        """What was added since the last report, as JSON."""
        return {"sums": self._sums, "counts": self._counts}

    def restore(self, state: dict[str, Any]) -> None:
        # a checkpoint of an earlier version has other names
        self._sums = current_values(state["sums"])
        self._counts = current_values(state["counts"])


class Reporter:
    """Collects the metrics of steps, and sends a report when one is due.

    Args:
        config: The arguments of the run.
    """

    def __init__(self, config: DARConfig) -> None:
        self._window = MetricsWindow()
        self._started = 0.0
        self._ended: float | None = None
        self._tokens = 0
        self._drift = DriftWatch()
        self._watches: dict[str, DegenerateWatch | LearningWatch] = {
            "degenerate": DegenerateWatch(config),
            "learning": LearningWatch(config),
        }
        self._last: ScoredStep | None = None
        self.observer: StepObserver | None = None
        """Counts the requests to reward services, if there are any."""
        self.reported: dict[str, float] = {}
        """The last report."""

    @property
    def is_due(self) -> bool:
        """Whether a step has ended since the last report."""
        return self._last is not None

    def begin_step(self) -> None:
        """Start to measure the time of a step."""
        self._started = time.monotonic()

    def end_step(
        self, step: ScoredStep, *, grad_norm: float, learning_rate: float
    ) -> dict[str, float]:
        """Add a step after its optimizer step; returns its times."""
        self._tokens += step.tokens
        self._last = step
        times = self._times(step)
        self._window.add(
            step_metrics(step)
            | times
            | {
                "train/learning_rate": learning_rate,
                "train/epoch": step.epoch,
                "train/tokens": float(self._tokens),
            }
            # not finite where a scaled float16 gradient overflowed
            | ({"train/grad_norm": grad_norm} if math.isfinite(grad_norm) else {})
        )
        return times

    def note(self, values: dict[str, float]) -> None:
        """Add further metrics of the last step."""
        self._window.add(values)

    def warn_of(
        self, step: ScoredStep, sink: Sink, *, last_step: int, learning_rate: float
    ) -> None:
        """Warn of rewards that no source returned, that have jumped, or that have no effect."""
        count = len(step.rewards)
        if fallbacks := sum(reward.is_fallback for reward in step.rewards):
            sink.event(
                "warn",
                f"step {step.number}: {fallbacks} of {count} completions could not be scored and "
                "count with the job's fallback_value",
                {"kind": "reward_fallback", "step": step.number, "count": fallbacks},
            )
        zeroed = Counter(name for reward in step.rewards for name in reward.zeroed)
        for name, found in sorted(zeroed.items()):
            sink.event(
                "warn",
                f"step {step.number}: reward component {name} skipped {found} of {count} "
                "completions and counts as 0 for them (combine.on_partial_skip)",
                {"kind": "reward_zeroed", "step": step.number, "component": name, "count": found},
            )
        for name, values in component_rewards(step.rewards).items():
            if values and (drift := self._drift.add(name, values)):
                sink.event("warn", drift.message, drift.data(step.number))
        for watch in self._watches.values():
            for message, data in watch.add(step, last_step, learning_rate=learning_rate):
                sink.event("warn", message, data)

    def _times(self, step: ScoredStep) -> dict[str, float]:
        now = time.monotonic()
        elapsed = now - self._started
        between_steps = 0.0 if self._ended is None else self._started - self._ended
        self._ended = now
        return {f"time/{name}_seconds": seconds for name, seconds in step.seconds.items()} | {
            "time/training_seconds": elapsed - sum(step.seconds.values()),
            "time/step_seconds": elapsed,
            "time/idle_seconds": between_steps + step.seconds.get("reward", 0.0),
            "time/idle_reward_seconds": step.seconds.get("reward", 0.0),
            "time/idle_generation_seconds": step.idle_generation_seconds,
            "time/tokens_per_second": int(step.lengths.sum()) / elapsed,
        }

    def report(self, sink: Sink, number: int) -> dict[str, float]:
        """Report the metrics since the last report, and samples of the last step."""
        assert self._last is not None
        requests = self.observer.take() if self.observer else StepRequests()
        self.reported = {**self._window.take(), **requests.metrics}
        sink.metrics(number, self.reported)
        _send_requests(sink, number, requests)
        if self.observer is not None:
            self.observer.end_step(number)
        samples = sample_rows(self._last)
        if samples:
            sink.samples(number, samples)
        self._last = None
        return self.reported

    def report_requests(self, sink: Sink, number: int) -> None:
        """Report the requests since the last report, which belong to an unfinished step."""
        if self.observer is not None:
            _send_requests(sink, number, *self.observer.take_unfinished())

    def state(self) -> dict[str, Any]:
        """Counters, and what was added since the last report, as JSON."""
        return {
            "tokens": self._tokens,
            "window": self._window.state(),
            "drift": self._drift.state(),
            **{name: watch.state() for name, watch in self._watches.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._tokens = state["tokens"]
        self._window.restore(state["window"])
        if "drift" in state:
            self._drift.restore(state["drift"])
        for name, watch in self._watches.items():
            if name in state:
                watch.restore(state[name])


def _send_requests(
    sink: Sink, number: int, found: StepRequests, unfinished: Mapping[str, float] | None = None
) -> None:
    if found.requests:
        sink.rewards(number, found.requests, found.failures, unfinished)
