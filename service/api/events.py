"""Events of a job: as a list, and as a long poll for those after a number."""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool

from dar.errors import InvalidRequestError
from dar.protocol.base import MAX_COUNT, Page
from dar.protocol.events import Event
from dar.protocol.status import TERMINAL
from dar.protocol.stream import STREAM_TYPES, StreamType
from service.api.jobs import PATH
from service.api.paging import PageCursor, WithRewound, envelope, seconds
from service.http.auth import Reader, User
from service.runtime import CurrentRuntime, Runtime
from service.store import events, jobs, rewinds, tables
from service.store.paging import Cursor, Slice

router = APIRouter(prefix=PATH, tags=["jobs"])
MAX_WAIT_SECONDS = 30
TYPES = (
    "Comma-separated, of status, event, metrics, sample and checkpoint; default: all, but without "
    "after_seq no sample."
)
AFTER_SEQ = (
    "Only events after this number, with order=asc; rewound ones too. With the `seq` of the last "
    "event of each response, a client gets each event once. 0: from the beginning."
)
WAIT = (
    "With after_seq: seconds to wait for an event if there is none yet. A job that has ended is "
    "not waited for."
)


@router.get("/{job_id}/events", response_model_exclude_defaults=True)
async def list_events(
    job_id: str,
    runtime: CurrentRuntime,
    user: Reader,
    cursor: PageCursor,
    rewound: WithRewound = False,
    types: Annotated[str | None, Query(description=TYPES)] = None,
    after_seq: Annotated[int | None, Query(ge=0, le=MAX_COUNT, description=AFTER_SEQ)] = None,
    wait: Annotated[int, Query(ge=0, le=MAX_WAIT_SECONDS, description=WAIT)] = 0,
) -> Page[Event]:
    """Events of a job, newest first; with ``after_seq`` the same as the stream, as a long poll."""
    wanted = None if types is None else types_of(types)
    if after_seq is not None:
        _check_poll(cursor)
        return await _poll(runtime, user, job_id, after_seq, cursor.limit, wanted, wait)
    if wait:
        raise InvalidRequestError(
            "wait needs after_seq, the number of the last event that you have; 0 for none",
            param="wait",
            code="missing_field",
        )
    return await run_in_threadpool(_page, runtime, user, job_id, cursor, rewound, wanted)


def types_of(text: str) -> Sequence[StreamType]:
    """The types that a client has named.

    Raises:
        InvalidRequestError: One does not exist, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in STREAM_TYPES]
    if unknown or not names:
        what = f"there is no type {unknown[0][:40]!r}" if unknown else "no type is named"
        raise InvalidRequestError(
            f"types: {what}; name some of {', '.join(STREAM_TYPES)}",
            param="types",
            code="unknown_type",
        )
    return tuple(name for name in STREAM_TYPES if name in names)


def _check_poll(cursor: Cursor) -> None:
    if cursor.order != "asc" or cursor.after is not None or cursor.before is not None:
        raise InvalidRequestError(
            "after_seq is for order=asc and takes the place of after and before; send "
            "order=asc&after_seq=<seq>",
            param="after_seq",
            code="exclusive_fields",
        )


def _page(
    runtime: Runtime,
    user: User,
    job_id: str,
    cursor: Cursor,
    rewound: bool,
    types: Sequence[StreamType] | None,
) -> Page[Event]:
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        found = events.list_page(
            transaction, job.id, cursor, rewound=rewound, types=types or events.LISTED
        )
        last = rewinds.last_steps(transaction, job.id)
    return envelope(found, lambda event: show(event, last), lambda event: event.id)


async def _poll(
    runtime: Runtime,
    user: User,
    job_id: str,
    after: int,
    limit: int,
    types: Sequence[StreamType] | None,
    wait: int,
) -> Page[Event]:
    end = time.monotonic() + wait

    def read() -> tuple[Page[Event], int, bool]:
        with runtime.database.read() as transaction:
            job = jobs.get(transaction, user.project_id, job_id)
            rows = events.read_after(
                transaction, job.id, after, limit + 1, types=types or STREAM_TYPES
            )
            last = rewinds.last_steps(transaction, job.id)
        found = Slice(rows[:limit], len(rows) > limit)
        page = envelope(found, lambda event: show(event, last), lambda event: event.id)
        return page, job.event_seq, job.status in TERMINAL

    while True:
        page, newest, is_ended = await run_in_threadpool(read)
        left = end - time.monotonic()
        if page.data or is_ended or left <= 0 or runtime.feeds.is_closing:
            return page
        async with runtime.feeds.reader(job_id, newest) as reader:
            await reader.after(newest, left)


def show(event: tables.JobEventRow, last_steps: Mapping[int, int]) -> Event:
    return Event.model_validate(
        {
            "rewound": rewinds.is_rewound(last_steps, event.attempt, event.step),
            "id": event.id,
            "object": "fine_tuning.job.event",
            "created_at": seconds(event.created_at),
            "seq": event.seq,
            "level": event.level,
            "type": "sample" if events.stream_type(event) == "sample" else event.type,
            "message": event.message,
            "data": event.data,
        }
    )
