"""Metrics of a job, one series for each name."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request, Response

from dar.errors import InvalidRequestError
from dar.protocol.base import MAX_COUNT, Page
from dar.protocol.metrics import METRICS, MetricName, Metrics, current_name, is_known
from dar.protocol.status import TERMINAL
from service.api.jobs import PATH
from service.api.paging import WithRewound, whole
from service.http.auth import Reader
from service.runtime import CurrentRuntime
from service.store import jobs, metrics

router = APIRouter(tags=["metrics"])
POLL_MS = 1000
NAMES = (
    "Comma-separated; default: all, by their present names. Until the next release, the earlier "
    "names reward/… and time/reward/… of the metrics reward_requests/… are accepted, and the "
    "response has the series under the name that was sent."
)
Step = Annotated[int | None, Query(ge=0, le=MAX_COUNT)]


@router.get("/v1/fine_tuning/metrics/names")
def list_names(_user: Reader) -> Page[MetricName]:
    """Every registered metric, its unit and its meaning."""
    names = [MetricName(name=m.name, unit=m.unit, meaning=m.meaning) for m in METRICS]
    return whole(names, lambda metric: metric.name)


@router.get(
    PATH + "/{job_id}/metrics",
    response_model=Metrics,
    responses={304: {"description": "Nothing is new."}},
)
def get_metrics(
    job_id: str,
    request: Request,
    runtime: CurrentRuntime,
    user: Reader,
    names: Annotated[str | None, Query(description=NAMES)] = None,
    after: Annotated[str | None, Query(description="Cursor of the previous response.")] = None,
    from_step: Step = None,
    to_step: Step = None,
    rewound: WithRewound = False,
) -> Response:
    """The metrics of a job, one series for each name.

    With ``after``, only steps that are new since, replayed ones included.
    """
    if from_step is not None and to_step is not None and from_step > to_step:
        raise InvalidRequestError(
            f"from_step {from_step} is after to_step {to_step}; swap them",
            param="from_step",
            code="invalid_range",
        )
    asked, behind = _names(names), _cursor(after)
    wanted = None if asked is None else {name: current_name(name) for name in asked}
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        newest = metrics.last_id(transaction, job.id)
        etag = f'W/"{newest}-{job.attempt}-{job.status}"'
        if etag == request.headers.get("if-none-match"):
            return Response(status_code=304, headers={"etag": etag})
        series = metrics.read(
            transaction,
            job.id,
            names=None if wanted is None else wanted.values(),
            after=behind,
            from_step=from_step,
            to_step=to_step,
        )
        rewound_to = metrics.rewound_to(transaction, job, behind)
        undone = None
        if rewound:
            undone = metrics.read_rewound(
                transaction,
                job.id,
                names=None if wanted is None else wanted.values(),
                from_step=from_step,
                to_step=to_step,
            )
    body: dict[str, Any] = {
        "object": "metrics",
        "series": _named(series, wanted),
        "cursor": str(max(newest, behind)),
        "status": job.status,
        "poll_after_ms": 60 * POLL_MS if job.status in TERMINAL else POLL_MS,
    }
    if rewound_to is not None:
        body["rewound_to"] = rewound_to
    if undone is not None:
        body["rewound"] = [
            {"attempt": attempt, "series": _named(points, wanted)}
            for attempt, points in undone.items()
        ]
    headers = {"etag": etag, "cache-control": "private, no-cache"}
    return Response(orjson.dumps(body), media_type="application/json", headers=headers)


def _named(
    series: Mapping[str, metrics.Points], wanted: Mapping[str, str] | None
) -> dict[str, dict[str, Any]]:
    """The series under the names that the client sent, sorted."""
    if wanted is not None:
        series = {name: series[present] for name, present in wanted.items() if present in series}
    return {name: asdict(points) for name, points in sorted(series.items())}


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not is_known(name):
            raise InvalidRequestError(
                f"names: there is no metric {name!r}; GET /v1/fine_tuning/metrics/names lists "
                "the existing ones",
                param="names",
                code="unknown_metric",
            )
    return names


def _cursor(text: str | None) -> int:
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidRequestError(
            "after: send the cursor of an earlier response, or leave it out",
            param="after",
            code="invalid_cursor",
        )
    return int(text)
