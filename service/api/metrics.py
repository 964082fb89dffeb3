"""Metrics of a job, one series for each name."""

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse

from dar.errors import InvalidRequestError
from dar.protocol.base import MAX_COUNT, Page
from dar.protocol.metrics import (
    METRICS,
    JobMetrics,
    MetricName,
    Metrics,
    ReportedMetric,
    current_name,
    describe,
    is_known,
)
from dar.protocol.status import TERMINAL
from service.api.jobs import PATH
from service.api.paging import WithRewound, whole
from service.http import errors
from service.http.auth import Reader
from service.runtime import CurrentRuntime
from service.store import jobs, metric_rollups, metrics
from service.store.database import Transaction
from service.store.tables import JobRow

router = APIRouter(tags=["metrics"])
POLL_MS = 1000
MAX_JOBS = 20
"""Of one comparison."""
MAX_POINTS = 100_000
COMPARED_POINTS = 1000
"""Most points of a series of a comparison that names no number."""
MAX_COMPARED_POINTS = 200_000
"""Most points of a series, times the number of compared jobs."""
LINES = 1000
"""Lines of one part of a text."""
NAMES = (
    "Comma-separated; default: all, by their present names. Until the next release, the earlier "
    "names reward/… and time/reward/… of the metrics reward_requests/… are accepted, and the "
    "response has the series under the name that was sent."
)
POINTS = (
    "Most points of a series. Of a longer one, each bucket of 2, 4, 8, … steps keeps its least and "
    "its greatest value; `resolution` says how many steps a bucket has. With after, the points are "
    "those of all steps from the first new one."
)
Step = Annotated[int | None, Query(ge=0, le=MAX_COUNT)]
Format = Literal["json", "csv", "jsonl"]
COLUMNS = ("name", "step", "value", "at")
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "Nothing is new."}}
TEXTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The series. As csv or jsonl, a line is one point, with name, step, value "
        "and at; the headers x-dar-cursor and x-dar-rewound-to have `cursor` and `rewound_to`.",
        "content": {"text/csv": {}, "application/jsonl": {}},
    }
}


@dataclass(frozen=True, slots=True)
class ChosenPoints:
    """Which points a request asks for."""

    names: Mapping[str, str] | None
    """Present name by the name that was sent."""
    from_step: int | None
    to_step: int | None
    max_points: int | None

    def read(self, transaction: Transaction, job_id: str, after: int = 0) -> metric_rollups.Sampled:
        """The series of a job."""
        names = None if self.names is None else self.names.values()
        if self.max_points is None:
            found = metrics.read(
                transaction,
                job_id,
                names=names,
                after=after,
                from_step=self.from_step,
                to_step=self.to_step,
            )
            return metric_rollups.Sampled(found, 1)
        from_step = self.from_step
        if after:
            first = metrics.first_step_after(transaction, job_id, after)
            if first is None:
                return metric_rollups.Sampled({}, 1)
            from_step = max(first, from_step or 0)
        return metric_rollups.read(
            transaction,
            job_id,
            max_points=self.max_points,
            names=names,
            from_step=from_step,
            to_step=self.to_step,
        )

    def shown(self, series: Mapping[str, metrics.Points]) -> dict[str, dict[str, Any]]:
        """The series under the names that the client sent, sorted."""
        if self.names is not None:
            series = {name: series[now] for name, now in self.names.items() if now in series}
        return {
            name: {"step": points.step, "value": points.value, "at": points.at}
            for name, points in sorted(series.items())
        }


def wanted_series(
    names: Annotated[str | None, Query(description=NAMES)] = None,
    from_step: Step = None,
    to_step: Step = None,
) -> ChosenPoints:
    """The requested series, with all their points.

    Raises:
        InvalidRequestError: There is no such metric, or ``from_step`` is after ``to_step``.
    """
    if from_step is not None and to_step is not None and from_step > to_step:
        raise InvalidRequestError(
            f"from_step {from_step} is after to_step {to_step}; swap them",
            param="from_step",
            code="invalid_range",
        )
    asked = _names(names)
    present = None if asked is None else {name: current_name(name) for name in asked}
    return ChosenPoints(present, from_step, to_step, None)


WantedSeries = Annotated[ChosenPoints, Depends(wanted_series)]


def wanted(
    series: WantedSeries,
    max_points: Annotated[int | None, Query(ge=2, le=MAX_POINTS, description=POINTS)] = None,
) -> ChosenPoints:
    """The requested points."""
    return replace(series, max_points=max_points)


def wanted_of_each(
    series: WantedSeries,
    max_points: Annotated[int, Query(ge=2, le=MAX_POINTS, description=POINTS)] = COMPARED_POINTS,
) -> ChosenPoints:
    """The requested points of each job of a comparison, never all of a long job."""
    return replace(series, max_points=max_points)


WantedPoints = Annotated[ChosenPoints, Depends(wanted)]
PointsOfEach = Annotated[ChosenPoints, Depends(wanted_of_each)]


@router.get("/v1/fine_tuning/metrics/names")
def list_names(_user: Reader) -> Page[MetricName]:
    """Every registered metric, its unit and its meaning."""
    names = [MetricName(name=m.name, unit=m.unit, meaning=m.meaning) for m in METRICS]
    return whole(names, lambda metric: metric.name)


@router.get(
    "/v1/fine_tuning/metrics",
    response_model=Page[JobMetrics],
    responses={**NOT_MODIFIED, **errors.may_answer(404)},
)
def compare_metrics(
    request: Request,
    runtime: CurrentRuntime,
    user: Reader,
    points: PointsOfEach,
    ids: Annotated[str, Query(description=f"Ids of at most {MAX_JOBS} jobs, comma-separated.")],
) -> Response:
    """The metrics of several jobs, in the order of ``ids``."""
    asked = _ids(ids)
    assert points.max_points is not None
    most = MAX_COMPARED_POINTS // len(asked)
    if points.max_points > most:
        raise InvalidRequestError(
            f"max_points is {points.max_points}, but a comparison of {len(asked)} jobs may have "
            f"{most} points of a series; send a smaller number, or fewer ids",
            param="max_points",
            code="too_many_points",
        )
    with runtime.database.read() as transaction:
        found = [jobs.get(transaction, user.project_id, job_id) for job_id in asked]
        states = [(job, metrics.last_id(transaction, job.id)) for job in found]
        tags = ",".join(f"{job.id}:{_tag(job, newest)}" for job, newest in states)
        etag = f'W/"{hashlib.sha256(tags.encode()).hexdigest()[:32]}"'
        if _is_known_tag(request, etag):
            return _not_modified(etag)
        data = []
        for job, newest in states:
            sampled = points.read(transaction, job.id)
            data.append({"job_id": job.id, **_body(job, newest, sampled, points)})
    body = {
        "object": "list",
        "data": data,
        "has_more": False,
        "first_id": data[0]["job_id"],
        "last_id": data[-1]["job_id"],
    }
    return _answer(orjson.dumps(body), "application/json", etag)


@router.get(PATH + "/{job_id}/metrics/names")
def list_reported(job_id: str, runtime: CurrentRuntime, user: Reader) -> Page[ReportedMetric]:
    """The metrics that a job has reported, with unit, meaning and extremes."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        found = metric_rollups.read(transaction, job.id, max_points=2).series
    reported = []
    for metric in (describe(name) for name in sorted(found)):
        values = [value for value in found[metric.name].value if value is not None]
        reported.append(
            ReportedMetric(
                name=metric.name,
                unit=metric.unit,
                meaning=metric.meaning,
                min=min(values, default=None),
                max=max(values, default=None),
            )
        )
    return whole(reported, lambda metric: metric.name)


@router.get(
    PATH + "/{job_id}/metrics",
    response_model=Metrics,
    responses={**TEXTS, **NOT_MODIFIED},
)
def get_metrics(
    job_id: str,
    request: Request,
    runtime: CurrentRuntime,
    user: Reader,
    points: WantedPoints,
    after: Annotated[str | None, Query(description="Cursor of the previous response.")] = None,
    rewound: WithRewound = False,
    format: Annotated[Format, Query(description="Of the response.")] = "json",
) -> Response:
    """The metrics of a job, one series for each name.

    With ``after``, only steps that are new since, replayed ones included.
    """
    if rewound and format != "json":
        raise InvalidRequestError(
            f"rewound cannot be combined with format {format}; ask for json",
            param="rewound",
            code="exclusive_fields",
        )
    behind = _cursor(after)
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        newest = metrics.last_id(transaction, job.id)
        etag = f'W/"{_tag(job, newest)}"'
        if _is_known_tag(request, etag):
            return _not_modified(etag)
        sampled = points.read(transaction, job.id, behind)
        rewound_to = metrics.rewound_to(transaction, job, behind)
        undone = None
        if rewound:
            undone = metrics.read_rewound(
                transaction,
                job.id,
                names=None if points.names is None else points.names.values(),
                from_step=points.from_step,
                to_step=points.to_step,
            )
    body = _body(job, max(newest, behind), sampled, points)
    if rewound_to is not None:
        body["rewound_to"] = rewound_to
    if undone is not None:
        body["rewound"] = [
            {"attempt": attempt, "series": points.shown(series)}
            for attempt, series in undone.items()
        ]
    if format == "json":
        return _answer(orjson.dumps(body), "application/json", etag)
    more = {"x-dar-cursor": body["cursor"]}
    if rewound_to is not None:
        more["x-dar-rewound-to"] = str(rewound_to)
    rows = _rows(body["series"])
    if format == "csv":
        return StreamingResponse(_csv(rows), media_type="text/csv", headers=_headers(etag, more))
    lines = _jsonl(rows)
    return StreamingResponse(lines, media_type="application/jsonl", headers=_headers(etag, more))


def _body(
    job: JobRow, cursor: int, sampled: metric_rollups.Sampled, points: ChosenPoints
) -> dict[str, Any]:
    return {
        "object": "metrics",
        "series": points.shown(sampled.series),
        "cursor": str(cursor),
        "status": job.status,
        "poll_after_ms": 60 * POLL_MS if job.status in TERMINAL else POLL_MS,
        "resolution": sampled.resolution,
    }


def _tag(job: JobRow, newest: int) -> str:
    return f"{newest}-{job.attempt}-{job.status}"


def _is_known_tag(request: Request, etag: str) -> bool:
    """Whether the client has the response already."""
    known = request.headers.get("if-none-match", "")
    return any(one.strip() in {etag, etag.removeprefix("W/"), "*"} for one in known.split(","))


def _not_modified(etag: str) -> Response:
    return Response(status_code=304, headers={"etag": etag})


def _answer(content: bytes, media_type: str, etag: str) -> Response:
    return Response(content, media_type=media_type, headers=_headers(etag, {}))


def _headers(etag: str, more: Mapping[str, str]) -> dict[str, str]:
    return {"etag": etag, "cache-control": "private, no-cache", **more}


Line = tuple[str, int, float | None, float]


def _rows(series: Mapping[str, dict[str, Any]]) -> Iterator[Line]:
    for name, points in series.items():
        for step, value, at in zip(points["step"], points["value"], points["at"], strict=True):
            yield name, step, value, at


def _csv(rows: Iterator[Line]) -> Iterator[bytes]:
    """The lines of a table, in parts."""
    part: Sequence[Sequence[object]] = [COLUMNS]
    while part:
        text = io.StringIO()
        csv.writer(text).writerows(part)
        yield text.getvalue().encode()
        part = list(islice(rows, LINES))


def _jsonl(rows: Iterator[Line]) -> Iterator[bytes]:
    """The points as JSON, in parts."""
    option = orjson.OPT_APPEND_NEWLINE
    while part := list(islice(rows, LINES)):
        yield b"".join(
            orjson.dumps(dict(zip(COLUMNS, row, strict=True)), option=option) for row in part
        )


def _ids(text: str) -> list[str]:
    found = list(dict.fromkeys(one.strip() for one in text.split(",") if one.strip()))
    if not 0 < len(found) <= MAX_JOBS:
        raise InvalidRequestError(
            f"ids: send the ids of 1 to {MAX_JOBS} jobs, separated by commas; these are "
            f"{len(found)}",
            param="ids",
            code="invalid_ids",
        )
    return found


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
