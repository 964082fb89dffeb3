"""Resolves host names in separate threads, as the system's resolver blocks.

The loop's default executor is shared with the rest of the process, and a stuck look-up in it would
keep the process from exiting.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")
RESOLVE_SECONDS = 5.0
"""Time limit of a look-up."""
THREADS = 4
"""Concurrent look-ups; the time that further ones wait counts against their limit."""

_Work = Callable[[], None]
_waiting: "queue.SimpleQueue[_Work]" = queue.SimpleQueue()
_starting = threading.Lock()
_threads: list[threading.Thread] = []


def _work() -> None:
    while True:
        _waiting.get()()


def _ensure_threads() -> None:
    with _starting:
        while len(_threads) < THREADS:
            thread = threading.Thread(target=_work, name="reward-dns", daemon=True)
            thread.start()
            _threads.append(thread)


async def resolve_in_thread(look_up: Callable[[], Value]) -> Value:
    """Call ``look_up`` in a resolver thread. After a cancellation its result is discarded."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Value] = loop.create_future()

    def settle(value: Value | None, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(value)  # type: ignore[arg-type]  # a look-up without an error has a value

    def work() -> None:
        value, error = None, None
        if outcome.cancelled():
            return
        try:
            value = look_up()
        except Exception as failure:  # noqa: BLE001 - outermost frame of the look-up: raised again where it is awaited
            error = failure
        try:
            loop.call_soon_threadsafe(settle, value, error)
        except RuntimeError:
            return  # the loop has ended

    _ensure_threads()
    _waiting.put(work)
    return await outcome
