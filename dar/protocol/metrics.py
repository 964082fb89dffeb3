"""The metrics of a job: every name, its unit and its meaning. A trainer may send no other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dar.protocol.base import Output
from dar.protocol.reward_stats import FAMILIES
from dar.protocol.status import JobStatus


@dataclass(frozen=True, slots=True)
class Metric:
    """A registered series."""

    name: str
    unit: str
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric(
        "dar/loss",
        "nats",
        "-mean over the completions that count of weight x policy log-probability; a completion counts when it is scored and so "
        "is another one that it is compared with",
    ),
    Metric("dar/rewards_mean", "reward", "mean reward of the step's scored completions"),
    Metric("dar/rewards_std", "reward", "biased standard deviation of those rewards"),
    Metric("dar/advantages_mean", "advantage", "mean advantage after normalisation"),
    Metric("dar/advantages_std", "advantage", "biased standard deviation of the advantages"),
    Metric("dar/weights_mean", "1", "mean clipped weight"),
    Metric("dar/weights_max", "1", "largest clipped weight"),
    Metric(
        "dar/logps_policy",
        "nats",
        "mean log-probability of a completion under the policy, summed over its tokens",
    ),
    Metric("dar/logps_ref", "nats", "the same under the frozen reference"),
    Metric("dar/logps_behavior", "nats", "the same under the distribution that sampled it"),
    Metric(
        "dar/entropy",
        "nats per token",
        "mean entropy of the policy's next token at temperature 1, before the step, over the tokens of the completions that count",
    ),
    Metric("dar/weights_clip_fraction", "fraction", "share of weights held at the clip"),
    Metric(
        "dar/effective_sample_size",
        "fraction",
        "(sum w)^2 / (n sum w^2): share of the completions that carries the step",
    ),
    Metric(
        "dar/kl_ref",
        "nats",
        "mean over completions of d = behavior less reference log-probability (the estimator k1 of KL(behavior || reference) of whole "
        "completions); sampled at temperature 1 without filters, behavior is the policy",
    ),
    Metric(
        "dar/kl_ref_k3",
        "nats",
        "mean over completions of exp(-d) - 1 + d (the estimator k3 of the same): never negative, but of use only while it is small",
    ),
    Metric(
        "dar/staleness",
        "steps",
        "optimizer steps between the policy that sampled and the one that is trained; 0: on-policy; none for stored completions",
    ),
    Metric(
        "rewards/missing_fraction",
        "fraction",
        "share of completions without a reward; they are left out, never counted as 0",
    ),
    Metric(
        "rewards/fallback_fraction",
        "fraction",
        "share of completions that could not be scored and whose reward is the job's fallback_value",
    ),
    Metric(
        "rewards/zeroed_fraction",
        "fraction",
        "share of completions in whose reward a component counts as 0 that skipped them (combine.on_partial_skip: zero)",
    ),
    Metric(
        "rewards/zero_variance_fraction",
        "fraction",
        "share of prompts whose rewards are all equal, within tie_tolerance, among those with at least two; they tell nothing",
    ),
    Metric("reward/n_valid", "completions", "completions of the step with a reward"),
    Metric("reward/n_skip", "completions", "completions to which no reward applies"),
    Metric("reward/n_error", "completions", "completions that could not be scored"),
    *(
        Metric(
            f"reward/n_error/{family}",
            "completions",
            f"those whose first failure was of class {family}; left out where there are none",
        )
        for family in FAMILIES
    ),
    Metric(
        "rewards/dropped_groups",
        "prompts",
        "prompts of the step that were left out at first, as fewer than two of their completions had a reward",
    ),
    Metric(
        "rewards/refilled_groups",
        "prompts",
        "how many of these were sampled once more (failure.refill of a job)",
    ),
    Metric("completions/mean_length", "tokens", "mean completion length"),
    Metric("completions/min_length", "tokens", "shortest completion"),
    Metric("completions/max_length", "tokens", "longest completion"),
    Metric(
        "completions/truncated_fraction",
        "fraction",
        "share of completions cut off at max_new_tokens or max_length",
    ),
    Metric("train/learning_rate", "1", "learning rate of the step"),
    Metric("train/grad_norm", "1", "gradient norm before clipping"),
    Metric("train/epoch", "epochs", "passes over the training file so far"),
    Metric("train/tokens", "tokens", "completion tokens trained on so far"),
    Metric("time/step_seconds", "s", "wall time of the whole step"),
    Metric("time/sampling_seconds", "s", "part of it spent sampling"),
    Metric(
        "time/reward_seconds",
        "s",
        "part of it spent waiting for rewards, with nothing else to do",
    ),
    Metric(
        "time/reference_seconds",
        "s",
        "part of it spent in forward passes of the reference, and of the policy where behavior log-probabilities are unknown",
    ),
    Metric("time/training_seconds", "s", "part of it spent in forward, backward and optimizer"),
    Metric(
        "time/idle_seconds",
        "s",
        "time since the end of the step before in which the policy was neither sampled from nor trained: waiting for rewards, and "
        "what lay between the steps (checkpoints, evaluation, reports)",
    ),
    Metric(
        "time/idle_reward_seconds",
        "s",
        "part of the idle time that was spent waiting for rewards; the rest of a reward's latency is hidden behind sampling and "
        "training (overlap)",
    ),
    Metric(
        "time/idle_generation_seconds",
        "s",
        "part of the sampling time in which the main process waited until the others had sampled their prompts",
    ),
    Metric("time/tokens_per_second", "tokens/s", "completion tokens of the step / its wall time"),
)

NAMES: frozenset[str] = frozenset(metric.name for metric in METRICS)
COMPONENT_METRICS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "rewards": {
        "mean": ("reward", "mean raw reward of one component"),
        "std": ("reward", "biased standard deviation of those rewards"),
        "min": ("reward", "the lowest of them"),
        "max": ("reward", "the highest of them"),
        "missing_fraction": ("fraction", "share of completions that the component gave no reward for"),
    },
    "reward": {
        "requests": ("requests", "finished requests to a component's service since the last report"),
        "failed_requests": ("requests", "those that were given up"),
        "retries": ("attempts", "attempts beyond the first of each"),
        "in_flight": ("requests", "most of its requests that were under way at once since the last report"),
        "concurrency": ("requests", "most that may be under way at once"),
        "cached": (
            "completions",
            "completions that a component's service was not asked about: remembered, or equal to another one of the step",
        ),
        "cache_hits": ("completions", "those that were remembered from before"),
        "breaker": ("state", "its circuit breaker: 0 closed, 1 half-open, 2 open, 3 misconfigured"),
    },
    "time/reward": {
        "p50_seconds": ("s", "median time of a component's requests, over all attempts"),
        "p95_seconds": ("s", "95th percentile of the same"),
    },
}  # fmt: skip
"""``<prefix>/<component>/<last>``: unit and meaning of the series that each reward component has, by prefix and last part."""
EVALUATION = "eval_"
"""What the names of metrics begin with that were reached on the validation file."""


DELIVERY = (
    "requests", "failed_requests", "retries", "in_flight", "concurrency", "cached", "cache_hits", "breaker",
)  # fmt: skip
"""Last parts of the series that tell how rewards were fetched: like those of time, they may differ between equal runs."""


def is_reproducible(name: str) -> bool:
    """Whether a run of the same job gives the same values of ``name`` again."""
    is_delivery = name.startswith("reward/") and name.rpartition("/")[2] in DELIVERY
    return not name.startswith("time/") and not is_delivery


def is_known(name: str) -> bool:
    """Whether ``name`` is a registered metric or one of a reward component, of training or of an evaluation."""
    name = name.removeprefix(EVALUATION)
    if name in NAMES:
        return True
    start, _, rest = name.rpartition("/")
    prefix, _, component = start.rpartition("/")
    return bool(component) and rest in COMPONENT_METRICS.get(prefix, {})


class Series(Output):
    """One metric over the job: the i-th value was reached at the i-th step. A value that is no number is null."""

    step: list[int]
    value: list[float | None]
    at: list[float]
    """Seconds since 1970."""


class Metrics(Output):
    """Answer of ``GET /v1/fine_tuning/jobs/{id}/metrics``."""

    object: Literal["metrics"]
    series: dict[str, Series]
    cursor: str
    """Send it as ``after`` to get only what is new."""
    status: JobStatus
    poll_after_ms: int
    """When the next poll makes sense."""


class MetricName(Output):
    """A registered metric as the API lists it."""

    name: str
    unit: str
    meaning: str
