"""Rate limits of users and of failing addresses, and recently passed probes, in this process."""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from dar.errors import RateLimitError
from service.store.events import NewEvent

PASSED_SECONDS = 30.0
"""How long a passed probe counts. A sweep submits many jobs with the same reward service."""


class Throttle:
    """A sliding window: at most ``limit`` times in ``seconds`` for each user.

    Each replica counts by itself, so that no shared counter can fail.

    Args:
        limit: Maximum number of times.
        seconds: Length of the window.
        what: Name of the limited action in the error.
    """

    def __init__(self, limit: int, seconds: float, what: str) -> None:
        self._limit = limit
        self._seconds = seconds
        self._what = what
        self._lock = threading.Lock()
        self._taken: dict[str, deque[float]] = {}

    def take(self, who: str) -> None:
        """Count one use.

        Raises:
            RateLimitError: The limit is reached; the error says how long to wait.
        """
        wait = self._wait_or_take(who)
        if wait > 0:
            raise RateLimitError(
                f"at most {self._limit} {self._what} per {self._seconds:g} s; try again in "
                f"{math.ceil(wait)} s",
                retry_after_seconds=math.ceil(wait),
            )

    def try_take(self, who: str) -> bool:
        """Count one use if the limit allows it. Returns whether it did."""
        return self._wait_or_take(who) <= 0

    def _wait_or_take(self, who: str) -> float:
        now = time.monotonic()
        with self._lock:
            for name in [
                n for n, t in self._taken.items() if not t or t[-1] <= now - self._seconds
            ]:
                del self._taken[name]
            taken = self._taken.setdefault(who, deque())
            while taken and taken[0] <= now - self._seconds:
                taken.popleft()
            if len(taken) >= self._limit:
                return taken[0] + self._seconds - now
            taken.append(now)
        return 0.0


class FailureThrottle:
    """Counts failed requests by address. Requests that succeed are never limited.

    Many callers may share an address behind a proxy, so one caller's failures must not block the
    others.

    Args:
        most: Failures of an address within ``seconds`` that are not limited.
        seconds: Length of the window.
        addresses: Maximum number of addresses; the one unseen for longest is dropped first.
        monotonic: Clock; replaced in tests.
    """

    def __init__(
        self,
        most: int = 60,
        seconds: float = 60.0,
        addresses: int = 10_000,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._seconds = seconds
        self._addresses = addresses
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def fail(self, address: str) -> float | None:
        """Count a failure. Returns the seconds to wait if there were too many, else None."""
        now = self._monotonic()
        with self._lock:
            began, count = self._windows.pop(address, (now, 0))
            if now - began >= self._seconds:
                began, count = now, 0
            self._windows[address] = (began, count + 1)
            if len(self._windows) > self._addresses:
                self._windows.popitem(last=False)
        return None if count < self._most else self._seconds - (now - began)


class PassedProbes:
    """Reward services that passed a probe recently. A service that failed is probed each time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}
        self._notices: dict[str, Sequence[NewEvent]] = {}

    def has(self, key: str) -> bool:
        """Whether the service need not be probed again yet."""
        with self._lock:
            return self._until.get(key, 0.0) > time.monotonic()

    def notices(self, key: str) -> Sequence[NewEvent]:
        """Events for a job about the last probe that its service passed."""
        with self._lock:
            return self._notices.get(key, ())

    def add(self, key: str, notices: Sequence[NewEvent] = ()) -> None:
        now = time.monotonic()
        with self._lock:
            self._until = {name: until for name, until in self._until.items() if until > now}
            self._until[key] = now + PASSED_SECONDS
            self._notices = {name: self._notices.get(name, ()) for name in self._until}
            self._notices[key] = notices
