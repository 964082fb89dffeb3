"""`BackgroundWriter`: finishes one checkpoint in a thread while training goes on."""

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs one piece of work at a time in a thread. A failure is raised by the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin ``work`` once the work before it has ended.

        Raises:
            BaseException: The work before it failed with this.
        """
        self.finish()
        # A daemon: after a cancellation the process ends without waiting for it.
        self._thread = threading.Thread(
            target=self._run, args=(work,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise the error of work that has failed, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait for the end of the work, however it ends."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the end of the work.

        Raises:
            BaseException: It failed with this.
        """
        self.wait()
        self.check()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that trains
            self._error = error
