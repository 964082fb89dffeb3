"""Feeds of jobs' events: however many readers a job has, its events are read and rendered once.

A feed holds the newest frames of one job. A commit in this process wakes it at once; events of
another replica are found by one query for all feeds. A reader that is behind what the feed holds
reads the database itself, so that a slow one costs no memory. Whatever happens, a reader gets the
events after its own position in their order, each once: the numbers of events have no gaps, and the
database alone decides what comes next.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import takewhile

import structlog
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from dar.protocol.status import TERMINAL
from dar.protocol.stream import StreamType
from service.store import events, rewinds
from service.store.database import Database
from service.store.tables import JobEventRow, JobRow

log = structlog.get_logger()
HELD_FRAMES = 512
"""Frames that a feed holds."""
PAGE = 200
"""Events that are read at once."""
JOBS_PER_QUERY = 500
POLL_SECONDS = 0.25
"""Between two queries for events of other replicas."""
ALONE_POLL_SECONDS = 2.0
"""The same where there are no other replicas: only a deleted job is found by it."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One rendered event."""

    seq: int
    type: StreamType
    content: bytes


@dataclass(frozen=True, slots=True)
class News:
    """What a reader gets next."""

    frames: Sequence[Frame]
    newest: int
    """The reader's position after these frames."""
    missing: int | None = None
    """The first of the events before these frames that are not stored; None: there are none."""
    is_ended: bool = False
    """Whether the job has ended, or is gone, and has no events after these."""


Render = Callable[[JobEventRow, Mapping[int, int]], bytes]
"""Renders an event, given the last step of each attempt."""


class _Feed:
    """The newest frames of a job: all its events after ``start`` up to ``newest``."""

    def __init__(self, job_id: str, newest: int) -> None:
        self.job_id = job_id
        self.start = self.newest = newest
        self.is_ended = False
        self.frames: deque[Frame] = deque()
        self.readers = 0
        self.is_stale = True
        self.refreshing: asyncio.Task[None] | None = None
        self._waiting: set[asyncio.Future[None]] = set()

    async def wait(self, seconds: float) -> None:
        """Wait for a change. `asyncio.wait` with one future for all takes four times as long."""
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _finish, mine)
        self._waiting.add(mine)
        try:
            await mine
        finally:
            timer.cancel()
            self._waiting.discard(mine)

    def wake(self) -> None:
        waiting, self._waiting = self._waiting, set()
        for one in waiting:
            _finish(one)

    def after(self, seq: int) -> Sequence[Frame]:
        """The held frames after ``seq``. Nearly all readers miss only the last few."""
        return list(takewhile(lambda frame: frame.seq > seq, reversed(self.frames)))[::-1]

    def take(self, news: News) -> None:
        if news.missing is not None:
            self.frames.clear()
            self.start = news.frames[0].seq - 1 if news.frames else news.newest
        self.frames.extend(news.frames)
        self.newest, self.is_ended = news.newest, news.is_ended
        while len(self.frames) > HELD_FRAMES:
            self.start = self.frames.popleft().seq


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class JobFeeds:
    """The feeds of all jobs that somebody reads.

    Args:
        database: Where the events are.
        render: Makes the content of a frame.
    """

    def __init__(self, database: Database, render: Render) -> None:
        self._database = database
        self._render = render
        self._feeds: dict[str, _Feed] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.is_closing = False

    @property
    def readers(self) -> int:
        """How many streams and long polls are open."""
        return sum(feed.readers for feed in list(self._feeds.values()))

    def start(self) -> None:
        """Start watching on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._watcher = asyncio.create_task(self._watch(), name="job feeds")
        self._database.listeners.append(self.notify)

    def notify(self, job_ids: frozenset[str]) -> None:
        """Read the events of these jobs if somebody waits for them. Thread-safe."""
        if self._loop is not None and not self._feeds.keys().isdisjoint(job_ids):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._refresh_all, job_ids)

    def release(self) -> None:
        """End all readers: the process is about to stop. Thread-safe."""
        self.is_closing = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake_all)

    async def close(self) -> None:
        self.release()
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher

    @asynccontextmanager
    async def reader(self, job_id: str, newest: int) -> AsyncIterator["FeedReader"]:
        """A reader of a job's events.

        Args:
            job_id: The job.
            newest: Number of its newest event, as the caller has just read it.
        """
        feed = self._feeds.get(job_id)
        if feed is None:
            feed = self._feeds[job_id] = _Feed(job_id, newest)
        feed.readers += 1
        self._refresh(feed)
        try:
            yield FeedReader(self, feed)
        finally:
            feed.readers -= 1
            if feed.readers == 0 and self._feeds.get(job_id) is feed:
                del self._feeds[job_id]

    def read(self, job_id: str, after: int) -> News:
        """The next events of a job out of the database. It blocks.

        Args:
            job_id: The job.
            after: Number of the last event that the reader has.
        """
        with self._database.read() as transaction:
            # First the job: its events up to ``event_seq`` are then stored, or deleted.
            job = transaction.get(JobRow, job_id)
            if job is None or job.deleted_at is not None:
                return News((), after, is_ended=True)
            rows = events.read_after(transaction, job_id, after, PAGE)
            last = rewinds.last_steps(transaction, job_id) if rows else {}
        frames = [Frame(row.seq, events.stream_type(row), self._render(row, last)) for row in rows]
        is_all = len(rows) < PAGE
        newest = rows[-1].seq if rows else after
        if is_all:
            newest = max(newest, job.event_seq)
        first = rows[0].seq if rows else newest + 1
        is_ended = is_all and job.status in TERMINAL
        return News(frames, newest, after + 1 if first > after + 1 else None, is_ended)

    def _refresh_all(self, job_ids: frozenset[str]) -> None:
        for job_id in job_ids:
            if (feed := self._feeds.get(job_id)) is not None:
                self._refresh(feed)

    def _refresh(self, feed: _Feed) -> None:
        feed.is_stale = True
        if feed.refreshing is None:
            feed.refreshing = asyncio.create_task(self._update(feed), name="job feed")

    async def _update(self, feed: _Feed) -> None:
        try:
            while feed.is_stale:
                feed.is_stale = False
                news = await run_in_threadpool(self.read, feed.job_id, feed.newest)
                is_changed = news.newest > feed.newest or news.is_ended != feed.is_ended
                feed.take(news)
                if is_changed:
                    feed.wake()
                if len(news.frames) == PAGE:
                    feed.is_stale = True
        except (SQLAlchemyError, ValidationError) as error:  # it may be of a later version
            log.warning("cannot read events for streams", job=feed.job_id, error=str(error))
        finally:
            feed.refreshing = None

    def _wake_all(self) -> None:
        for feed in self._feeds.values():
            feed.wake()

    async def _watch(self) -> None:
        pause = POLL_SECONDS if self._database.is_postgresql else ALONE_POLL_SECONDS
        while True:
            await asyncio.sleep(pause)
            every = list(self._feeds)
            for place in range(0, len(every), JOBS_PER_QUERY):
                job_ids = every[place : place + JOBS_PER_QUERY]
                try:
                    found = await run_in_threadpool(self._newest, job_ids)
                except SQLAlchemyError as error:
                    log.warning("cannot watch for events", error=str(error))
                    break
                for job_id in job_ids:
                    feed = self._feeds.get(job_id)
                    # Also after a failed read, whose events nobody announces again.
                    if feed is not None and found.get(job_id) != (feed.newest, feed.is_ended):
                        self._refresh(feed)

    def _newest(self, job_ids: Sequence[str]) -> Mapping[str, tuple[int, bool]]:
        with self._database.read() as transaction:
            found = events.newest_seqs(transaction, job_ids)
        return {job: (seq, status in TERMINAL) for job, (seq, status) in found.items()}


class FeedReader:
    """One reader of a feed."""

    def __init__(self, feeds: JobFeeds, feed: _Feed) -> None:
        self._feeds = feeds
        self._feed = feed

    async def after(self, seq: int, seconds: float) -> News | None:
        """The next events after the one with the number ``seq``.

        Args:
            seq: Of the last event that the reader has.
            seconds: How long to wait for one.

        Returns:
            None: There was none in time, or the process is about to stop.
        """
        feed = self._feed
        if seq >= feed.newest and not feed.is_ended:
            if self._feeds.is_closing:
                return None
            await feed.wait(seconds)
        if seq < feed.start:
            return await run_in_threadpool(self._feeds.read, feed.job_id, seq)
        if seq < feed.newest:
            return News(feed.after(seq), feed.newest, is_ended=feed.is_ended)
        return News((), seq, is_ended=True) if feed.is_ended else None
