"""How many retries an endpoint gets: a fraction of its first attempts, so that an outage does not multiply the load."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryBudgetOptions:
    """Retries that an endpoint gets within the window."""

    fraction: float = 0.2
    """Of the first attempts."""
    minimum: int = 10
    """However few first attempts there were."""
    window_seconds: float = 60.0


class RetryBudget:
    """Counts first attempts and retries. A retry beyond the budget is not dropped: it waits until an older one is forgotten.

    Args:
        options: The bounds.
        now: Monotonic clock, in seconds.
    """

    def __init__(
        self, options: RetryBudgetOptions, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._options = options
        self._now = now
        self._firsts: deque[float] = deque()
        self._retries: deque[float] = deque()

    def first_attempt(self) -> None:
        """A request is sent for the first time."""
        self._firsts.append(self._now())
        self._forget()

    def reserve(self) -> float:
        """Take a retry; returns the seconds until it is within the budget, 0 for at once."""
        self._forget()
        now = self._now()
        allowed = max(1, self._options.minimum, int(self._options.fraction * len(self._firsts)))
        # Reservations are in order of time, so that the n-th from the end must have left the window.
        due = now
        if len(self._retries) >= allowed:
            due = max(now, self._retries[-allowed] + self._options.window_seconds)
        self._retries.append(due)
        return due - now

    def give_back(self) -> None:
        """The retry reserved last is not made."""
        self._retries.pop()

    def _forget(self) -> None:
        start = self._now() - self._options.window_seconds
        for times in (self._firsts, self._retries):
            while times and times[0] <= start:
                times.popleft()
