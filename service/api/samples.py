"""Samples of a job."""

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Query

from dar.errors import InvalidRequestError
from dar.protocol.base import MAX_COUNT, Page
from dar.protocol.samples import Sample
from service.api.jobs import PATH
from service.api.paging import MAX_LIMIT, WithRewound, envelope, seconds
from service.http.auth import Reader
from service.runtime import CurrentRuntime
from service.store import jobs, rewinds, samples, tables
from service.store.paging import Slice

router = APIRouter(prefix=PATH, tags=["samples"])
PREFIX = "sample-"


@router.get("/{job_id}/samples", response_model_exclude_defaults=True)
def list_samples(
    job_id: str,
    runtime: CurrentRuntime,
    user: Reader,
    step: Annotated[int | None, Query(ge=1, le=MAX_COUNT)] = None,
    order: Annotated[
        samples.Order, Query(description="By age or value; '-': highest first.")
    ] = "desc",
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 20,
    after: Annotated[
        str | None, Query(description="Id of the last sample of the previous page.")
    ] = None,
    rewound: WithRewound = False,
) -> Page[Sample]:
    """Completions that were kept for viewing, newest first."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        rows = samples.read(
            transaction,
            job.id,
            step=step,
            order=order,
            limit=limit + 1,
            after=_id(after),
            rewound=rewound,
        )
        last = rewinds.last_steps(transaction, job.id)
    found = Slice(rows[:limit], len(rows) > limit)
    return envelope(found, lambda row: show(row, last), lambda sample: sample.id)


def show(row: tables.SampleRow, last_steps: Mapping[int, int]) -> Sample:
    return Sample.model_validate(
        {
            **row.body,
            "id": f"{PREFIX}{row.id}",
            "object": "fine_tuning.job.sample",
            "created_at": seconds(row.created_at),
            "step": row.step,
            "attempt": row.attempt,
            "rewound": rewinds.is_rewound(last_steps, row.attempt, row.step),
        }
    )


def _id(after: str | None) -> int | None:
    if after is None:
        return None
    number = after.removeprefix(PREFIX)
    if not (
        after.startswith(PREFIX) and number.isascii() and number.isdigit() and len(number) < 19
    ):
        raise InvalidRequestError(
            f"after={after!r} is not the id of a sample", param="after", code="invalid_cursor"
        )
    return int(number)
