"""Puts the groups of concurrent calls together into requests, and holds callers back while too many requests wait.

A request is sent when it is full, or when it has waited ``linger`` for further groups. What is waiting is bounded, so that a slow
service slows the sampler down instead of filling the memory.
"""

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dar.rewards.base import RewardContext, RewardResult
from dar.rewards.http.wire import ENVELOPE_BYTES, EncodedBatch, EncodedSample

QUEUED_PER_SLOT = 4
"""Requests that may wait for each one that may be in flight."""


@dataclass(slots=True, eq=False)
class Piece:
    """Samples of one call that are not split: a group, or a part of one that alone is over the limits."""

    samples: EncodedBatch
    outcome: "asyncio.Future[dict[str, RewardResult]]"
    task: "asyncio.Task[None] | None" = None
    """Sends it; None: it still waits for others."""

    @property
    def size(self) -> int:
        """Bytes in a body."""
        return sum(len(sample.json) + 1 for sample in self.samples)


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """Pieces that go out together."""

    context: RewardContext
    pieces: list[Piece] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None
    task: "asyncio.Task[None] | None" = None
    ready_at: float = 0.0
    """When it was full, on the clock of the loop."""

    @property
    def samples(self) -> Sequence[EncodedSample]:
        """All samples, in order, but those that nobody waits for any more."""
        return [
            sample for piece in self.pieces if not piece.outcome.done() for sample in piece.samples
        ]


class Batcher:
    """The requests of one component that are not on their way yet.

    Args:
        send: Sends a request and settles the outcomes of its pieces; runs as a task of its own. It calls `leaves_queue` once
            the request no longer waits.
        max_samples: Most samples in a request, now.
        max_bytes: Largest body.
        linger_seconds: How long a request that is not full waits for more.
        slots: Requests that may be in flight.
        is_merging: Whether groups of several calls may share a request. Which of them do depends on when they come, so that a
            process that begins a step again may put them together otherwise.
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
        """Add ``piece`` to a request; waits while too many requests do."""
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
            piece.outcome.add_done_callback(lambda _: self._abandoned(request))
            is_full = sum(len(part.samples) for part in request.pieces) >= self._max_samples()
            if is_full or not self._is_merging:
                self._flush(request)

    def leaves_queue(self, request: QueuedRequest) -> None:
        """``request`` has got its slot, or will never need one."""
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
        except Exception as error:  # noqa: BLE001 - outermost frame of the task: raised again by whoever waits for a piece
            _settle(request, error)
        finally:
            self.leaves_queue(request)
            for piece in request.pieces:
                piece.outcome.cancel()

    def _abandoned(self, request: QueuedRequest) -> None:
        """Nobody waits for any piece of ``request`` any more: it is not sent, or no longer."""
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
            piece.outcome.exception()  # marked as seen: its caller may have been cancelled meanwhile
