"""One slot: claims a job, runs it until it ends, claims the next."""

import threading
from collections.abc import Sequence

import structlog

from dar.client.transport import Backoff
from dar.errors import AuthenticationError, DARError, PermissionDeniedError
from dar.protocol.worker import Lease
from dar.settings import Settings
from worker.api import WorkerClient
from worker.cleanup import Leftovers, sweep_processes
from worker.folders import SlotFolder
from worker.identity import claim_of
from worker.supervisor.supervisor import TRAINER_COMMAND, Supervisor

log = structlog.get_logger(__name__)


class Slot:
    """One or several GPUs and the jobs that run on them one after the other.

    Args:
        settings: Settings of this installation.
        worker_key: Key of scope ``worker``.
        folder: Folder of the slot, locked by this process.
        command: Command line of a trainer.
    """

    def __init__(
        self,
        settings: Settings,
        worker_key: str,
        folder: SlotFolder,
        command: Sequence[str] = TRAINER_COMMAND,
    ) -> None:
        self.drain = threading.Event()
        """Set when the worker stops: it claims no job, and the running attempt ends."""
        self._settings = settings
        self._folder = folder
        self._command = command
        self._claim = claim_of(settings)
        self._client = WorkerClient(settings.service_url, worker_key, node=settings.node)
        self._busy = threading.Lock()
        self._news = threading.Event()
        self._lease_id: str | None = None
        self._trouble: str | None = None
        self._leftovers = Leftovers(
            folder,
            self._client,
            lambda: self._lease_id,
            settings.poll_seconds,
            settings.trainer_logs_bytes,
        )

    def run_next(self) -> bool:
        """Claim and run jobs until no job is queued; returns at once if another thread does so.

        The wake-up task and `poll` both call it.

        Returns:
            Whether the service responded. False: it is unreachable, so call again soon.
        """
        self._news.set()
        while self._news.is_set() and not self.drain.is_set():
            if not self._busy.acquire(blocking=False):
                return True  # the thread that runs a job sees the event and claims again afterwards
            try:
                if not self._run_all():
                    return False
            finally:
                self._busy.release()
        return True

    def _run_all(self) -> bool:
        while not self.drain.is_set():
            self._news.clear()
            try:
                lease = self._client.claim(self._claim)
            except DARError as error:
                self._note(error)
                return False
            self._note(None)
            if lease is None:
                return True
            self._serve(lease)
        return True

    def _serve(self, lease: Lease) -> None:
        self._lease_id = lease.lease_id
        try:
            Supervisor(self._settings, lease, self._folder, self.drain, command=self._command).run()
        finally:
            self._lease_id = None
            self._leftovers.wake()

    def _note(self, error: DARError | None) -> None:
        """Log when the service becomes unreachable or reachable; log a rejected key each time."""
        message = None if error is None else error.message
        if isinstance(error, AuthenticationError | PermissionDeniedError):
            log.error(
                "the service rejects the worker key: set DAR_WORKER_KEY to the content of its "
                "$DAR_HOME/worker_key",
                service=self._settings.service_url,
                error=message,
            )
        elif message is not None and self._trouble is None:
            log.warning("service away", service=self._settings.service_url, error=message)
        elif message is None and self._trouble is not None:
            log.info("service back", service=self._settings.service_url)
        self._trouble = message

    def poll(self) -> None:
        """Remove what a predecessor left, then claim jobs regularly until the worker stops.

        The body of a thread that lives as long as the worker, with a broker or without one.
        """
        sweep_processes(self._folder)
        sender = threading.Thread(target=self._leftovers.run, name="leftovers", daemon=True)
        sender.start()
        longest = self._settings.poll_seconds
        backoff = Backoff(longest)
        while not self.drain.is_set():
            try:
                is_there = self.run_next()
            except Exception:  # outermost frame of a thread that must outlive any job
                log.exception("a job could not be run")
                is_there = False
            if is_there:
                backoff = Backoff(longest)
            self.drain.wait(longest if is_there else min(longest, backoff.next()))
        self._leftovers.stop()
