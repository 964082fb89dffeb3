"""Retries of reward requests: which failures, when, and how many per endpoint.

The package stamina is not used: it reports every retry through a process-wide list of hooks,
which print to stdout if structlog is installed, and stdout belongs to the user's script.
"""

import random
import re
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

from dar.protocol.reward_spec import RewardRetry

FailureKind = Literal["transient", "contract", "name", "refused", "too_large", "permanent"]
"""How a failed attempt is handled.

- ``transient``: retried up to the configured number of attempts
- ``contract``: the answer breaks the contract; retried once
- ``name``: the host name does not exist; retried twice, then permanent
- ``refused``: the service rejects these samples; not retried
- ``too_large``: retried in halves
- ``permanent``: only a change of the configuration helps
"""
RETRIES: dict[FailureKind, int | None] = {
    "transient": None,
    "contract": 1,
    "name": 2,
    "refused": 0,
    "too_large": 0,
    "permanent": 0,
}
"""Retries of each kind; None: as many as configured."""

# Not the module's functions: the process-wide generator decides what a seeded trainer samples next.
JITTER = random.SystemRandom()


class AttemptFailedError(Exception):
    """One attempt at a request failed.

    Args:
        kind: How it is handled.
        code: Machine-readable reason, like ``timeout``, ``http_503`` or ``contract.length``.
        reason: Description. It may be logged, so it contains nothing of the answer.
        quote: Start of the answer, for the owner of the job only.
        retry_after_seconds: From the ``Retry-After`` header.
        status: HTTP status; None: no answer arrived.
        is_final: Whether it is not retried, whatever its kind.
    """

    def __init__(
        self,
        kind: FailureKind,
        code: str,
        reason: str,
        *,
        quote: str = "",
        retry_after_seconds: float | None = None,
        status: int | None = None,
        is_final: bool = False,
    ) -> None:
        super().__init__(reason)
        self.kind = kind
        self.code = code
        self.reason = reason
        self.quote = quote
        self.retry_after_seconds = retry_after_seconds
        self.status = status
        self.is_final = is_final

    @property
    def holds_back_all(self) -> bool:
        """Whether its ``Retry-After`` applies to every request to the service."""
        return self.status in {429, 503} and self.retry_after_seconds is not None

    @property
    def full_reason(self) -> str:
        """The reason and the quote."""
        return f"{self.reason}: {self.quote}" if self.quote else self.reason


@dataclass(frozen=True, slots=True)
class RetryBudgetOptions:
    """Limits on the retries of an endpoint within the window."""

    fraction: float = 0.2
    """Retries per first attempt."""
    minimum: int = 10
    """Retries that are always allowed."""
    window_seconds: float = 60.0


class RetryBudget:
    """Limits retries to a fraction of first attempts, so that an outage does not multiply the load.

    A retry beyond the budget is not dropped: it waits until an older one leaves the window.

    Args:
        options: The limits.
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
        """Count a request that is sent for the first time."""
        self._firsts.append(self._now())
        self._prune()

    def reserve(self) -> float:
        """Reserve a retry. Returns the seconds to wait before it is within the budget."""
        self._prune()
        now = self._now()
        allowed = max(1, self._options.minimum, int(self._options.fraction * len(self._firsts)))
        # Reservations are ordered by time: the `allowed`-th from the end must have left the window.
        due = now
        if len(self._retries) >= allowed:
            due = max(now, self._retries[-allowed] + self._options.window_seconds)
        self._retries.append(due)
        return due - now

    def give_back(self) -> None:
        """Cancel the last reservation."""
        self._retries.pop()

    def _prune(self) -> None:
        start = self._now() - self._options.window_seconds
        for times in (self._firsts, self._retries):
            while times and times[0] <= start:
                times.popleft()


class RetrySchedule:
    """The attempts of one request: how many are left, and the wait before the next.

    Args:
        options: The component's retry settings.
        deadline_seconds: Time for all attempts and waits, from now.
        on_wait: Called with the failure, the number of the next attempt and the seconds before it.
        budget: Budget of the endpoint; None: no limit.
    """

    def __init__(
        self,
        options: RewardRetry,
        deadline_seconds: float,
        on_wait: Callable[[AttemptFailedError, int, float], None],
        budget: RetryBudget | None = None,
    ) -> None:
        self._options = options
        self._ends_at = time.monotonic() + deadline_seconds
        self._on_wait = on_wait
        self._budget = budget
        self._failures: Counter[FailureKind] = Counter()
        self._attempts_before = 0

    @property
    def remaining_seconds(self) -> float:
        """Time until the deadline; negative after it."""
        return self._ends_at - time.monotonic()

    @property
    def attempt(self) -> int:
        """Number of the current attempt, from 1."""
        return self._failures.total() + 1

    def extend(self, seconds: float) -> None:
        """Move the deadline back by a wait that does not count."""
        self._ends_at += seconds

    def end_by(self, seconds: float) -> None:
        """Move the deadline forward, to at most so many seconds from now."""
        self._ends_at = min(self._ends_at, time.monotonic() + seconds)

    def next_request(self, wait: float) -> bool:
        """Start a further request after ``wait`` seconds; False: no attempt is left."""
        self._attempts_before += self.attempt
        self._failures.clear()
        return self._attempts_before < self._options.attempts and self.remaining_seconds > wait

    def pause(self, made: int) -> float:
        """A random wait before attempt ``made`` + 1: exponential backoff with full jitter."""
        return JITTER.uniform(0, min(self._options.cap, self._options.base * 2**made))

    def wait_after(self, error: AttemptFailedError) -> float | None:
        """Seconds before the next attempt; None: there is none."""
        self._failures[error.kind] += 1
        made = self._failures.total()
        most = RETRIES[error.kind]
        is_used_up = most is not None and self._failures[error.kind] > most
        if error.is_final or is_used_up or self._attempts_before + made >= self._options.attempts:
            return None
        wait = self._wait(error, made)
        if self._budget is not None:
            wait = max(wait, self._budget.reserve())
        if wait >= self.remaining_seconds:
            if self._budget is not None:
                self._budget.give_back()
            return None
        self._on_wait(error, made + 1, wait)
        return wait

    def _wait(self, error: AttemptFailedError, made: int) -> float:
        if error.retry_after_seconds is not None:
            return min(error.retry_after_seconds, self._options.retry_after_cap)
        return self.pause(made)


_SECONDS = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?")


def parse_retry_after(value: str | None) -> float | None:
    """Seconds of a ``Retry-After``, a number or an HTTP date; None: absent, invalid or past."""
    if value is None:
        return None
    if _SECONDS.fullmatch(value.strip()):
        return float(value)
    try:
        at = parsedate_to_datetime(value)
        seconds = (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError):
        return None
    return seconds if seconds >= 0 else None
