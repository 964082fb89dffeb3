"""Groups being scored, in an event loop beside the thread that samples and trains."""

import asyncio
import functools
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from dar.errors import RewardContractError
from dar.protocol.spec import TrainingOrder
from dar.rewards.base import Failed, RewardContext, RewardResult, RewardSample, RewardSource, Scored
from dar.rewards.threads import (
    POLL_SECONDS,
    STOP_SECONDS,
    ExitRequestedError,
    LoopThread,
    ScoringStoppedError,
    all_of,
    carried,
)

if TYPE_CHECKING:
    from dar.rewards.scoring.combine import Results

MOST_UNDER_WAY = 4096
"""`InFlight.submit` blocks while this many groups are being scored."""


class Ticket:
    """A group of samples that was submitted to the sources.

    Args:
        samples: The group.
        context: Context of its samples.
    """

    def __init__(self, samples: Sequence[RewardSample], context: RewardContext) -> None:
        self.samples = tuple(samples)
        self.context = context
        self.done_at: float | None = None
        """When all sources had answered or one had raised an error, by `time.monotonic`."""
        self.answered_at: dict[str, float] = {}
        """When each source answered, by its name and `time.monotonic`."""
        self.results: Results = {}
        self.error: BaseException | None = None
        self.place = -1
        """Position in the order of completion."""
        self.is_complete = False
        """Whether all groups of its step have been submitted."""
        self.whole: dict[str, asyncio.Future[list[RewardResult]]] = {}
        """Results for this group from sources that take whole steps, by name."""


def takes_whole_steps(source: RewardSource) -> bool:
    """Whether a source takes all samples of a step in one call, like local functions and models."""
    return bool(getattr(source, "takes_whole_steps", False))


def checked(
    name: str, results: list[RewardResult], samples: Sequence[RewardSample]
) -> list[RewardResult]:
    """Check the results of a source: one per sample; numbers that are not finite become failures.

    Raises:
        RewardContractError: The number of results is wrong.
    """
    if len(results) != len(samples):
        raise RewardContractError(
            f"reward component {name} returned {len(results)} results for {len(samples)} samples",
            code="contract.length",
        )
    return [
        Failed("nonfinite", f"the reward is {result.reward}", is_transient=False)
        if isinstance(result, Scored) and not math.isfinite(result.reward)
        else result
        for result in results
    ]


class InFlight:
    """The calls of the sources that have not finished.

    Args:
        sources: Each scores every group.
        loop: Runs the calls.
    """

    def __init__(self, sources: Sequence[RewardSource], loop: LoopThread) -> None:
        self._sources = tuple(sources)
        self._loop = loop
        self._changed = threading.Condition()
        self._running = 0
        self._done_count = 0
        self._error: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # used by the loop's thread alone
        self._turns: dict[str, asyncio.Lock] = {}

    def submit(self, ticket: Ticket, should_stop: Callable[[], bool] | None = None) -> None:
        """Start scoring a group. Waits only while too many groups are being scored.

        Raises:
            ScoringStoppedError: ``should_stop`` became true.
            Exception: A source raised it for another group, so that sampling can end early.
        """
        self._raise(self._error)
        self._wait_for(lambda: self._running < MOST_UNDER_WAY, should_stop)
        with self._changed:
            self._running += 1
        self._loop.call(lambda: self._start(self._score(ticket)))

    def complete(self, tickets: Sequence[Ticket]) -> None:
        """Mark these as all groups of a step: sources that take whole steps are called now."""
        new = [ticket for ticket in tickets if not ticket.is_complete]
        for ticket in new:
            ticket.is_complete = True
        for source in self._sources if new else ():
            if takes_whole_steps(source):
                self._loop.call(functools.partial(self._start_whole, source, new))

    def next_of(
        self,
        tickets: Sequence[Ticket],
        order: TrainingOrder,
        should_stop: Callable[[], bool] | None = None,
    ) -> Ticket:
        """Wait for one of ``tickets``. An error of any of them is raised at once.

        Raises:
            ScoringStoppedError: ``should_stop`` became true; all calls are cancelled.
            Exception: A source raised it.
        """

        def is_ready() -> bool:
            done = [ticket for ticket in tickets if ticket.done_at is not None]
            return (
                tickets[0].done_at is not None
                or (order == "completion" and bool(done))
                or any(ticket.error is not None for ticket in done)
            )

        self._wait_for(is_ready, should_stop)
        done = sorted((t for t in tickets if t.done_at is not None), key=lambda t: t.place)
        for ticket in done:
            self._raise(ticket.error)
        return tickets[0] if order == "fixed" else done[0]

    def _raise(self, error: BaseException | None) -> None:
        if error is None:
            return
        self._error = None
        if isinstance(error, ExitRequestedError):
            raise error.request from None
        raise error

    def cancel(self) -> None:
        """Cancel all calls, and wait until they have ended, for at most a second."""
        self._loop.run(self._cancel_all)

    def _wait_for(
        self, is_ready: Callable[[], bool], should_stop: Callable[[], bool] | None
    ) -> None:
        while True:
            with self._changed:
                if is_ready() or self._changed.wait_for(is_ready, POLL_SECONDS):
                    return
            if should_stop is not None and should_stop():
                self.cancel()
                raise ScoringStoppedError("scoring was stopped; its results are discarded")

    # --- in the loop's thread ---------------------------------------------------------------------

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start_whole(self, source: RewardSource, tickets: Sequence[Ticket]) -> None:
        self._start(self._score_whole(source, tickets))

    async def _score(self, ticket: Ticket) -> None:
        loop = asyncio.get_running_loop()
        for source in self._sources:
            if takes_whole_steps(source):
                ticket.whole[source.name] = loop.create_future()
        try:
            answers = await all_of(self._score_one(source, ticket) for source in self._sources)
            names = [source.name for source in self._sources]
            ticket.results = dict(zip(names, answers, strict=True))
        except BaseException as error:  # outermost frame of the task: raised again in `next_of`
            ticket.error = error
            if isinstance(error, asyncio.CancelledError):
                raise
            self._error = self._error or error
        finally:
            with self._changed:
                ticket.place = self._done_count
                ticket.done_at = time.monotonic()
                self._done_count += 1
                self._running -= 1
                self._changed.notify_all()

    async def _score_one(self, source: RewardSource, ticket: Ticket) -> list[RewardResult]:
        if source.name in ticket.whole:
            results = await ticket.whole[source.name]
        else:
            found = await source.score(ticket.samples, ticket.context)
            results = checked(source.name, found, ticket.samples)
        ticket.answered_at[source.name] = time.monotonic()
        return results

    async def _score_whole(self, source: RewardSource, tickets: Sequence[Ticket]) -> None:
        samples = [sample for ticket in tickets for sample in ticket.samples]
        waiting = [ticket.whole[source.name] for ticket in tickets]
        try:
            async with self._turns.setdefault(source.name, asyncio.Lock()):
                found = await source.score(samples, tickets[0].context)
            results = iter(checked(source.name, found, samples))
        except asyncio.CancelledError:
            for future in waiting:
                future.cancel()
            raise
        except BaseException as error:  # noqa: BLE001 - outermost frame of the task: set on the waiting futures
            for future in waiting:
                if not future.done():
                    future.set_exception(carried(error))
            return
        for ticket, future in zip(tickets, waiting, strict=True):
            own = [next(results) for _ in ticket.samples]
            if not future.done():
                future.set_result(own)

    async def _cancel_all(self) -> None:
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_SECONDS)
