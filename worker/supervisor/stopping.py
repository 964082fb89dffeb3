"""Makes a trainer stop: asked first, then told, then killed."""

import signal
import time

import structlog

from worker.launch import Order
from worker.supervisor.child_process import TrainerProcess
from worker.supervisor.outcome import Reason
from worker.supervisor.state import AttemptState

log = structlog.get_logger(__name__)

TERMINATION_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""
LAST_ROWS_SECONDS = 20.0
"""How long a worker that is being stopped goes on sending; the rest stays on disk for its next start."""


class Stopping:
    """Watches the reasons to stop and carries them out, step by step.

    A lost lease or a failure of the worker kills the trainer at once. A cancellation asks it, sends SIGTERM after
    ``cancel_seconds`` and SIGKILL ten seconds later. A drain asks it for a checkpoint and kills it after ``drain_seconds``, and
    so does a pause, which is the same to the trainer.
    """

    def __init__(self, state: AttemptState, cancel_seconds: float, drain_seconds: float) -> None:
        self._state = state
        self._cancel_seconds = cancel_seconds
        self._drain_seconds = drain_seconds
        self._asked_at = 0.0
        self._is_terminated = False
        self.asked: Reason | None = None
        """What the trainer was asked to do."""

    def reason(self) -> Reason | None:
        """Why the attempt should stop; a cancellation outranks a pause, and that a drain."""
        if self._state.cancel.is_set():
            return "cancel"
        if self._state.pause.is_set():
            return "pause"
        return "drain" if self._state.drain.is_set() else None

    def enforce(self, trainer: TrainerProcess) -> None:
        """Take the next step that is due. Called often while the trainer runs."""
        if self._state.lost.is_set() or self._state.failure is not None:
            trainer.signal(signal.SIGKILL)
            return
        reason = self.reason()
        if reason is not None and reason != self.asked:
            log.info("trainer asked to stop", reason=reason)
            if self.asked is None or reason == "cancel":
                trainer.order(Order(type="cancel" if reason == "cancel" else "drain"))
                self._asked_at = time.monotonic()
            self.asked = reason
        waited = time.monotonic() - self._asked_at
        if self.asked == "cancel":
            self._enforce_cancel(trainer, waited)
        elif self.asked is not None and waited > self._drain_seconds:
            log.warning("trainer did not leave in time and is killed")
            trainer.signal(signal.SIGKILL)

    def _enforce_cancel(self, trainer: TrainerProcess, waited: float) -> None:
        if waited > self._cancel_seconds + TERMINATION_SECONDS:
            log.warning("trainer did not stop and is killed")
            trainer.signal(signal.SIGKILL)
        elif waited > self._cancel_seconds and not self._is_terminated:
            trainer.signal(signal.SIGTERM)
            self._is_terminated = True

    def last_call(self) -> float:
        """Monotonic instant until which a worker that is being stopped may still send.

        Twenty seconds from now, or longer if the trainer left early, because its last checkpoint has to arrive too.
        """
        now = time.monotonic()
        drain_began = self._asked_at if self.asked in {"pause", "drain"} else now
        return max(
            now + min(LAST_ROWS_SECONDS, self._drain_seconds), drain_began + self._drain_seconds
        )
