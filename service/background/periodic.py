"""A thread that makes passes with pauses between them, whatever goes wrong in one of them."""

import threading
from abc import ABC, abstractmethod

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dar.errors import DARError

log = structlog.get_logger()


class StoppedError(Exception):
    """A pass ended early, because the service stops."""


class PeriodicThread(ABC):
    """Runs `run_once` again and again, until `close`. A pass that fails is logged.

    Args:
        name: Name of the thread, for log messages too.
        pause_seconds: Time between two passes.
        close_seconds: How long `close` waits for the current pass.
    """

    def __init__(self, name: str, *, pause_seconds: float, close_seconds: float = 5.0) -> None:
        self._pause_seconds = pause_seconds
        self._close_seconds = close_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Let the current pass end, then the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._close_seconds)

    @abstractmethod
    def run_once(self) -> bool | None:
        """Make one pass; True: the next one follows without a pause.

        Raises:
            StoppedError: The service stops.
        """

    def _run(self) -> None:
        name, is_next_due = self._thread.name, False
        while not self._stop.wait(0 if is_next_due else self._pause_seconds):
            is_next_due = False
            try:
                is_next_due = bool(self.run_once())
            except StoppedError:
                return
            except (SQLAlchemyError, DARError, OSError) as error:
                log.warning("pass failed; the next one tries again", of=name, error=str(error))
            except Exception:
                # Outermost frame of the thread, which must live as long as its service.
                log.exception("pass failed unexpectedly; the next one tries again", of=name)
