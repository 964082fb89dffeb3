"""The stream of a job: all its events from any point as server-sent events."""

import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from dar.errors import AuthenticationError, InvalidRequestError, NotFoundError
from dar.protocol.stream import STREAM_TYPES, StreamFrame, StreamGap, StreamType
from service.api import events as events_api
from service.api import jobs as jobs_api
from service.api.jobs import PATH
from service.background.feeds import News
from service.http import auth
from service.http.auth import Reader, User
from service.runtime import CurrentRuntime, Runtime
from service.store import events, jobs, tables

router = APIRouter(prefix=PATH, tags=["jobs"])
PING = b": ping\n"
"""No blank line follows it: OpenAI's decoder would take that for the end of an empty frame."""
PING_SECONDS = 15.0
CHECK_SECONDS = 300.0
"""Time after which the key of an open stream is checked again."""
HEADERS = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
TYPES = (
    "Comma-separated, of status, event, metrics, sample and checkpoint; default: all. A frame that "
    "is left out still has its number."
)
FROM_SEQ = "Number of the first event; default: 1. A Last-Event-ID replaces it."
LAST_EVENT_ID = "Id of the last frame that the client has; the stream continues after it."
MAX_DIGITS = 18


class EventStream(StreamingResponse):
    """Server-sent events."""

    media_type = "text/event-stream"


@router.get("/{job_id}/stream", response_class=EventStream, responses={200: {"model": StreamFrame}})
async def stream_job(
    job_id: str,
    request: Request,
    runtime: CurrentRuntime,
    user: Reader,
    types: Annotated[str | None, Query(description=TYPES)] = None,
    from_seq: Annotated[int, Query(ge=1, lt=10**MAX_DIGITS, description=FROM_SEQ)] = 1,
    last_event_id: Annotated[str | None, Header(description=LAST_EVENT_ID)] = None,
) -> EventStream:
    """All events of a job from any point, and those to come, until the job ends.

    The data of a frame is a `StreamFrame`, its ``id`` the frame's ``seq``, and its ``event`` the
    ``type``. A client whose connection broke sends the last ``id`` as ``Last-Event-ID``, and gets
    each event once. Rewound events are sent too, marked. If events are no longer stored, a frame
    ``gap`` takes their place. After the end of the job come a frame ``done`` and ``data: [DONE]``.
    """
    wanted = STREAM_TYPES if types is None else events_api.types_of(types)
    after = from_seq - 1 if not last_event_id else _position(last_event_id)
    job = await run_in_threadpool(_job, runtime, user, job_id)
    stream = _Stream(runtime, user, request, job_id, frozenset(wanted))
    return EventStream(stream.content(after, job.event_seq), headers=HEADERS)


def render(event: tables.JobEventRow, last_steps: Mapping[int, int]) -> bytes:
    """The frame of an event."""
    kind = events.stream_type(event)
    shown = events_api.show(event, last_steps)
    return _frame(StreamFrame(type=kind, seq=event.seq, event=shown))


def _frame(frame: StreamFrame) -> bytes:
    body = frame.model_dump_json(exclude_defaults=True)
    return f"id: {frame.seq}\nevent: {frame.type}\ndata: {body}\n\n".encode()


def _position(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
        raise InvalidRequestError(
            f"Last-Event-ID {text[:40]!r} is not the id of a frame; send the id of the last frame, "
            "or leave it out",
            param="last-event-id",
            code="invalid_cursor",
        )
    return int(text)


def _job(runtime: Runtime, user: User, job_id: str) -> tables.JobRow:
    with runtime.database.read() as transaction:
        return jobs.get(transaction, user.project_id, job_id)


class _Stream:
    """One client's stream."""

    def __init__(
        self,
        runtime: Runtime,
        user: User,
        request: Request,
        job_id: str,
        types: frozenset[StreamType],
    ) -> None:
        self._runtime = runtime
        self._user = user
        self._request = request
        self._job_id = job_id
        self._types = types
        self._is_whole = len(types) == len(STREAM_TYPES)
        self._checked = time.monotonic()

    async def content(self, after: int, newest: int) -> AsyncIterator[bytes]:
        yield PING  # proxies pass the headers on with the first bytes
        async with self._runtime.feeds.reader(self._job_id, newest) as reader:
            if after > newest:
                # Such a number is of a database that was replaced by an older copy.
                yield self._gap(newest + 1, after, at=newest)
                after = newest
            while await self._may_read():
                news = await reader.after(after, PING_SECONDS)
                if news is None:
                    if self._runtime.feeds.is_closing:
                        return
                    yield PING
                    continue
                if part := self._wanted(news):
                    yield part
                after = news.newest
                if news.is_ended:
                    yield await run_in_threadpool(self._done, after)
                    return

    def _wanted(self, news: News) -> bytes:
        parts = [
            frame.content for frame in news.frames if self._is_whole or frame.type in self._types
        ]
        if news.missing is not None:
            last = news.frames[0].seq - 1 if news.frames else news.newest
            parts.insert(0, self._gap(news.missing, last, at=last))
        return b"".join(parts)

    def _gap(self, first: int, last: int, *, at: int) -> bytes:
        link = f"{PATH}/{self._job_id}"
        gap = StreamGap(from_seq=first, to_seq=last, link=link)
        return _frame(StreamFrame(type="gap", seq=at, gap=gap))

    def _done(self, seq: int) -> bytes:
        try:
            job = jobs_api.show(_job(self._runtime, self._user, self._job_id))
        except NotFoundError:
            job = None
        done = StreamFrame(type="done", seq=seq, job=job)
        body = done.model_dump_json(exclude={"event", "gap"})
        return f"id: {seq}\nevent: done\ndata: {body}\n\ndata: [DONE]\n\n".encode()

    async def _may_read(self) -> bool:
        if time.monotonic() - self._checked < CHECK_SECONDS:
            return True
        self._checked = time.monotonic()
        try:
            found = await run_in_threadpool(auth.principal, self._request, self._runtime)
        except AuthenticationError:
            return False
        except SQLAlchemyError:  # as at the reading of events: the next check may succeed
            return True
        return found.project_id == self._user.project_id and "read" in found.scopes
