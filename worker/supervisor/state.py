"""The state that the threads of one attempt share."""

import threading
import time
from collections.abc import Callable

import structlog

from dar.errors import (
    AuthenticationError,
    DARError,
    FencedError,
    NotFoundError,
    PermissionDeniedError,
)
from dar.protocol.worker import AttemptProgress, Lease
from worker.api import GaveUpError
from worker.folders import AttemptFolder

log = structlog.get_logger(__name__)

LOST = (FencedError, AuthenticationError, NotFoundError, PermissionDeniedError)
"""Errors of the service that mean that this worker has lost the lease."""


def seconds_since_boot() -> float:
    """A clock that nobody sets, and that goes on while the machine sleeps, as other clocks do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class AttemptState:
    """Flags of one attempt. Each is set once and never cleared.

    Args:
        lease: The lease from the service.
        folder: The attempt's files.
        drain: The worker's own flag, set when it stops.
    """

    def __init__(self, lease: Lease, folder: AttemptFolder, drain: threading.Event) -> None:
        self.lease = lease
        self.folder = folder
        self.drain = drain
        self.cancel = threading.Event()
        """The user cancelled the job."""
        self.pause = threading.Event()
        """The user paused the job."""
        self.stop = threading.Event()
        """The job is to end with its present step."""
        self.leave = threading.Event()
        """An operator drains this worker: it gives the job back, and goes on running."""
        self.is_service_away = False
        """Whether the service has not replied to the last heartbeat yet."""
        self.is_parked = False
        """Whether the trainer rests, because the lease was not renewed for long."""
        self.lost = threading.Event()
        """Another attempt holds the lease: everything stops, and nothing is reported."""
        self.reporting = threading.Event()
        """The end is being reported. It ends the lease, so other threads may see lease errors
        now."""
        self.over = threading.Event()
        """The end was reported, or never will be."""
        self.failure: BaseException | None = None
        """The error of a thread because of which the attempt cannot continue."""
        self.resume_checkpoint_id = lease.resume_checkpoint_id
        """The checkpoint to resume from. An older one replaces it if it is damaged."""
        self.first_progress = AttemptProgress(phase="starting", step=0)
        """The progress to report until the trainer reports its own."""
        self.renewed_at = seconds_since_boot()
        """When the latest call began that renewed the lease."""
        self.blocked: str | None = None
        """Why no checkpoint can be uploaded now: the artifact store is full, or does not answer."""
        self.gives_up_at: float | None = None
        """Monotonic time after which calls to the service are not repeated."""

    def is_given_up(self) -> bool:
        """Whether calls to the service are no longer repeated."""
        return (
            self.lost.is_set()
            or self.over.is_set()
            or (self.gives_up_at is not None and time.monotonic() > self.gives_up_at)
        )

    def must_stop(self) -> bool:
        """Whether there is any reason to stop the attempt."""
        return (
            self.cancel.is_set()
            or self.pause.is_set()
            or self.drain.is_set()
            or self.leave.is_set()
            # Without a checkpoint the job has no model to end with, so it needs a step first.
            or (self.stop.is_set() and self.resume_checkpoint_id is not None)
            or self.lost.is_set()
            or self.failure is not None
        )

    def lose(self, error: DARError) -> None:
        """Stop the attempt, because this worker has lost its lease."""
        if not self.lost.is_set() and not self.over.is_set():
            facts = {"lease": self.lease.lease_id, "job": self.lease.job_id}
            log.warning("lease lost", error=error.message, **facts)
            self.lost.set()

    def spawn(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Run ``work`` in a thread; an exception of it is stored in `failure`."""

        def run() -> None:
            try:
                work()
            except GaveUpError:
                pass
            except LOST as error:
                if not self.reporting.is_set():
                    self.lose(error)
            except Exception as error:  # outermost frame of a thread: the attempt ends with it
                if not self.over.is_set():
                    log.warning(
                        "attempt cannot continue", part=name, error=str(error), exc_info=True
                    )
                    self.failure = error

        thread = threading.Thread(target=run, name=f"{name}-{self.lease.lease_id}", daemon=True)
        thread.start()
        return thread
