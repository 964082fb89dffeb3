"""Stops a trainer: an order first, then SIGTERM, then SIGKILL. Parks it without a lease."""

import signal
import time
from collections.abc import Callable, Mapping
from typing import Literal

import structlog

from worker.launch import Order
from worker.supervisor.child_process import TrainerProcess
from worker.supervisor.outcome import Reason
from worker.supervisor.state import AttemptState, seconds_since_boot

log = structlog.get_logger(__name__)

TERMINATION_SECONDS = 10.0
"""Time between SIGTERM and SIGKILL."""
PARKED_AFTER = 0.75
"""Share of a lease's time to live after which a trainer is parked if the lease was not renewed."""
ORDERS: Mapping[Reason, Literal["cancel", "drain", "stop"]] = {
    "cancel": "cancel",
    "pause": "drain",
    "drain": "drain",
    "stop": "stop",
}
"""What a trainer is ordered to do."""
LAST_ROWS_SECONDS = 20.0
"""How long a stopping worker sends rows; the rest stays on disk for its next start."""


class Stopping:
    """Polls the reasons to stop and takes the next step that is due.

    A lost lease or a failure of the worker kills the trainer at once. A cancellation orders it to
    stop, sends SIGTERM after ``cancel_seconds`` and SIGKILL ten seconds later. A drain or a pause
    orders it to write a checkpoint and end, and kills it after ``drain_seconds``. A stop orders it
    to finish its step first, which may take any time; `Watchdog` watches it meanwhile.
    """

    def __init__(self, state: AttemptState, cancel_seconds: float, drain_seconds: float) -> None:
        self._state = state
        self._cancel_seconds = cancel_seconds
        self._drain_seconds = drain_seconds
        self._asked_at = 0.0
        self._is_terminated = False
        self.asked: Reason | None = None
        """The reason of the last order to the trainer."""

    def reason(self) -> Reason | None:
        """Why the attempt should stop: a cancellation before a pause, a pause before a drain.

        A stop comes last: it waits for the end of the step, for which the others have no time.
        """
        if self._state.cancel.is_set():
            return "cancel"
        if self._state.pause.is_set():
            return "pause"
        if self._state.drain.is_set() or self._state.leave.is_set():
            return "drain"
        return "stop" if self._state.stop.is_set() else None

    def enforce(self, trainer: TrainerProcess) -> None:
        """Take the next step that is due; called often while the trainer runs."""
        if self._state.lost.is_set() or self._state.failure is not None:
            trainer.signal(signal.SIGKILL)
            return
        reason = self.reason()
        if reason is not None and reason != self.asked:
            log.info("trainer ordered to stop", reason=reason)
            if self.asked in {None, "stop"} or reason == "cancel":
                trainer.order(Order(type=ORDERS[reason]))
                self._asked_at = time.monotonic()
            self.asked = reason
        waited = time.monotonic() - self._asked_at
        if self.asked == "cancel":
            self._enforce_cancel(trainer, waited)
        elif self.asked in {"pause", "drain"} and waited > self._drain_seconds:
            log.warning("trainer did not end in time and is killed")
            trainer.signal(signal.SIGKILL)

    def _enforce_cancel(self, trainer: TrainerProcess, waited: float) -> None:
        if waited > self._cancel_seconds + TERMINATION_SECONDS:
            log.warning("trainer did not stop and is killed")
            trainer.signal(signal.SIGKILL)
        elif waited > self._cancel_seconds and not self._is_terminated:
            trainer.signal(signal.SIGTERM)
            self._is_terminated = True

    def sends_until(self) -> float:
        """Monotonic time until which a stopping worker may still send.

        It is 20 seconds from now, or later if the trainer ended early, because its last checkpoint
        has to arrive too.
        """
        now = time.monotonic()
        drain_began = self._asked_at if self.asked in {"pause", "drain"} else now
        return max(
            now + min(LAST_ROWS_SECONDS, self._drain_seconds), drain_began + self._drain_seconds
        )


class Parking:
    """Parks a trainer while its lease cannot be renewed, so that no two trainers compute at once.

    The service gives the job to another worker one time to live after the last renewal. A parked
    trainer keeps its memory. It goes on where it was if the lease is renewed, and stops if it is
    lost.

    Args:
        state: Of the attempt.
        clock: Seconds; replaced in tests.
    """

    def __init__(
        self, state: AttemptState, clock: Callable[[], float] = seconds_since_boot
    ) -> None:
        self._state = state
        self._clock = clock
        self._is_parked = False

    def enforce(self, trainer: TrainerProcess) -> None:
        """Park the trainer, or let it go on; called often while it runs."""
        silent_seconds = self._clock() - self._state.renewed_at
        is_due = silent_seconds > PARKED_AFTER * self._state.lease.ttl_seconds
        if is_due == self._is_parked:
            return
        self._is_parked = self._state.is_parked = is_due
        log.warning(
            "trainer parked" if is_due else "trainer goes on",
            seconds_without_renewal=round(silent_seconds, 1),
        )
        trainer.order(Order(type="park" if is_due else "unpark"))
