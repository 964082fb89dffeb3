"""Long polls: many waiters, one watcher, and no thread blocked while waiting.

A change in this process wakes its waiters at once. A change in another replica is found by one
query per second for all waiters.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping

import structlog
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from service.background.directives import JobDirective, Received
from service.store import leases, reward_requests
from service.store.database import Database

log = structlog.get_logger()
WATCH_SECONDS = 1.0
NOTHING = Received()


class Notifier:
    """Wakes coroutines that wait for news about a job."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiters: defaultdict[str, dict[asyncio.Event, Received]] = defaultdict(dict)
        # By job; what each waiter has received before.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.is_closing = False
        self.at_release: list[Callable[[], None]] = []
        """Called when the process is about to stop."""

    def start(self) -> None:
        """Start watching on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._watcher = asyncio.create_task(self._watch(), name="notifier")

    def notify(self, job_id: str) -> None:
        """Wake waiters of a job. Thread-safe."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, job_id)

    async def wait(self, job_id: str, seconds: float, *, received: Received = NOTHING) -> None:
        """Wait at most ``seconds`` for changes of a job other than those ``received`` before."""
        if self.is_closing or seconds <= 0:
            return
        news = asyncio.Event()
        self._waiters[job_id][news] = received
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), seconds)
        finally:
            del self._waiters[job_id][news]
            if not self._waiters[job_id]:
                del self._waiters[job_id]

    def release(self) -> None:
        """Wake all waiters, and let later ones return at once: the process is about to stop."""
        self.is_closing = True
        for job_id in list(self._waiters):
            self._wake(job_id)
        for call in self.at_release:
            call()

    async def close(self) -> None:
        self.release()
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher

    def _wake(self, job_id: str) -> None:
        for news in self._waiters.get(job_id, {}):
            news.set()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if not self._waiters:
                continue
            try:
                waiting = {
                    job_id: Received.by_all(received.values())
                    for job_id, received in self._waiters.items()
                }
                for job_id in await run_in_threadpool(self._changed, waiting):
                    self._wake(job_id)
            except SQLAlchemyError as error:
                log.warning("cannot watch for directives", error=str(error))

    def _changed(self, waiting: Mapping[str, Received]) -> list[str]:
        """Jobs with news, given what their waiters have received."""

        def missing(directive: JobDirective) -> list[str]:
            return [job_id for job_id, received in waiting.items() if not received.has(directive)]

        with self._database.read() as transaction:
            changed = leases.changed(
                transaction,
                list(waiting),
                cancel=missing("cancel"),
                pause=missing("pause"),
                drain=missing("drain"),
                stop=missing("stop"),
            )
            newest = reward_requests.newest_results(transaction, list(waiting))
        results = [job for job, number in newest.items() if number > waiting[job].last_result]
        return [*changed, *results]
