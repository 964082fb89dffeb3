"""The metrics of a job: names, units, meanings. The service rejects other names."""

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator

from dar.errors import ConfigurationError
from dar.protocol.base import Output
from dar.protocol.reward_stats import FAMILIES
from dar.protocol.status import JobStatus

Value = TypeVar("Value")


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
        "-mean of weight x policy log-probability over the completions that count; a completion "
        "counts if both it and at least one of the completions that it is compared with have a reward",
    ),
    Metric("dar/rewards_mean", "reward", "mean reward of the step's scored completions"),
    Metric(
        "dar/rewards_std",
        "reward",
        "biased standard deviation of the rewards of the step's scored completions",
    ),
    Metric("dar/advantages_mean", "advantage", "mean advantage after normalisation"),
    Metric("dar/advantages_std", "advantage", "biased standard deviation of the advantages"),
    Metric("dar/weights_mean", "1", "mean clipped weight"),
    Metric("dar/weights_max", "1", "largest clipped weight"),
    Metric(
        "dar/logps_policy",
        "nats",
        "mean log-probability of a completion under the policy, summed over its tokens",
    ),
    Metric(
        "dar/logps_ref",
        "nats",
        "mean log-probability of a completion under the frozen reference, summed over its tokens",
    ),
    Metric(
        "dar/logps_behavior",
        "nats",
        "mean log-probability of a completion under the distribution that sampled it, summed over "
        "its tokens",
    ),
    Metric(
        "dar/entropy",
        "nats per token",
        "mean entropy of the policy's next token at temperature 1, before the step, over the "
        "tokens of the completions that count",
    ),
    Metric("dar/weights_clip_fraction", "fraction", "share of weights at the clip"),
    Metric(
        "dar/preference_margin",
        "nats",
        "preference data: mean of log(policy / reference) of the chosen completion minus that of "
        "the rejected one; without a reference, of log(policy)",
    ),
    Metric(
        "dar/preference_accuracy",
        "fraction",
        "preference data: share of pairs whose margin is above 0",
    ),
    Metric(
        "dar/effective_sample_size",
        "fraction",
        "(sum w)^2 / (n sum w^2): effective share of the completions in the step",
    ),
    Metric(
        "dar/kl_ref",
        "nats",
        "mean over completions of d = behavior minus reference log-probability, which is the "
        "estimator k1 of KL(behavior || reference) of whole completions; at temperature 1 "
        "without filters, behavior is the policy",
    ),
    Metric(
        "dar/kl_ref_k3",
        "nats",
        "mean over completions of exp(-d) - 1 + d, the estimator k3 of the KL divergence that "
        "dar/kl_ref estimates; it is never "
        "negative, and useful only while it is small",
    ),
    Metric(
        "dar/kl_excess",
        "nats",
        "with kl_budget: dar/kl_ref minus the least KL at which the forecast's frontier has the "
        "step's mean reward; near 0, no policy earns as much closer to the reference; absent "
        "where the frontier does not reach that reward",
    ),
    Metric(
        "dar/staleness",
        "steps",
        "optimizer steps between the policy that sampled and the policy that is trained; 0 is "
        "on-policy; absent for stored completions",
    ),
    Metric(
        "rewards/missing_fraction",
        "fraction",
        "share of completions without a reward; they are left out, never counted as 0",
    ),
    Metric(
        "rewards/fallback_fraction",
        "fraction",
        "share of completions that could not be scored and got the job's fallback_value",
    ),
    Metric(
        "rewards/zeroed_fraction",
        "fraction",
        "share of completions whose reward contains a 0 in place of a component that skipped them "
        "(combine.on_partial_skip: zero)",
    ),
    Metric(
        "rewards/zero_variance_fraction",
        "fraction",
        "share of prompts whose rewards are all equal within tie_tolerance, among prompts with at "
        "least two rewards; such prompts give no signal",
    ),
    Metric("reward_requests/n_valid", "completions", "completions of the step with a reward"),
    Metric("reward_requests/n_skip", "completions", "completions to which no reward applies"),
    Metric("reward_requests/n_error", "completions", "completions that could not be scored"),
    *(
        Metric(
            f"reward_requests/n_error/{family}",
            "completions",
            f"completions that could not be scored and whose first failure was of class {family}; "
            "absent when 0",
        )
        for family in FAMILIES
    ),
    Metric(
        "rewards/dropped_groups",
        "prompts",
        "prompts of the step that were left out at first, because too few of their completions had "
        "a reward",
    ),
    Metric(
        "rewards/refilled_groups",
        "prompts",
        "prompts that were left out at first and sampled again (failure.refill of a job)",
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
    Metric("time/sampling_seconds", "s", "part of the step spent sampling"),
    Metric("time/reward_seconds", "s", "part of the step spent only waiting for rewards"),
    Metric(
        "time/reference_seconds",
        "s",
        "part of the step spent in forward passes of the reference, and of the policy where "
        "behavior log-probabilities are unknown",
    ),
    Metric("time/training_seconds", "s", "part of the step spent in forward, backward, optimizer"),
    Metric(
        "time/idle_seconds",
        "s",
        "time since the end of the previous step during which nothing was sampled or trained: "
        "waiting for rewards, checkpoints, evaluation, reports",
    ),
    Metric(
        "time/idle_reward_seconds",
        "s",
        "the same as time/reward_seconds, as a part of the idle time; the rest of a reward's latency overlaps "
        "with sampling and training",
    ),
    Metric(
        "time/idle_generation_seconds",
        "s",
        "part of the sampling time in which the main process waited for the other processes to "
        "sample their prompts",
    ),
    Metric("time/tokens_per_second", "tokens/s", "completion tokens of the step / its wall time"),
)

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
NAMES: frozenset[str] = frozenset(BY_NAME)
COMPONENT_METRICS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "rewards": {
        "mean": ("reward", "mean raw reward of one component"),
        "std": ("reward", "biased standard deviation of one component's raw rewards"),
        "min": ("reward", "lowest raw reward of one component"),
        "max": ("reward", "highest raw reward of one component"),
        "missing_fraction": ("fraction", "share of completions that the component gave no reward for"),
    },
    "reward_requests": {
        "requests": ("requests", "finished requests to a component's service since the last report"),
        "failed_requests": ("requests", "requests to a component's service that failed after all retries"),
        "retries": ("attempts", "attempts beyond the first of each request of a component"),
        "in_flight": ("requests", "largest number of concurrent requests of a component since the last report"),
        "concurrency": ("requests", "limit of a component's concurrent requests"),
        "cached": (
            "completions",
            "completions that were not sent to a component's service: cached, or equal to another one of the step",
        ),
        "cache_hits": ("completions", "completions that were not sent because their reward was cached before the step"),
        "breaker": (
            "state",
            "state of a component's circuit breaker: 0 closed, 1 half-open, 2 open, 3 misconfigured",
        ),
        "p50_seconds": ("s", "median time of a component's requests, over all attempts"),
        "p95_seconds": ("s", "95th percentile of the time of a component's requests, over all attempts"),
    },
}  # fmt: skip
"""Series of each reward component, ``<prefix>/<component>/<last>``: unit and meaning by prefix and
last part."""
EVALUATION = "eval_"
"""Prefix of the names of metrics of the validation file."""


DELIVERY = frozenset(COMPONENT_METRICS["reward_requests"])
"""Last parts of series about reward requests. Like times, they may differ between equal runs."""
RENAMED: Mapping[str, str] = {
    "reward/": "reward_requests/",
    "time/reward/": "reward_requests/",
}
"""Beginnings of names that earlier versions had, and the present ones.

Workers of the previous version may report the old names, stored rows have them, and clients may ask
for them. They are accepted until the next release."""


def is_reproducible(name: str) -> bool:
    """Whether a repeated run of a job gives the same values of this metric."""
    is_delivery = name.startswith("reward_requests/") and name.rpartition("/")[2] in DELIVERY
    return not name.startswith("time/") and not is_delivery


@functools.lru_cache(maxsize=4096)
def current_name(name: str) -> str:
    """The present name of a metric that earlier versions named otherwise; else the same name."""
    bare = name.removeprefix(EVALUATION)
    for old, new in RENAMED.items():
        if bare.startswith(old):
            return name.removesuffix(bare) + new + bare.removeprefix(old)
    return name


def current_values(values: Mapping[str, Value]) -> dict[str, Value]:
    """Values by the present names of their metrics."""
    return {current_name(name): value for name, value in values.items()}


def is_known(name: str) -> bool:
    """Whether this is a metric of training or evaluation, registered or of a reward component.

    Names of earlier versions are known too (`RENAMED`).
    """
    return _found(current_name(name).removeprefix(EVALUATION)) is not None


def describe(name: str) -> Metric:
    """A series of training or evaluation under its present name, with unit and meaning.

    Raises:
        KeyError: There is no such metric.
    """
    name = current_name(name)
    bare = name.removeprefix(EVALUATION)
    found = _found(bare)
    if found is None:
        raise KeyError(name)
    meaning = found.meaning if bare == name else f"on the validation file: {found.meaning}"
    return Metric(name, found.unit, meaning)


def _found(name: str) -> Metric | None:
    """A metric of training by its present name."""
    if name in BY_NAME:
        return BY_NAME[name]
    start, _, rest = name.rpartition("/")
    prefix, _, component = start.rpartition("/")
    of_component = COMPONENT_METRICS.get(prefix, {})
    if not component or rest not in of_component:
        return None
    return Metric(name, *of_component[rest])


class Series(Output):
    """One metric over the job: value i belongs to step i. NaN and infinity are null."""

    step: list[int]
    value: list[float | None]
    at: list[float]
    """Seconds since 1970."""


class SeriesByName(dict[str, Series]):
    """Series by the present names of their metrics; ``series[name]`` takes an earlier name too."""

    def __missing__(self, name: str) -> Series:
        """The series of a metric that was renamed, with a warning.

        Raises:
            KeyError: There is no such series.
        """
        present = current_name(name)
        if present not in self:
            raise KeyError(name)
        warnings.warn(
            f"the metric {name} is named {present} now; the old name will not be found after the "
            "next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return self[present]


class RewoundSeries(Output):
    """What one attempt reported of steps after the checkpoint from which a later one started."""

    attempt: int
    series: dict[str, Series]


class Metrics(Output):
    """Response of ``GET /v1/fine_tuning/jobs/{id}/metrics``."""

    object: Literal["metrics"]
    series: Annotated[dict[str, Series], AfterValidator(SeriesByName)]
    cursor: str
    """Send it as ``after`` to get only newer values."""
    status: JobStatus
    poll_after_ms: int
    """How long to wait before the next poll."""
    rewound_to: int | None = None
    """With ``after``: the step to which an attempt has gone back since that response, if one has;
    later steps of earlier responses do not count any more."""
    rewound: list[RewoundSeries] | None = None
    """Null unless the request has ``rewound=true``."""
    resolution: int = 1
    """With ``max_points``: steps of a bucket, of which a series has the least and the greatest
    value. 1: each step is there."""


class JobMetrics(Metrics):
    """The metrics of one of several jobs that are compared."""

    job_id: str

    def to_pandas(self) -> Any:  # noqa: ANN401 - a DataFrame, where pandas is installed
        """The series as the columns of a `pandas.DataFrame`, one row a step.

        Raises:
            ConfigurationError: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ModuleNotFoundError:
            raise ConfigurationError(
                "to_pandas() needs pandas; install it with `pip install pandas`"
            ) from None
        columns = {
            name: pandas.Series(series.value, index=series.step, dtype="float64")
            for name, series in self.series.items()
        }
        return pandas.DataFrame(columns).rename_axis(index="step")


class MetricName(Output):
    """A registered metric, as the API lists it."""

    name: str
    unit: str
    meaning: str


class ReportedMetric(MetricName):
    """A metric that a job has reported, with its extremes so far."""

    min: float | None
    """Null if it never had a finite value."""
    max: float | None
