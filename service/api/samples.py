"""Samples of a job: listed by step, prompt, reward and flag, or one by its id."""

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Query

from dar.errors import InvalidRequestError, NotFoundError
from dar.protocol.base import MAX_COUNT, Page
from dar.protocol.samples import Sample, SampleFlag, prompt_id_of
from service.api.jobs import PATH
from service.api.paging import MAX_LIMIT, WithRewound, envelope, seconds
from service.http.auth import Reader
from service.runtime import CurrentRuntime
from service.store import jobs, rewinds, samples, tables
from service.store.paging import Slice

router = APIRouter(prefix=PATH, tags=["samples"])
PREFIX = "sample-"
MAX_DIGITS = 19


FLAG = (
    "truncated: the completion reached the longest length; error: its reward failed; skipped: a "
    "source gave none; unscored: it has no reward for any reason."
)
ORDER = (
    "By age or value; '-': highest first. group: by step, newest first, the completions of each "
    "prompt together."
)
Reward = Annotated[float | None, Query(allow_inf_nan=False)]
Number = Annotated[int | None, Query(ge=0, le=MAX_COUNT)]


@router.get("/{job_id}/samples", response_model_exclude_defaults=True)
def list_samples(
    job_id: str,
    runtime: CurrentRuntime,
    user: Reader,
    step: Annotated[int | None, Query(ge=1, le=MAX_COUNT)] = None,
    group: Number = None,
    prompt_id: Annotated[str | None, Query(max_length=24)] = None,
    flag: Annotated[SampleFlag | None, Query(description=FLAG)] = None,
    min_reward: Reward = None,
    max_reward: Reward = None,
    order: Annotated[samples.Order, Query(description=ORDER)] = "desc",
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 20,
    after: Annotated[
        str | None, Query(description="Id of the last sample of the previous page.")
    ] = None,
    rewound: WithRewound = False,
) -> Page[Sample]:
    """Completions that were kept for viewing, newest first."""
    if min_reward is not None and max_reward is not None and min_reward > max_reward:
        raise InvalidRequestError(
            f"min_reward {min_reward:g} is above max_reward {max_reward:g}; swap them",
            param="min_reward",
            code="invalid_range",
        )
    wanted = samples.Wanted(step, group, prompt_id, flag, min_reward, max_reward)
    edge = None if after is None else _id(after)
    if after is not None and edge is None:
        raise InvalidRequestError(
            f"after={after!r} is not the id of a sample", param="after", code="invalid_cursor"
        )
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        rows = samples.read(
            transaction,
            job.id,
            wanted,
            order=order,
            limit=limit + 1,
            after=edge,
            rewound=rewound,
        )
        last = rewinds.last_steps(transaction, job.id)
    found = Slice(rows[:limit], len(rows) > limit)
    return envelope(found, lambda row: show(row, last), lambda sample: sample.id)


@router.get("/{job_id}/samples/{sample_id}")
def get_sample(job_id: str, sample_id: str, runtime: CurrentRuntime, user: Reader) -> Sample:
    """One sample, also of a step that was rewound."""
    number = _id(sample_id)
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        if number is None:
            raise NotFoundError(f"job {job_id} has no sample {sample_id[:40]!r}")
        row = samples.get(transaction, job.id, number)
        last = rewinds.last_steps(transaction, job.id)
    return show(row, last)


def show(row: tables.SampleRow, last_steps: Mapping[int, int]) -> Sample:
    return Sample.model_validate(
        {
            **row.body,
            "id": f"{PREFIX}{row.id}",
            "object": "fine_tuning.job.sample",
            "created_at": seconds(row.created_at),
            "step": row.step,
            "attempt": row.attempt,
            "prompt_id": row.prompt_id or prompt_id_of(row.body["prompt"]),
            "flags": samples.flags(row),
            "rewound": rewinds.is_rewound(last_steps, row.attempt, row.step),
        }
    )


def _id(text: str) -> int | None:
    """The number in the id of a sample; None: it is no such id."""
    number = text.removeprefix(PREFIX)
    is_number = number.isascii() and number.isdigit() and len(number) < MAX_DIGITS
    return int(number) if text.startswith(PREFIX) and is_number else None
