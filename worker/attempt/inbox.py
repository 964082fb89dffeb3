"""Asynchronous rewards in the trainer: notes go out on a pipe, results come in on stdin.

The trainer has no credentials for the service. Its supervisor calls the service for it
(`worker.supervisor.reward_bridge`).
"""

import asyncio
import contextlib
import os
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from dar.protocol.worker import RewardAnnouncement
from dar.rewards.http.async_results import Stored
from worker.launch import RewardNews, RewardNote

Wake = Callable[[], None]
Value = TypeVar("Value")


class PipeInbox:
    """The inbox of `dar.rewards.http.async_results` over the supervisor; thread-safe.

    Args:
        descriptor: Write end of the pipe to the supervisor.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._stored: dict[str, Stored] = {}
        self._results: dict[str, bytes] = {}
        # Requests whose result is still needed; results for others are dropped.
        self._open: set[str] = set()
        # Announcements without a reply yet. Each gets one reply, in their order, even when its
        # caller no longer waits.
        self._unanswered: Counter[str] = Counter()
        self._waiters: defaultdict[str, set[Wake]] = defaultdict(set)
        self._unsent: queue.SimpleQueue[RewardNote] = queue.SimpleQueue()
        threading.Thread(target=self._write, name="reward-notes", daemon=True).start()

    def deliver(self, news: RewardNews) -> None:
        """Take news about a request; called by the thread that reads stdin."""
        with self._lock:
            state = news.state
            if state is not None and self._is_wanted(news.request_id):
                self._stored[news.request_id] = Stored(
                    state.callback_url,
                    datetime.fromtimestamp(state.deadline, UTC),
                    state.is_accepted,
                    state.poll_url,
                    None if state.result is None else state.result.encode(),
                    state.problem,
                    state.seconds,
                )
            if news.result is not None and news.request_id in self._open:
                self._results[news.request_id] = news.result.encode()
            waiters = list(self._waiters.get(news.request_id, ()))
        for wake in waiters:
            wake()

    async def announce(self, request: RewardAnnouncement) -> Stored:
        """Make the service store a request, and wait until it is stored."""
        request_id = request.request_id
        with self._lock:
            self._results.pop(request_id, None)
            self._open.add(request_id)
            self._unanswered[request_id] += 1
        note = RewardNote(request_id=request_id, announcement=request, said_at=datetime.now(UTC))
        self._unsent.put(note)
        stored: Stored | None = None
        try:
            stored = await self._arrival(self._stored, request_id)
        finally:
            if stored is None or stored.result is not None:
                self._settle(request_id)
        return stored

    async def wait(self, request_id: str) -> bytes:
        """Wait without limit for the result that is posted for a request."""
        try:
            return await self._arrival(self._results, request_id)
        finally:
            self._settle(request_id)

    async def problem(self, request: RewardAnnouncement) -> str | None:
        """Ask the service, by the same announcement, why no callback was accepted."""
        try:
            return (await self.announce(request)).problem
        finally:
            self._settle(request.request_id)

    def accepted(self, request_id: str, poll_url: str | None) -> None:
        """Make the service store that the reward service accepted the request."""
        self._unsent.put(RewardNote(request_id=request_id, state="accepted", poll_url=poll_url))

    def close(self, request_id: str) -> None:
        """Make the service reject further callbacks for the request."""
        self._settle(request_id)
        self._unsent.put(RewardNote(request_id=request_id, state="closed"))

    def _settle(self, request_id: str) -> None:
        with self._lock:
            self._open.discard(request_id)
            self._results.pop(request_id, None)
            self._stored.pop(request_id, None)

    def _is_wanted(self, request_id: str) -> bool:
        """Count a reply to an announcement.

        Returns:
            Whether it replies to the last announcement, and its caller still waits.
        """
        self._unanswered[request_id] -= 1
        if self._unanswered[request_id] > 0:
            return False
        del self._unanswered[request_id]
        return request_id in self._open

    async def _arrival(self, arrived: dict[str, Value], request_id: str) -> Value:
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(news.set)

        with self._lock:
            self._waiters[request_id].add(wake)
        try:
            while True:
                with self._lock:
                    if request_id in arrived:
                        return arrived.pop(request_id)
                await news.wait()
                news.clear()
        finally:
            with self._lock:
                self._waiters[request_id].discard(wake)
                if not self._waiters[request_id]:
                    del self._waiters[request_id]

    def _write(self) -> None:
        while True:
            rest = memoryview(f"{self._unsent.get().model_dump_json()}\n".encode())
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:  # the supervisor is dead, and the end of stdin ends this process
                return
