"""A circuit breaker: a service that fails most calls is left alone for a while, then tried with a single request.

Written out because what is around either lets every waiting call through once the pause is over, or counts a cancelled task as a
failure of the service.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dar.errors import RewardMisconfiguredError

BreakerState = Literal["closed", "open", "half_open", "misconfigured"]
CallOutcome = Literal["ok", "failed", "neutral"]
"""How a call went; ``neutral`` says nothing about the service: it was cancelled, or its request was too large."""


@dataclass(frozen=True, slots=True)
class BreakerOptions:
    """When calls to a service are held back."""

    min_calls: int = 10
    """Calls in the window below which nothing is concluded."""
    failure_fraction: float = 0.5
    """Failed calls in the window from which on the breaker opens."""
    window_seconds: float = 60.0
    open_seconds: float = 5.0
    """First pause; each that follows a failed probe is twice as long."""
    max_open_seconds: float = 120.0
    pause_grace_seconds: float = 120.0
    """How long a request's deadline stands still, in all, while the breaker holds it back; then the request fails."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that was let through."""

    generation: int
    is_probe: bool


class CircuitBreaker:
    """The state of one endpoint.

    Args:
        options: Thresholds and pauses.
        on_change: Called with the new state and the reason.
        now: Monotonic clock, in seconds.
    """

    def __init__(
        self,
        options: BreakerOptions,
        on_change: Callable[[BreakerState, str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._on_change = on_change
        self._now = now
        self._state: BreakerState = "closed"
        self._refusal: RewardMisconfiguredError | None = None
        self._outcomes: deque[tuple[float, bool]] = deque()
        self._failures = 0
        self._generation = 0
        self._is_probing = False
        self._pauses = 0
        self._opens_until = 0.0
        self._changed = asyncio.Event()

    @property
    def state(self) -> BreakerState:
        """What it does now."""
        if self._state in {"open", "misconfigured"} and self._now() >= self._opens_until:
            self._enter_state("half_open", "the pause is over")
        return self._state

    @property
    def refusal(self) -> RewardMisconfiguredError | None:
        """Why the service refuses us for good; None: it does not, or may have changed its mind."""
        return self._refusal

    def enter(self) -> Call | None:
        """Let a call through; None: not now. Whoever gets a `Call` reports to `done`."""
        state = self.state
        if state == "closed":
            return Call(self._generation, is_probe=False)
        if state == "half_open" and not self._is_probing:
            self._is_probing = True
            return Call(self._generation, is_probe=True)
        return None

    def done(self, call: Call, outcome: CallOutcome, reason: str = "") -> None:
        """Report how ``call`` went. What was let through before the last change of state no longer counts."""
        if call.generation != self._generation:
            return
        if call.is_probe:
            self._probed(outcome, reason)
        elif outcome != "neutral":
            self._count(outcome == "failed", reason)

    def trip(self, error: RewardMisconfiguredError) -> None:
        """The service refuses for good: everything that waits fails with ``error``."""
        self._refusal = error
        if self.state != "misconfigured":  # of many in flight, the first says it
            self._pause("misconfigured", error.error_code)

    async def changed(self, seconds: float) -> None:
        """Wait until the state may have changed, at most ``seconds``."""
        left = self._opens_until - self._now()
        bound = min(seconds, left) if left > 0 else seconds
        try:
            async with asyncio.timeout(max(0.0, bound)):
                await self._changed.wait()
        except TimeoutError:
            return

    def _probed(self, outcome: CallOutcome, reason: str) -> None:
        self._is_probing = False
        if outcome == "ok":
            self._pauses = 0
            self._refusal = None
            self._enter_state("closed", "a request was answered")
        elif outcome == "failed":
            self._pause("open", reason)
        else:
            self._wake()

    def _count(self, is_failure: bool, reason: str) -> None:
        now = self._now()
        self._outcomes.append((now, is_failure))
        self._failures += is_failure
        while self._outcomes[0][0] < now - self._options.window_seconds:
            self._failures -= self._outcomes.popleft()[1]
        calls, failures = len(self._outcomes), self._failures
        too_many = failures >= self._options.failure_fraction * calls
        if is_failure and calls >= self._options.min_calls and too_many:
            self._pause("open", f"{failures} of the last {calls} requests failed: {reason}")

    def _pause(self, state: BreakerState, reason: str) -> None:
        seconds = self._options.open_seconds * 2.0 ** min(self._pauses, 16)
        self._pauses += 1
        self._opens_until = self._now() + min(seconds, self._options.max_open_seconds)
        self._enter_state(state, reason)

    def _enter_state(self, state: BreakerState, reason: str) -> None:
        self._state = state
        self._generation += 1
        self._is_probing = False
        self._outcomes.clear()
        self._failures = 0
        self._wake()
        self._on_change(state, reason)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
