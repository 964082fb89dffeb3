"""A circuit breaker: pauses calls to a service that fails most of them, then tries a single call.

Existing packages either let all waiting calls through when the pause ends, or count a cancelled
task as a failure of the service.
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
"""Result of a call. ``neutral`` does not count: it was cancelled, or its request was too large."""


@dataclass(frozen=True, slots=True)
class BreakerOptions:
    """When calls to a service are paused."""

    min_calls: int = 10
    """With fewer calls in the window the breaker stays closed."""
    failure_fraction: float = 0.5
    """The breaker opens if this share of the calls in the window has failed."""
    window_seconds: float = 60.0
    open_seconds: float = 5.0
    """First pause; doubled after each failed trial call."""
    max_open_seconds: float = 120.0
    pause_grace_seconds: float = 120.0
    """How long the breaker may extend a request's deadline in all; then the request fails."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that the breaker has admitted."""

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
        """The current state."""
        if self._state in {"open", "misconfigured"} and self._now() >= self._opens_until:
            self._enter_state("half_open", "the pause is over")
        return self._state

    @property
    def refusal(self) -> RewardMisconfiguredError | None:
        """Why no call can succeed until the configuration changes; None: a call may succeed."""
        return self._refusal

    def enter(self) -> Call | None:
        """Admit a call; None: not now. `done` must be called for every `Call`."""
        state = self.state
        if state == "closed":
            return Call(self._generation, is_probe=False)
        if state == "half_open" and not self._is_probing:
            self._is_probing = True
            return Call(self._generation, is_probe=True)
        return None

    def done(self, call: Call, outcome: CallOutcome, reason: str = "") -> None:
        """Report the outcome of ``call``.

        Calls admitted before the last change of state are ignored.
        """
        if call.generation != self._generation:
            return
        if call.is_probe:
            self._probed(outcome, reason)
        elif outcome != "neutral":
            self._count(outcome == "failed", reason)

    def trip(self, error: RewardMisconfiguredError) -> None:
        """Enter ``misconfigured``: every waiting call fails with ``error``."""
        self._refusal = error
        if self.state != "misconfigured":  # only the first of many calls in flight reports it
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
