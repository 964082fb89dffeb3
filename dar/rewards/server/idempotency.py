"""What a reward server remembers: each request is scored once, however often it comes.

A request keeps its id for good, also when a trainer dies and its successor sends it again; then it may have another
``created_at``, deadline and callback token. So two requests with one id are the same where everything else is, and the newest
one says whom to call back and until when.

Everything is kept in this process's memory, within a number of answers and of bytes, and for a time.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from dar.errors import IdempotencyMismatchError, ServiceUnavailableError
from dar.protocol.rewards import Reply, RewardRequest

logger = logging.getLogger(__name__)
LONGEST_RETRY_AFTER = 30.0
"""Seconds; a full queue may be shorter sooner than its mean says."""
_SMOOTHING = 0.2
"""Weight of the newest call in the mean time of a call."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is kept, and how much may wait."""

    max_calls: int
    """Calls in progress at once."""
    max_waiting: int
    """Requests that wait for their call."""
    max_answers: int
    max_bytes: int
    """Of all answers together."""
    seconds: float
    """How long an answer is kept at least its count and bytes allow; longer where its request's deadline is later."""


@dataclass(eq=False, slots=True)
class Entry:
    """One request and its answer."""

    request_id: str
    fingerprint: bytes
    reply: Reply
    """Of the newest request with this id."""
    task: "asyncio.Task[bytes]" = field(init=False)
    is_promised: bool = False
    """A 202 was answered, so whatever happens becomes an answer."""
    is_settled: bool = False
    """The answer was given, or nobody wants it any more."""
    finished_at: float | None = None
    """On the monotonic clock."""
    size: int = 0

    @property
    def is_in_time(self) -> bool:
        """Whether an answer is still read."""
        return datetime.now(UTC) < self.reply.deadline


class Answers:
    """The answers to the newest requests, and the calls that are in progress.

    Args:
        bounds: How much is kept and may wait.
        finished: Told about each entry whose answer is there.
    """

    def __init__(self, bounds: Bounds, finished: Callable[[Entry], None]) -> None:
        self._bounds = bounds
        self._finished = finished
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._slots = asyncio.Semaphore(bounds.max_calls)
        self._in_progress = 0
        self._bytes = 0
        self._mean_seconds: float | None = None

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def find(self, request_id: str) -> Entry | None:
        """The entry of a request, if it is kept."""
        entry = self._entries.get(request_id)
        if entry is not None and self._is_old(entry):
            self._forget(entry)
            return None
        return entry

    def known(self, request: RewardRequest) -> Entry | None:
        """The entry of an earlier request with the same id, which from now on has this one's deadline and callback.

        Raises:
            IdempotencyMismatchError: That one asked something else.
        """
        entry = self.find(request.request_id)
        if entry is None:
            return None
        if entry.fingerprint != fingerprint(request):
            raise IdempotencyMismatchError(
                f"request {request.request_id} came before with other samples, or for another job, component, step or mode; "
                "a webhook-id is good for one request: send another request under a new id"
            )
        entry.reply = request.reply
        return entry

    def start(self, request: RewardRequest, call: Callable[[Entry], Awaitable[bytes]]) -> Entry:
        """Begin to score a request that is not known.

        Args:
            request: The request.
            call: Makes the answer; it runs when its turn has come.

        Raises:
            ServiceUnavailableError: Too many requests wait already.
        """
        if self._in_progress >= self._bounds.max_calls + self._bounds.max_waiting:
            raise ServiceUnavailableError(
                f"{self._in_progress} requests are being scored or wait for it, as many as may",
                code="queue_full",
                retry_after_seconds=self._retry_after(),
            )
        entry = Entry(request.request_id, fingerprint(request), request.reply)
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
            self._entries.pop(entry.request_id, None)  # the next attempt begins anew
            return
        entry.finished_at = time.monotonic()
        entry.size = len(entry.task.result())
        self._bytes += entry.size
        self._entries.move_to_end(entry.request_id)
        self._expire()
        self._finished(entry)

    def _retry_after(self) -> float:
        """When a place may be free: the mean time of a call, over the calls in progress at once."""
        seconds = (self._mean_seconds or 0.0) / self._bounds.max_calls
        return min(max(1.0, seconds), LONGEST_RETRY_AFTER)

    def _expire(self) -> None:
        """Forget what is too old, then what is too much: first what was given, the oldest before."""
        for entry in self:
            if self._is_old(entry):
                self._forget(entry)
        left = [entry for entry in self if entry.finished_at is not None]
        left.sort(key=lambda entry: not entry.is_settled)  # stable: the oldest stays first
        count = len(left)
        for entry in left:
            if count <= self._bounds.max_answers and self._bytes <= self._bounds.max_bytes:
                return
            if not entry.is_settled and entry.is_promised:
                logger.warning(
                    "the answer to %s is forgotten before it was fetched: %d answers of %d bytes are kept, as many as may",
                    entry.request_id, count, self._bytes,
                )  # fmt: skip
            self._forget(entry)
            count -= 1

    def _is_old(self, entry: Entry) -> bool:
        if entry.finished_at is None or entry.is_in_time:
            return False
        return time.monotonic() - entry.finished_at > self._bounds.seconds

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.request_id]
        self._bytes -= entry.size


def fingerprint(request: RewardRequest) -> bytes:
    """SHA-256 of what a request asks: all but when it was made and how it may be answered; the order of keys says nothing."""
    content = request.model_dump(exclude={"created_at", "reply"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
