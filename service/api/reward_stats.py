"""Statistics of a job's rewards, and its failed requests."""

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Query

from dar.protocol.base import MAX_COUNT, Page
from dar.protocol.reward_stats import FAMILIES, ComponentStats, RewardFailure, RewardStats
from service.api.jobs import PATH
from service.api.paging import PageCursor, envelope, seconds
from service.http.auth import Reader
from service.runtime import CurrentRuntime
from service.store import jobs, metrics, reward_failures, rewinds, tables

router = APIRouter(prefix=PATH, tags=["rewards"])
Series = Mapping[str, metrics.Points]


@router.get("/{job_id}/reward_stats")
def get_reward_stats(job_id: str, runtime: CurrentRuntime, user: Reader) -> RewardStats:
    """Count samples that were scored, skipped or failed, and the requests to each service."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        series: Series = metrics.read(transaction, job.id)
        unfinished = metrics.unfinished_step(transaction, job.id)
    steps = series["reward_requests/n_valid"].step if "reward_requests/n_valid" in series else []
    if unfinished is not None and unfinished[0] > max(steps, default=0):
        series = _with_step(series, *unfinished)
    errors = {family: _total(series, f"reward_requests/n_error/{family}") for family in FAMILIES}
    rewards = job.parsed_spec.dar.rewards
    components = () if rewards is None else rewards.components
    return RewardStats(
        object="fine_tuning.job.reward_stats",
        job_id=job.id,
        steps=len(steps),
        rewards=_total(series, "reward_requests/n_valid"),
        skips=_total(series, "reward_requests/n_skip"),
        errors=_total(series, "reward_requests/n_error"),
        errors_by_class={family: count for family, count in errors.items() if count},
        dropped_groups=_total(series, "rewards/dropped_groups"),
        refilled_groups=_total(series, "rewards/refilled_groups"),
        components=[_component(series, one.name) for one in components],
    )


def _component(series: Series, name: str) -> ComponentStats:
    return ComponentStats(
        component=name,
        requests=_total(series, f"reward_requests/{name}/requests"),
        failed_requests=_total(series, f"reward_requests/{name}/failed_requests"),
        retries=_total(series, f"reward_requests/{name}/retries"),
        cached=_total(series, f"reward_requests/{name}/cached"),
        cache_hits=_total(series, f"reward_requests/{name}/cache_hits"),
        p50_seconds=_newest(series, f"reward_requests/{name}/p50_seconds"),
        p95_seconds=_newest(series, f"reward_requests/{name}/p95_seconds"),
    )


def _with_step(series: Series, step: int, values: Mapping[str, float]) -> Series:
    """``series`` with the counts of a step in which training ended."""
    more = {name: series.get(name, metrics.Points()) for name in values}
    return {**series} | {
        name: metrics.Points([*one.step, step], [*one.value, values[name]], [*one.at, 0.0])
        for name, one in more.items()
    }


def _total(series: Series, name: str) -> int:
    points = series.get(name)
    return 0 if points is None else int(sum(value or 0 for value in points.value))


def _newest(series: Series, name: str) -> float | None:
    points = series.get(name)
    return None if points is None else points.value[-1]


@router.get("/{job_id}/reward_failures", response_model_exclude_defaults=True)
def list_reward_failures(
    job_id: str,
    runtime: CurrentRuntime,
    user: Reader,
    cursor: PageCursor,
    step: Annotated[
        int | None, Query(ge=1, le=MAX_COUNT, description="Only failures of this step.")
    ] = None,
    rewound: Annotated[
        bool,
        Query(
            description="Also failures of steps after the checkpoint from which a later attempt "
            "started, which show why the attempt before it has ended."
        ),
    ] = True,
) -> Page[RewardFailure]:
    """List failed requests to reward services, newest first; the newest 10,000 are kept."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        found = reward_failures.list_page(transaction, job.id, step, cursor, rewound=rewound)
        last = rewinds.last_steps(transaction, job.id)
    return envelope(found, lambda row: show(row, last), lambda failure: failure.id)


def show(row: tables.RewardFailureRow, last_steps: Mapping[int, int]) -> RewardFailure:
    return RewardFailure(
        id=row.id,
        object="fine_tuning.job.reward_failure",
        request_id=row.request_id,
        created_at=seconds(row.created_at),
        step=row.step,
        attempt=row.attempt,
        rewound=rewinds.is_rewound(last_steps, row.attempt, row.step),
        component=row.component,
        code=row.code,
        error_class=row.family,
        status=row.status,
        attempts=row.attempts,
        samples=row.samples,
        latency_seconds=row.seconds,
        quote=row.quote,
    )
