"""Batches the groups of concurrent calls into requests, and blocks callers while the queue is full.

A request is sent when it is full or has waited ``linger`` for further groups. The queue is bounded,
so that a slow service slows the sampler down instead of filling the memory.
"""

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dar.rewards.base import RewardContext, RewardResult
from dar.rewards.http.wire import ENVELOPE_BYTES, EncodedBatch, EncodedSample

QUEUED_PER_SLOT = 4
"""Queued requests per request that may be in flight."""


@dataclass(slots=True, eq=False)
class Piece:
    """Samples of one call that stay together: a group, or a part of one that exceeds the limits."""

    samples: EncodedBatch
    outcome: "asyncio.Future[dict[str, RewardResult]]"
    task: "asyncio.Task[None] | None" = None
    """The task that sends it; None: its request waits for further groups."""

    @property
    def size(self) -> int:
        """Bytes in the body of a request."""
        return sum(len(sample.json) + 1 for sample in self.samples)


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """Pieces that are sent in one request."""

    context: RewardContext
    pieces: list[Piece] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None
    task: "asyncio.Task[None] | None" = None
    ready_at: float = 0.0
    """When it was ready to be sent, on the clock of the loop."""

    @property
    def samples(self) -> Sequence[EncodedSample]:
        """The samples that a call still waits for, in order."""
        return [
            sample for piece in self.pieces if not piece.outcome.done() for sample in piece.samples
        ]


class Batcher:
    """The queued requests of one component.

    Args:
        send: Sends a request and sets the outcomes of its pieces; runs as a task. It calls
            `leaves_queue` as soon as the request no longer waits.
        max_samples: Returns the current limit of samples in a request.
        max_bytes: Largest body.
        linger_seconds: How long a request that is not full waits for further groups.
        slots: Requests that may be in flight.
        is_merging: Whether groups of several calls may share a request. Which groups share one
            depends on timing, so a process that repeats a step may batch them differently.
    """

    def __init__(
        self,
        send: Callable[[QueuedRequest], Coroutine[Any, Any, None]],
        *,
        max_samples: Callable[[], int],
        max_bytes: int,
        linger_seconds: float,
        slots: int,
        is_merging: bool = True,
    ) -> None:
        self._send = send
        self._max_samples = max_samples
        self._room = max_bytes - ENVELOPE_BYTES
        self._linger = linger_seconds
        self._is_merging = is_merging
        self._places = asyncio.Semaphore(QUEUED_PER_SLOT * slots)
        self._turn = asyncio.Lock()
        self._open: dict[Hashable, QueuedRequest] = {}
        self._waiting: set[QueuedRequest] = set()

    async def put(self, piece: Piece, context: RewardContext) -> None:
        """Add ``piece`` to a request. Waits while the queue is full."""
        async with self._turn:
            request = self._open.get(context)
            if request is not None and not self._fits(request, piece):
                self._flush(request)
                request = None
            if request is None:
                await self._places.acquire()
                request = self._begin(context)
            request.pieces.append(piece)
            request.ids.update(sample.id for sample in piece.samples)
            piece.outcome.add_done_callback(lambda _: self._cancel_if_unused(request))
            is_full = sum(len(part.samples) for part in request.pieces) >= self._max_samples()
            if is_full or not self._is_merging:
                self._flush(request)

    def leaves_queue(self, request: QueuedRequest) -> None:
        """Remove ``request`` from the queue: it has its slot, or needs none."""
        if request in self._waiting:
            self._waiting.remove(request)
            self._places.release()

    def _begin(self, context: RewardContext) -> QueuedRequest:
        request = QueuedRequest(context)
        self._waiting.add(request)
        self._open[context] = request
        loop = asyncio.get_running_loop()
        request.timer = loop.call_later(self._linger, self._flush, request)
        return request

    def _fits(self, request: QueuedRequest, piece: Piece) -> bool:
        samples = sum(len(part.samples) for part in request.pieces) + len(piece.samples)
        size = sum(part.size for part in request.pieces) + piece.size
        is_new = request.ids.isdisjoint(sample.id for sample in piece.samples)
        return is_new and samples <= self._max_samples() and size <= self._room

    def _flush(self, request: QueuedRequest) -> None:
        if self._open.get(request.context) is not request:
            return
        del self._open[request.context]
        if request.timer is not None:
            request.timer.cancel()
        loop = asyncio.get_running_loop()
        request.ready_at = loop.time()
        request.task = loop.create_task(self._run(request))
        for piece in request.pieces:
            piece.task = request.task

    async def _run(self, request: QueuedRequest) -> None:
        try:
            await self._send(request)
        except Exception as error:  # noqa: BLE001 - outermost frame of the task: raised again where a piece is awaited
            _settle(request, error)
        finally:
            self.leaves_queue(request)
            for piece in request.pieces:
                piece.outcome.cancel()

    def _cancel_if_unused(self, request: QueuedRequest) -> None:
        """Cancel ``request`` if no call waits for any of its pieces."""
        if not all(piece.outcome.cancelled() for piece in request.pieces):
            return
        if request.task is not None:
            request.task.cancel()
        elif self._open.get(request.context) is request:
            del self._open[request.context]
            if request.timer is not None:
                request.timer.cancel()
            self.leaves_queue(request)


def _settle(request: QueuedRequest, error: Exception) -> None:
    for piece in request.pieces:
        if not piece.outcome.done():
            piece.outcome.set_exception(error)
            piece.outcome.exception()  # marks it as retrieved: its call may have been cancelled
