"""What the threads that look after one attempt know together."""

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
"""Answers that say that the lease is no longer ours."""


class AttemptState:
    """Flags of one attempt. Each is set once and never cleared.

    Args:
        lease: What the service gave us.
        folder: The attempt's files.
        drain: The worker's own flag: it is being stopped.
    """

    def __init__(self, lease: Lease, folder: AttemptFolder, drain: threading.Event) -> None:
        self.lease = lease
        self.folder = folder
        self.drain = drain
        self.cancel = threading.Event()
        """The user wants the job cancelled."""
        self.pause = threading.Event()
        """The user wants the job paused."""
        self.lost = threading.Event()
        """The lease is a successor's: everything stops, nothing is reported."""
        self.reporting = threading.Event()
        """The outcome is being reported: the lease ends, and who hears that first is not surprised."""
        self.over = threading.Event()
        """The outcome was reported, or never will be."""
        self.failure: BaseException | None = None
        """Why the attempt cannot go on, if one of its threads found that out."""
        self.first_progress = AttemptProgress(phase="starting", step=0)
        """What is shown until the trainer speaks."""
        self.gives_up_at: float | None = None
        """Monotonic instant after which nobody waits for the service any more."""

    def is_given_up(self) -> bool:
        """Whether calls are not to be repeated any more."""
        return (
            self.lost.is_set()
            or self.over.is_set()
            or (self.gives_up_at is not None and time.monotonic() > self.gives_up_at)
        )

    def must_stop(self) -> bool:
        """Whether the attempt should not go on, whatever the reason."""
        return (
            self.cancel.is_set()
            or self.pause.is_set()
            or self.drain.is_set()
            or self.lost.is_set()
            or self.failure is not None
        )

    def lose(self, error: DARError) -> None:
        """Drop the attempt: the service says that it is not ours."""
        if not self.lost.is_set() and not self.over.is_set():
            log.warning("lease lost", lease=self.lease.lease_id, error=error.message)
            self.lost.set()

    def spawn(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Run ``work`` in a thread; how it ends badly is remembered here."""

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
                    log.warning("attempt cannot go on", part=name, error=str(error), exc_info=True)
                    self.failure = error

        thread = threading.Thread(target=run, name=f"{name}-{self.lease.lease_id}", daemon=True)
        thread.start()
        return thread
