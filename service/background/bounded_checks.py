"""Checks of other systems that end within a bounded time, whatever these systems do.

A check may hang, as at a frozen database or a lost network drive. Each kind has one thread at a
time, which no request needs, so that neither repeated checks nor a full thread pool hold one up.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

CHECK_SECONDS = 4.0
"""How long a check is waited for; a broken broker takes two seconds to be noticed."""

Check = Callable[[], Mapping[str, str]]
"""Returns ``ok`` or the problem, by the name of what was checked."""


class BoundedChecks:
    """Runs checks, and leaves out those that do not end in time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Future[Mapping[str, str]]] = {}

    async def run(self, checks: Mapping[str, Check]) -> dict[str, str]:
        """What the checks have found within `CHECK_SECONDS`.

        Args:
            checks: By kind. A check of this kind that still runs is waited for instead.
        """
        futures = [asyncio.wrap_future(self._begin(kind, check)) for kind, check in checks.items()]
        done, late = await asyncio.wait(futures, timeout=CHECK_SECONDS)
        for future in late:
            future.add_done_callback(lambda one: one.cancelled() or one.exception())
        found: dict[str, str] = {}
        for future in done:
            found |= future.result()
        return found

    def _begin(self, kind: str, check: Check) -> "Future[Mapping[str, str]]":
        with self._lock:
            running = self._running.get(kind)
            if running is not None and not running.done():
                return running
            future: Future[Mapping[str, str]] = Future()
            self._running[kind] = future
        name = f"check-{kind}"
        threading.Thread(target=_run, args=(future, check), name=name, daemon=True).start()
        return future


def _run(future: "Future[Mapping[str, str]]", check: Check) -> None:
    try:
        future.set_result(check())
    except Exception as error:  # noqa: BLE001 - the request that waits for the check raises it
        future.set_exception(error)
