"""Threads and coroutines: blocking functions from coroutines, and coroutines from blocking code."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from typing import Any, TypeVar

Value = TypeVar("Value")
POLL_SECONDS = 0.05
"""Interval between two checks of ``should_stop``."""
STOP_SECONDS = 1.0
"""How long cancelled requests may take to close their connections."""


class ScoringStoppedError(Exception):
    """``should_stop`` became true; all calls have been cancelled."""


class ExitRequestedError(Exception):
    """Carries what is no Exception past the event loop to the caller's thread.

    The event loop ends at a SystemExit, and takes a CancelledError of a user's function for a
    cancellation of its own.

    Args:
        request: The original exception.
    """

    def __init__(self, request: BaseException) -> None:
        super().__init__(f"{type(request).__name__} was raised")
        self.request = request


def carried(error: BaseException) -> Exception:
    """``error`` as an exception that passes through coroutines and the event loop unchanged."""
    if isinstance(error, StopIteration):  # it would end the generators that it passes through
        plain = RuntimeError("StopIteration was raised: next() found no further item")
        plain.__cause__ = error
        return plain.with_traceback(error.__traceback__)
    if isinstance(error, Exception):
        return error
    carrier = ExitRequestedError(error)
    carrier.__cause__ = error
    return carrier


async def carrying(awaitable: Awaitable[Value]) -> Value:
    """Await a user's code. A cancellation by the caller is raised as such.

    Raises:
        ExitRequestedError: The code raised what is no Exception.
        Exception: The code raised it.
    """
    try:
        return await awaitable
    except Exception:
        raise
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        raise carried(error) from error


async def all_of(coroutines: Iterable[Coroutine[Any, Any, Value]]) -> list[Value]:
    """All results, in order. The first error cancels the others and is raised without its group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


async def wait_for_all(futures: Collection[asyncio.Future[Value]]) -> None:
    """Wait for all; the first error is raised at once.

    Unlike with `asyncio.gather`, a cancellation of the caller does not cancel the futures.
    """
    if futures:
        await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
    for future in futures:
        if future.done():
            future.result()


async def in_daemon_thread(function: Callable[[], Value]) -> Value:
    """Run ``function`` in a thread that delays neither a cancellation nor the end of the process.

    A thread cannot be stopped: after a cancellation it goes on, and its result is discarded.

    Raises:
        ExitRequestedError: ``function`` raised what is no Exception.
        Exception: ``function`` raised it.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    outcome: concurrent.futures.Future[Value] = concurrent.futures.Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # noqa: BLE001 - outermost frame of the thread: raised again where it is awaited
            outcome.set_exception(carried(error))
        if not loop.is_closed():
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=work, name="reward-function", daemon=True).start()
    await ended.wait()
    return outcome.result()


class LoopThread:
    """An event loop in its own thread."""

    def __init__(self) -> None:
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, name="reward-scorer", daemon=True)
        self._thread.start()
        self._started.wait()

    def run(
        self,
        function: Callable[[], Coroutine[Any, Any, Value]],
        should_stop: Callable[[], bool] | None = None,
    ) -> Value:
        """Run the coroutine that ``function`` returns; its exception is raised here.

        Raises:
            ScoringStoppedError: ``should_stop`` became true; the coroutine has ended.
        """
        ended = threading.Event()

        async def guarded() -> Value:
            try:
                return await function()
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(guarded(), self._loop)
        try:
            while not concurrent.futures.wait([future], timeout=POLL_SECONDS).done:
                if should_stop is not None and should_stop():
                    break
            else:
                return future.result()
        except ExitRequestedError as carrier:
            raise carrier.request from None
        finally:
            if future.cancel():
                ended.wait(STOP_SECONDS)
        raise ScoringStoppedError("scoring was stopped; its results are discarded")

    def call(self, function: Callable[[], None]) -> None:
        """Call ``function`` in the loop's thread, after all earlier calls. Does not wait."""
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Stop the loop and its thread."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _main(self) -> None:
        asyncio.run(self._wait())

    async def _wait(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._started.set()
        await self._stop.wait()
