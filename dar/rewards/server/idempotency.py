"""Scores each request once, however often it is sent, and keeps the answers for a while.

A request keeps its id, even if a trainer dies and another one sends it again. ``created_at``,
deadline and callback token may then differ. So two requests with one id are the same if everything
else is equal, and the newest one sets callback and deadline.

Answers are kept in memory; their number, bytes and age are limited.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from dar.errors import IdempotencyMismatchError, ServiceUnavailableError
from dar.protocol.rewards import Reply, RewardRequest
from dar.rewards.server.options import CheckedOptions

logger = logging.getLogger(__name__)
LONGEST_RETRY_AFTER = 30.0
"""Seconds; the mean time of a call may overestimate the wait."""
_SMOOTHING = 0.2
"""Weight of the newest call in the mean time of a call."""


@dataclass(eq=False, slots=True)
class Entry:
    """One request and its answer."""

    request_id: str
    fingerprint: bytes
    reply: Reply
    """Callback and deadline of the newest request with this id."""
    ends_at: float
    """That deadline on the monotonic clock."""
    task: "asyncio.Task[bytes]" = field(init=False)
    is_promised: bool = False
    """A 202 was sent, so a failure must become a result too."""
    is_settled: bool = False
    """The answer was sent, or can no longer be delivered."""
    finished_at: float | None = None
    """When its answer was ready, on the monotonic clock."""
    size: int = 0

    def take_over(self, request: RewardRequest) -> None:
        """Use callback and deadline of a newer request with the same id."""
        self.reply, self.ends_at = request.reply, _ends_at(request)

    @property
    def is_in_time(self) -> bool:
        """Whether the deadline has not passed."""
        return self.remaining_seconds > 0

    @property
    def remaining_seconds(self) -> float:
        """Time until the deadline; negative after it."""
        return self.ends_at - time.monotonic()


class Answers:
    """The kept answers, and the calls in progress.

    Args:
        options: Limits of the kept answers and the waiting requests.
        calls: Most calls at once.
        finished: Called with each entry that has its answer.
    """

    def __init__(
        self, options: CheckedOptions, calls: int, finished: Callable[[Entry], None]
    ) -> None:
        self._options = options
        self._calls = calls
        self._finished = finished
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._slots = asyncio.Semaphore(calls)
        self._in_progress = 0
        self._bytes = 0
        self._mean_seconds: float | None = None

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def find(self, request_id: str) -> Entry | None:
        """The entry of a request; None if there is none."""
        entry = self._entries.get(request_id)
        if entry is not None and self._is_old(entry):
            self._delete(entry)
            return None
        return entry

    def known(self, request: RewardRequest) -> Entry | None:
        """The entry of an earlier request with the same id; it takes over deadline and callback.

        Raises:
            IdempotencyMismatchError: The earlier request had other content.
        """
        entry = self.find(request.request_id)
        if entry is None:
            return None
        if entry.fingerprint != fingerprint(request):
            raise IdempotencyMismatchError(
                f"request {request.request_id} came before with other samples, or for another job, "
                "component, step or mode; send another request under a new id"
            )
        entry.take_over(request)
        return entry

    def start(self, request: RewardRequest, call: Callable[[Entry], Awaitable[bytes]]) -> Entry:
        """Start to score a new request.

        Args:
            request: The request.
            call: Computes the answer; it may have to wait for other calls.

        Raises:
            ServiceUnavailableError: Too many requests are waiting.
        """
        if self._in_progress >= self._calls + self._options.max_waiting:
            raise ServiceUnavailableError(
                f"{self._in_progress} requests are being scored or waiting, which is the limit",
                code="queue_full",
                retry_after_seconds=self._retry_after(),
            )
        entry = Entry(request.request_id, fingerprint(request), request.reply, _ends_at(request))
        self._in_progress += 1
        entry.task = asyncio.create_task(self._run(entry, call))
        entry.task.add_done_callback(lambda _: self._done(entry))
        self._entries[entry.request_id] = entry
        return entry

    async def _run(self, entry: Entry, call: Callable[[Entry], Awaitable[bytes]]) -> bytes:
        async with self._slots:
            started = time.monotonic()
            try:
                return await call(entry)
            finally:
                seconds = time.monotonic() - started
                mean = seconds if self._mean_seconds is None else self._mean_seconds
                self._mean_seconds = mean + _SMOOTHING * (seconds - mean)

    def _done(self, entry: Entry) -> None:
        self._in_progress -= 1
        if entry.task.cancelled() or entry.task.exception() is not None:
            self._entries.pop(entry.request_id, None)  # a retry calls the function again
            return
        entry.finished_at = time.monotonic()
        entry.size = len(entry.task.result())
        self._bytes += entry.size
        self._entries.move_to_end(entry.request_id)
        self._expire()
        self._finished(entry)

    def _retry_after(self) -> float:
        """The mean time of a call, divided by the number of concurrent calls."""
        seconds = (self._mean_seconds or 0.0) / self._calls
        return min(max(1.0, seconds), LONGEST_RETRY_AFTER)

    def _expire(self) -> None:
        """Delete old answers, then those beyond the limits: sent ones first, oldest first."""
        for entry in self:
            if self._is_old(entry):
                self._delete(entry)
        left = [entry for entry in self if entry.finished_at is not None]
        left.sort(key=lambda entry: not entry.is_settled)  # stable: the oldest stays first
        count = len(left)
        for entry in left:
            if count <= self._options.max_answers and self._bytes <= self._options.max_answer_bytes:
                return
            if not entry.is_settled and entry.is_promised:
                logger.warning(
                    "the answer to %s is deleted before it was fetched: "
                    "the %d kept answers of %d bytes exceed a limit",
                    entry.request_id,
                    count,
                    self._bytes,
                )
            self._delete(entry)
            count -= 1

    def _is_old(self, entry: Entry) -> bool:
        if entry.finished_at is None or entry.is_in_time:
            return False
        return time.monotonic() - entry.finished_at > self._options.remembered_seconds

    def _delete(self, entry: Entry) -> None:
        del self._entries[entry.request_id]
        self._bytes -= entry.size


def _ends_at(request: RewardRequest) -> float:
    """The deadline of a request on the monotonic clock.

    Both of its instants are by the clock of the trainer's machine, which may differ from this one.
    """
    return time.monotonic() + (request.reply.deadline - request.created_at).total_seconds()


def fingerprint(request: RewardRequest) -> bytes:
    """SHA-256 of a request without ``created_at`` and ``reply``, whatever the order of its keys."""
    content = request.model_dump(exclude={"created_at", "reply"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
