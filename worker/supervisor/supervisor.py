"""Runs one attempt, from its lease to the report of how it ended.

The thread that calls `Supervisor.run` starts the trainer and waits for it. Five more threads run
beside it: heartbeats, directives, the sender of the spool, the uploader of checkpoints and the
bridge for reward requests. At the end all rows are acknowledged first, then all checkpoints
committed, then the end is reported. So a job that has succeeded is complete.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from dar.disk import read_if_there
from dar.errors import (
    ConflictError,
    DARError,
    FencedError,
    HubUnreachableError,
    ModelNotFoundError,
)
from dar.fault_points import fault_point
from dar.protocol.worker import (
    AttemptProgress,
    Complete,
    Directive,
    Fail,
    Lease,
    Outcome,
    Release,
)
from dar.rewards.http.egress import EgressPolicy
from dar.settings import Settings
from worker.api import LOG_SECONDS, GaveUpError, WorkerClient
from worker.folders import AttemptRecord, SlotFolder
from worker.launch import LOG_BYTES, ExitCode, Launch, TrainerResult
from worker.models.cache import inventory
from worker.models.fetching import ModelFetcher
from worker.self_check import examine
from worker.spool import SpoolReader, SpoolRoom
from worker.supervisor.checkpoints import CheckpointUploader
from worker.supervisor.child_process import TrainerExit, TrainerProcess, trainer_environment
from worker.supervisor.heartbeat import DirectiveListener, Heartbeats
from worker.supervisor.inputs import InputFetcher, LocalInputs
from worker.supervisor.log_sender import LogSender
from worker.supervisor.outcome import (
    CHECKPOINT_MISSING,
    RELEASES,
    AttemptEnd,
    Finished,
    failure,
    judge,
    no_progress,
    of_the_user,
    refused,
    settle,
)
from worker.supervisor.reward_bridge import RewardBridge
from worker.supervisor.reward_caches import RewardCaches
from worker.supervisor.row_loading import RowsFailedError, load_rows
from worker.supervisor.sender import SpoolSender
from worker.supervisor.state import LOST, AttemptState
from worker.supervisor.stopping import LAST_ROWS_SECONDS, Parking, Stopping
from worker.supervisor.watchdog import Watchdog

log = structlog.get_logger(__name__)

TRAINER_COMMAND = (sys.executable, "-m", "worker.attempt")
LOOK_SECONDS = 0.05
LAST_REPORT_SECONDS = 5.0
"""How long a stopping worker tries to report the end; else its next start frees the job."""
CANCELLED_ROWS_SECONDS = 2.0
"""How long a cancellation waits for the last rows; `worker.cleanup` sends the rest afterwards."""


class Supervisor:
    """Runs one attempt.

    Args:
        settings: Settings of this installation.
        lease: The job to run.
        folder: Folder of the slot.
        drain: Set when the worker stops.
        command: Command line of the trainer.
    """

    def __init__(
        self,
        settings: Settings,
        lease: Lease,
        folder: SlotFolder,
        drain: threading.Event,
        command: Sequence[str] = TRAINER_COMMAND,
    ) -> None:
        self._settings = settings
        self._lease = lease
        self._slot_folder = folder
        self._folder = folder.attempt(lease.lease_id)
        self._record = AttemptRecord(
            lease_id=lease.lease_id, job_id=lease.job_id, attempt=lease.attempt
        )
        self._state = AttemptState(lease, self._folder, drain)
        self.is_worker_at_fault = False
        """Whether the attempt failed by a fault of this machine."""
        self._command = command
        self._held = contextlib.ExitStack()
        """Locks of the attempt's folder and of its models."""
        self._stopping = Stopping(self._state, settings.cancel_seconds, settings.drain_seconds)
        self._client = self._new_client()
        self._cancelled_at: float | None = None
        """When a cancellation was seen after the trainer had ended."""
        self._leaves_at: float | None = None
        """Until when a job that has to leave its slot waits for room in the artifact store."""
        self._arrived = [threading.Event(), threading.Event()]
        """Set when all rows have arrived, and when all checkpoints have."""
        self._heartbeats = Heartbeats(
            self._state, self._client, settings.heartbeat_seconds, lambda: inventory(settings)
        )
        self._watchdog = Watchdog(
            self._state,
            self._heartbeats.reported,
            SpoolRoom(self._folder.spool, settings.spool_bytes).is_full,
            shortest=settings.stall_seconds,
            factor=settings.stall_factor,
        )
        self._bridge: RewardBridge | None = None
        self._caches = RewardCaches.of(settings)
        self._models = ModelFetcher(
            lease,
            self._client,
            settings,
            self._folder.inputs,
            self._state.must_stop,
            self._show,
            self._held,
        )
        self._uploader = CheckpointUploader(
            self._state, self._client, lease.spec.dar.checkpointing.keep_last
        )
        self._sender = SpoolSender(
            SpoolReader(self._folder.spool),
            self._client,
            self._record,
            self._uploader.take,
            settings.spool_seconds,
        )

    def _new_client(self) -> WorkerClient:
        return WorkerClient(
            self._settings.service_url,
            self._lease.token,
            node=self._settings.node,
            give_up=self._state.is_given_up,
        )

    def run(self) -> None:
        """Run the attempt until it ends. Failures are reported to the service, not raised."""
        lease = self._lease
        context = {
            "job": lease.job_id,
            "attempt": lease.attempt,
            "request_id": lease.request_id,
        }
        log.info("attempt begins", **context)
        end: AttemptEnd | None = None
        try:
            end = self._execute_or_fail()
            if isinstance(end, Fail):
                end = settle(end, lambda: examine(self._settings))
                self.is_worker_at_fault = end.owner == "worker"
            if end is not None:
                self._report(end)
        except GaveUpError:
            log.warning("end of attempt not reported", **context)
        except LOST as error:
            self._state.lose(error)
        finally:
            self._state.over.set()
            self._client.close()
            try:
                self._tidy()
            finally:
                self._held.close()
            log.info("attempt ends", end=repr(end)[:500], **context)

    def _execute_or_fail(self) -> AttemptEnd | None:
        try:
            self._folder.prepare()
            # Before the record is there: with it, another worker of this host would send the rows.
            self._held.enter_context(self._folder.held(wait=True))
            self._folder.create(self._record)
            self._spawn_messengers()
            return self._execute()
        except (GaveUpError, *LOST):
            raise
        except Exception as error:  # outermost frame of an attempt: the job must continue elsewhere
            log.exception("attempt cannot continue")
            return failure(self._lease.attempt, error)

    def _spawn_messengers(self) -> None:
        listener = DirectiveListener(self._state, self._new_client(), self._hand_on)
        self._state.spawn("heartbeats", self._heartbeats.run)
        self._state.spawn("directives", listener.run)

    def _hand_on(self, result: Directive) -> None:
        # None before the trainer has announced a request; then there are no results either.
        if self._bridge is not None:
            self._bridge.take(result)

    def _execute(self) -> AttemptEnd | None:
        """Fetch, train, send; None if the lease is lost."""
        try:
            inputs = InputFetcher(self._state, self._client, self._models).fetch()
            if inputs.training_file is None and not self._settings.is_offline:
                inputs = replace(inputs, training_file=load_rows(self._state, self._settings))
        except GaveUpError:
            return self._end_without_trainer()
        except LOST:
            raise
        except RowsFailedError as error:
            return error.report(self._lease.attempt)
        except ModelNotFoundError as error:
            return of_the_user(self._lease.attempt, error)
        except HubUnreachableError as error:
            if self._state.resume_checkpoint_id is None:
                return of_the_user(self._lease.attempt, error)
            return failure(self._lease.attempt, error, has_begun=True)
        except DARError as error:
            return failure(self._lease.attempt, error)
        fault_point("worker.fetched")
        ended = self._train(inputs)
        if self._state.lost.is_set():
            return None
        return self._judge(ended)

    def _show(self, message: str) -> None:
        """Show what the attempt does before its trainer runs."""
        self._state.first_progress = AttemptProgress(phase="starting", step=0, message=message)

    def _end_without_trainer(self) -> AttemptEnd | None:
        if self._state.lost.is_set():
            return None
        if self._state.failure is not None:
            return failure(self._lease.attempt, self._state.failure)
        reason = self._stopping.reason() or "drain"
        return Release(attempt=self._lease.attempt, reason=RELEASES[reason])

    def _train(self, inputs: LocalInputs) -> TrainerExit:
        launch = self._launch(inputs)
        environment = trainer_environment(
            self._settings.devices,
            launch.threads,
            is_offline=True,
            processes=launch.processes,
        )
        rows, checkpoints = self._arrived
        sender = self._state.spawn("sender", _then(self._sender.run, rows))
        uploader = self._state.spawn("uploader", _then(self._uploader.run, checkpoints))
        logs = LogSender(self._folder, self._client, self._record, launch.redactor())
        log_sender = self._state.spawn("log", logs.run)
        trainer = TrainerProcess(self._command, self._folder, launch, environment)
        log.info("trainer started", pid=trainer.pid)
        fault_point("worker.started")
        bridge = self._bridge = RewardBridge(self._state, self._new_client(), trainer.send_news)
        self._state.spawn("rewards", lambda: bridge.run(trainer.notes))
        parking = Parking(self._state)
        try:
            while (ended := trainer.poll()) is None:
                self._stopping.enforce(trainer)
                parking.enforce(trainer)
                if self._stopping.asked in {None, "stop"}:  # the others have limits of their own
                    self._watchdog.enforce(trainer)
                time.sleep(LOOK_SECONDS)
        finally:
            trainer.kill()
        is_crash = ended.code not in set(ExitCode) - {ExitCode.CRASHED}
        log.info("trainer ended", code=ended.code, **({"log": ended.log_tail} if is_crash else {}))
        fault_point("worker.trained")
        logs.finish()
        self._deliver(sender, uploader)
        log_sender.join(LOG_SECONDS)
        return ended

    def _launch(self, inputs: LocalInputs) -> Launch:
        lease = self._lease
        return Launch(
            folder=self._folder.path,
            job_id=lease.job_id,
            request_id=lease.request_id,
            spec=lease.spec,
            seed=lease.seed,
            total_steps=lease.total_steps,
            model_folder=inputs.model_folder,
            hub_model=None if inputs.model_folder is not None else lease.model.name,
            adapters=inputs.adapters,
            training_file=inputs.training_file,
            validation_file=inputs.validation_file,
            reward_models=dict(inputs.reward_models),
            resume_from=inputs.resume_from,
            reward_secret=lease.reward_secret,
            reward_access=lease.rewards,
            reward_guard=EgressPolicy.from_settings(self._settings),
            reward_cache=self._caches.place_of(lease.job_id),
            threads=max(1, self._settings.torch_threads // lease.spec.dar.resources.processes),
            spool_bytes=self._settings.spool_bytes,
            log_bytes=min(LOG_BYTES, self._settings.trainer_logs_bytes // 4),
        )

    def _deliver(self, sender: threading.Thread, uploader: threading.Thread) -> None:
        """Wait until all rows and checkpoints have arrived or the time for it is over."""
        self._sender.finish()
        self._await(sender)
        self._uploader.finish()
        self._await(uploader)

    def _await(self, thread: threading.Thread) -> None:
        while thread.is_alive() and not self._is_cancelled_for_long():
            thread.join(LOOK_SECONDS)
            leaves = (self._state.drain, self._state.pause, self._state.leave)
            if any(event.is_set() for event in leaves):
                self._limit_delivery()

    def _limit_delivery(self) -> None:
        if self._leaves_at is None:
            seconds = min(LAST_ROWS_SECONDS, self._settings.drain_seconds)
            self._leaves_at = time.monotonic() + seconds
        if self._state.gives_up_at is None:
            self._state.gives_up_at = self._stopping.sends_until()
        if self._state.blocked is not None:
            self._state.gives_up_at = min(self._state.gives_up_at, self._leaves_at)

    def _is_cancelled_for_long(self) -> bool:
        """Whether a cancellation has waited long enough for rows and checkpoints to arrive."""
        if not self._state.cancel.is_set():
            return False
        if self._cancelled_at is None:
            self._cancelled_at = time.monotonic()
        patience = 0.0 if self._state.blocked is not None else CANCELLED_ROWS_SECONDS
        return time.monotonic() - self._cancelled_at > patience

    def _judge(self, ended: TrainerExit) -> AttemptEnd:
        if self._state.failure is not None:
            return failure(self._lease.attempt, self._state.failure)
        if (stall := self._watchdog.stall) is not None and ended.signal_name is not None:
            return no_progress(self._lease.attempt, stall.message)
        content = read_if_there(self._folder.result)
        result = None if content is None else TrainerResult.model_validate_json(content)
        return judge(self._lease.attempt, ended, result, self._stopping.asked)

    def _report(self, end: AttemptEnd) -> None:
        fault_point("worker.delivered")
        report = self._complete(end) if isinstance(end, Finished) else end
        # The limit for rows and checkpoints does not apply to this report.
        self._state.gives_up_at = None
        self._state.reporting.set()
        try:
            outcome = self._send_end(report)
        except FencedError:
            raise
        except ConflictError as error:
            outcome = self._send_end(refused(self._lease.attempt, error))
        fault_point("worker.reported")
        log.info("end of attempt reported", job=self._lease.job_id, status=outcome.status)
        if outcome.status == "succeeded":  # after any other end the job may be resumed
            self._caches.forget(self._lease.job_id)

    def _send_end(self, report: Complete | Fail | Release) -> Outcome:
        return self._client.until_answered(
            lambda: self._client.end(self._lease.lease_id, report),
            "end of attempt",
            give_up=self._is_late,
        )

    def _is_late(self) -> bool:
        if self._state.drain.is_set() and self._state.gives_up_at is None:
            self._state.gives_up_at = time.monotonic() + LAST_REPORT_SECONDS
        return self._state.is_given_up()

    def _complete(self, finished: Finished) -> Complete | Fail | Release:
        """What to report about a trainer that finished.

        If it was stopped before the service had everything, its job ends or waits as asked.
        """
        reason = self._stopping.reason()
        if reason is not None and not all(event.is_set() for event in self._arrived):
            return Release(attempt=self._lease.attempt, reason=RELEASES[reason])
        committed, last = self._uploader.committed, self._lease.total_steps
        is_stopped = self._stopping.asked == "stop"
        if is_stopped:
            last = max(committed, default=0)
        # Without a step it ends with what it resumed from: a worker may die after its last upload.
        checkpoint_id = committed.get(last, self._state.resume_checkpoint_id)
        if checkpoint_id is None:
            if self._state.is_given_up():
                raise GaveUpError("complete")
            if is_stopped:
                return Release(attempt=self._lease.attempt, reason=RELEASES["stop"])
            error = DARError(
                "the trainer reported success, but published no checkpoint of step "
                f"{self._lease.total_steps}",
                code=CHECKPOINT_MISSING,
            )
            return failure(self._lease.attempt, error)
        return Complete(
            attempt=self._lease.attempt, last_seq=finished.last_seq, checkpoint_id=checkpoint_id
        )

    def _tidy(self) -> None:
        """Remove files that are no longer needed; unsent rows stay for `worker.cleanup`."""
        self._slot_folder.keep_logs(self._folder, self._record, self._settings.trainer_logs_bytes)
        self._folder.strip()
        self._caches.sweep()


def _then(work: Callable[[], None], done: threading.Event) -> Callable[[], None]:
    """``work``, and then ``done``, which stays unset if it raises."""

    def run() -> None:
        work()
        done.set()

    return run
