"""Asynchronous twins of the SDK's methods: each runs the method itself in a thread of the client.

So there is one implementation, and a twin has its arguments, its answer and its errors. Pauses
between polls need no thread. An open stream has a thread of its own, as it waits most of the time.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from dar.client.paging import Listing
from dar.client.stream import FrameStream
from dar.client.waiting import Following, Pause
from dar.protocol.base import Page

Arguments = ParamSpec("Arguments")
Item = TypeVar("Item")
Kind = TypeVar("Kind")
Result = TypeVar("Result")
THREADS = 32
"""Most requests at the same time of one client, without open streams; more wait for their turn."""


class Threads:
    """Threads in which the requests of one client run.

    Args:
        most: How many.
    """

    def __init__(self, most: int = THREADS) -> None:
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="dar-async-client")

    async def run(self, call: Callable[[], Result]) -> Result:
        """The result of ``call``, without blocking the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def end_with(self, call: Callable[[], None]) -> None:
        """End the threads after the present calls and this one, for which nobody waits."""
        self._pool.submit(call)
        self._pool.shutdown(wait=False)

    def close(self) -> None:
        """End the threads as soon as their calls have returned."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class AsyncResource(Generic[Kind]):
    """The asynchronous twin of a resource.

    Args:
        resource: The resource.
        threads: Threads of the client.
    """

    def __init__(self, resource: Kind, threads: Threads) -> None:
        self._resource = resource
        self._threads = threads


class AsyncListing(Generic[Item]):
    """All items of a list. ``async for`` requests page after page, each time anew."""

    def __init__(self, listing: Listing[Item], threads: Threads) -> None:
        self._listing = listing
        self._threads = threads

    async def page(self, after: str | None = None) -> Page[Item]:
        """One page: the first, or the one after the item with the id ``after``."""
        return await self._threads.run(lambda: self._listing.page(after))

    async def __aiter__(self) -> AsyncIterator[Item]:
        page = await self.page()
        for item in page.data:
            yield item
        while page.has_more and page.last_id is not None:
            page = await self.page(page.last_id)
            for item in page.data:
                yield item


def called(
    method: Callable[Concatenate[Kind, Arguments], Result],
) -> Callable[Concatenate[AsyncResource[Kind], Arguments], Coroutine[Any, Any, Result]]:
    """The twin of a method that makes requests and returns."""

    async def twin(
        self: AsyncResource[Kind], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        return await self._threads.run(lambda: method(self._resource, *args, **kwargs))

    functools.update_wrapper(twin, method)
    return twin


def listed(
    method: Callable[Concatenate[Kind, Arguments], Listing[Item]],
) -> Callable[Concatenate[AsyncResource[Kind], Arguments], AsyncListing[Item]]:
    """The twin of a method that returns a list."""

    def twin(
        self: AsyncResource[Kind], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> AsyncListing[Item]:
        return AsyncListing(method(self._resource, *args, **kwargs), self._threads)

    functools.update_wrapper(twin, method)
    return twin


def followed(
    method: Callable[Concatenate[Kind, Arguments], Following[Item] | Iterator[Item]],
) -> Callable[Concatenate[AsyncResource[Kind], Arguments], AsyncIterator[Item]]:
    """The twin of a method whose items come over time."""

    def twin(
        self: AsyncResource[Kind], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> AsyncIterator[Item]:
        found = method(self._resource, *args, **kwargs)
        if isinstance(found, FrameStream):
            return _streamed(found)
        steps = found.steps() if isinstance(found, Following) else found
        return _items(steps, self._threads)

    functools.update_wrapper(twin, method)
    return twin


async def _streamed(stream: FrameStream) -> AsyncIterator[Any]:
    """The frames of a stream, whose connection ends as soon as the reader leaves."""
    thread = Threads(1)
    try:
        async for frame in _items(stream.steps, thread):
            yield frame
    finally:
        thread.end_with(stream.close)


async def _items(
    steps: Iterator[Item | Pause] | Iterator[Item], threads: Threads
) -> AsyncIterator[Item]:
    while True:
        step = await threads.run(lambda: next(steps, None))  # no item and no pause is None
        if step is None:
            return
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
        else:
            yield step
