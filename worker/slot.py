"""One slot: claims a job, runs it until it ends, claims the next."""

import contextlib
import threading
from collections.abc import Sequence

import structlog

from dar.client.transport import Backoff
from dar.errors import (
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    DARError,
    PermissionDeniedError,
)
from dar.fault_points import fault_point
from dar.protocol.worker import NAME_TAKEN, Claim, Lease, WorkerFault
from dar.settings import Settings
from worker.api import WorkerClient
from worker.cleanup import Leftovers, sweep_processes
from worker.folders import SlotFolder
from worker.identity import claim_of, machine_of
from worker.models.cache import ModelCache, inventory
from worker.self_check import examine, look, report_of
from worker.supervisor.supervisor import TRAINER_COMMAND, Supervisor

log = structlog.get_logger(__name__)

FAREWELL_SECONDS = 5.0
"""How long the first and the last message of a worker may take; the service may be away."""


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
        self._machine = machine_of(settings.work_path)
        self._is_suspect = True
        """Whether a complete self-check is due: at the start, and after a fault of this machine."""
        self._fault: WorkerFault | None = None
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
                lease = self._client.claim(self._next_claim())
            except DARError as error:
                self._note(error)
                return False
            self._note(None)
            if lease is None:
                return True
            self._serve(lease)
        return True

    def _next_claim(self, *, wants_job: bool = True, is_leaving: bool = False) -> Claim:
        """A claim with the state of this machine; of a machine with a fault it is only a report."""
        self._folder.mark_alive()
        self._tidy_models()
        fault = examine(self._settings) if self._is_suspect else look(self._settings)
        self._is_suspect = fault is not None
        if fault is not None and fault != self._fault:
            log.error("this worker claims no job", code=fault.code, reason=fault.message)
        elif fault is None and self._fault is not None:
            log.info("this worker claims jobs again")
        self._fault = fault
        report = report_of(self._settings, self._machine, fault)
        changes = {"is_leaving": is_leaving, "models": inventory(self._settings)}
        report = report.model_copy(update=changes)
        return self._claim.model_copy(
            update={"report": report, "wants_job": wants_job and fault is None}
        )

    def _tidy_models(self) -> None:
        """Let cached models go for which the disk has no room, before that counts as a fault."""
        try:
            ModelCache.of(self._settings).tidy()
        except OSError as error:  # what is wrong with the disk is found by the self-check
            log.warning("the cache of models cannot be tidied", error=str(error))

    def introduce(self) -> None:
        """Kill the trainers of a predecessor, and report this worker; the service may be away.

        Raises:
            ConfigurationError: Another worker has its name.
        """
        sweep_processes(self._folder)
        try:
            self._client.claim(self._next_claim(wants_job=False), timeout=FAREWELL_SECONDS)
        except ConflictError as error:
            if error.error_code == NAME_TAKEN:
                self._client.close()
                raise ConfigurationError(error.message) from None
            log.warning("the service refuses this worker", error=error.message)
        except DARError as error:
            log.warning("worker not reported", error=error.message)

    def _leave(self) -> None:
        """Report that this worker stops, so that its name is free at once."""
        with contextlib.suppress(DARError):
            claim = self._next_claim(wants_job=False, is_leaving=True)
            self._client.claim(claim, timeout=FAREWELL_SECONDS)

    def _serve(self, lease: Lease) -> None:
        self._lease_id = lease.lease_id
        fault_point("worker.claimed")
        supervisor = Supervisor(
            self._settings, lease, self._folder, self.drain, command=self._command
        )
        try:
            supervisor.run()
        finally:
            self._is_suspect = self._is_suspect or supervisor.is_worker_at_fault
            self._lease_id = None
            self._leftovers.wake()

    def _note(self, error: DARError | None) -> None:
        """Log when the service becomes unreachable or reachable.

        A rejected key and a name that another worker has are logged each time.
        """
        message = None if error is None else error.message
        if isinstance(error, AuthenticationError | PermissionDeniedError):
            log.error(
                "the service rejects the worker key: set DAR_WORKER_KEY to one that was made for "
                "this node (dar keys create), or to the content of its $DAR_HOME/worker_key",
                service=self._settings.service_url,
                error=message,
            )
        elif error is not None and error.error_code == NAME_TAKEN:
            log.error("the service refuses this worker", error=message)
        elif message is not None and self._trouble is None:
            log.warning("service away", service=self._settings.service_url, error=message)
        elif message is None and self._trouble is not None:
            log.info("service back", service=self._settings.service_url)
        self._trouble = message

    def poll(self) -> None:
        """Claim jobs regularly until the worker stops.

        The body of a thread that lives as long as the worker, with a broker or without one.
        """
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
        with self._busy:
            self._leave()
