"""Runs one attempt, from its lease to the report of how it ended.

The thread that calls `Supervisor.run` starts the trainer and waits for it. Five more threads run
beside it: heartbeats, directives, the sender of the spool, the uploader of checkpoints and the
bridge for reward requests. At the end all rows are acknowledged first, then all checkpoints
committed, then the end is reported. So a job that has succeeded is complete.
"""

import math
import sys
import threading
import time
from collections.abc import Sequence

import structlog

from dar.disk import read_if_there
from dar.errors import DARError, ModelNotFoundError
from dar.protocol.worker import Complete, Directive, Fail, Lease, Release
from dar.rewards.http.egress import EgressPolicy
from dar.settings import Settings
from worker.api import GaveUpError, WorkerClient
from worker.folders import AttemptRecord, SlotFolder
from worker.launch import ExitCode, Launch, TrainerResult
from worker.self_check import examine
from worker.spool import SpoolReader
from worker.supervisor.checkpoints import CheckpointUploader
from worker.supervisor.child_process import TrainerExit, TrainerProcess, trainer_environment
from worker.supervisor.heartbeat import DirectiveListener, Heartbeats
from worker.supervisor.inputs import InputFetcher, LocalInputs
from worker.supervisor.outcome import (
    RELEASES,
    AttemptEnd,
    Finished,
    failure,
    judge,
    no_progress,
    of_the_user,
    settle,
)
from worker.supervisor.reward_bridge import RewardBridge
from worker.supervisor.reward_caches import RewardCaches
from worker.supervisor.sender import SpoolSender
from worker.supervisor.state import LOST, AttemptState
from worker.supervisor.stopping import Stopping
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
        self._stopping = Stopping(self._state, settings.cancel_seconds, settings.drain_seconds)
        self._client = self._new_client()
        self._heartbeats = Heartbeats(self._state, self._client, settings.heartbeat_seconds)
        self._watchdog = Watchdog(
            self._state,
            self._heartbeats.progress,
            shortest=settings.stall_seconds,
            factor=settings.stall_factor,
        )
        self._bridge: RewardBridge | None = None
        self._caches = RewardCaches.of(settings)
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
        context = {"job": self._lease.job_id, "attempt": self._lease.attempt}
        log.info("attempt begins", **context)
        end: AttemptEnd | None = None
        try:
            end = self._execute_or_fail()
            if isinstance(end, Fail):
                end = settle(end, examine(self._settings))
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
            self._tidy(end)
            log.info("attempt ends", end=repr(end)[:500], **context)

    def _execute_or_fail(self) -> AttemptEnd | None:
        try:
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
            inputs = InputFetcher(self._state, self._client, self._settings.models_path).fetch()
        except GaveUpError:
            return self._end_without_trainer()
        except LOST:
            raise
        except ModelNotFoundError as error:
            return of_the_user(self._lease.attempt, error)
        except DARError as error:
            return failure(self._lease.attempt, error)
        ended = self._train(inputs)
        if self._state.lost.is_set():
            return None
        return self._judge(ended)

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
            is_offline=launch.is_offline,
            processes=launch.processes,
        )
        sender = self._state.spawn("sender", self._sender.run)
        uploader = self._state.spawn("uploader", self._uploader.run)
        trainer = TrainerProcess(self._command, self._folder, launch, environment)
        log.info("trainer started", pid=trainer.pid)
        bridge = self._bridge = RewardBridge(self._state, self._new_client(), trainer.send_news)
        self._state.spawn("rewards", lambda: bridge.run(trainer.notes))
        try:
            while (ended := trainer.poll()) is None:
                self._stopping.enforce(trainer)
                if self._stopping.asked in {None, "stop"}:  # the others have limits of their own
                    self._watchdog.enforce(trainer)
                time.sleep(LOOK_SECONDS)
        finally:
            trainer.kill()
        is_crash = ended.code not in set(ExitCode) - {ExitCode.CRASHED}
        log.info("trainer ended", code=ended.code, **({"log": ended.log_tail} if is_crash else {}))
        self._deliver(sender, uploader, is_finished=ended.code == ExitCode.FINISHED)
        return ended

    def _launch(self, inputs: LocalInputs) -> Launch:
        lease, token = self._lease, self._settings.hf_token
        return Launch(
            folder=self._folder.path,
            job_id=lease.job_id,
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
            hub_token=None if token is None else token.get_secret_value(),
            reward_guard=EgressPolicy.from_settings(self._settings),
            reward_cache=self._caches.place_of(lease.job_id),
            threads=max(1, self._settings.torch_threads // lease.spec.dar.resources.processes),
            is_offline=self._settings.is_offline,
        )

    def _deliver(
        self, sender: threading.Thread, uploader: threading.Thread, *, is_finished: bool
    ) -> None:
        """Wait until all rows and checkpoints have arrived or the time for it is over."""
        is_cancelled = self._stopping.asked == "cancel" and not is_finished
        until = time.monotonic() + CANCELLED_ROWS_SECONDS if is_cancelled else math.inf
        self._sender.finish()
        self._await(sender, until)
        self._uploader.finish()
        self._await(uploader, until)

    def _await(self, thread: threading.Thread, until: float) -> None:
        while thread.is_alive() and time.monotonic() < until:
            thread.join(LOOK_SECONDS)
            if self._state.drain.is_set() and self._state.gives_up_at is None:
                self._state.gives_up_at = self._stopping.sends_until()

    def _judge(self, ended: TrainerExit) -> AttemptEnd:
        if self._state.failure is not None:
            return failure(self._lease.attempt, self._state.failure)
        if (stall := self._watchdog.stall) is not None and ended.signal_name is not None:
            return no_progress(self._lease.attempt, stall.message)
        content = read_if_there(self._folder.result)
        result = None if content is None else TrainerResult.model_validate_json(content)
        return judge(self._lease.attempt, ended, result, self._stopping.asked)

    def _report(self, end: AttemptEnd) -> None:
        report = self._complete(end) if isinstance(end, Finished) else end
        # The limit for rows and checkpoints does not apply to this report.
        self._state.gives_up_at = None
        self._state.reporting.set()
        outcome = self._client.until_answered(
            lambda: self._client.end(self._lease.lease_id, report),
            "end of attempt",
            give_up=self._is_late,
        )
        log.info("end of attempt reported", job=self._lease.job_id, status=outcome.status)
        if outcome.status == "succeeded":  # after any other end the job may be resumed
            self._caches.forget(self._lease.job_id)

    def _is_late(self) -> bool:
        if self._state.drain.is_set() and self._state.gives_up_at is None:
            self._state.gives_up_at = time.monotonic() + LAST_REPORT_SECONDS
        return self._state.is_given_up()

    def _complete(self, finished: Finished) -> Complete | Fail | Release:
        committed, last = self._uploader.committed, self._lease.total_steps
        is_stopped = self._stopping.asked == "stop"
        if is_stopped:  # without a step it ends with what it resumed from
            last = max(committed, default=0)
        checkpoint_id = committed.get(
            last, self._lease.resume_checkpoint_id if is_stopped else None
        )
        if checkpoint_id is None:
            if self._state.is_given_up():
                raise GaveUpError("complete")
            if is_stopped:
                return Release(attempt=self._lease.attempt, reason=RELEASES["stop"])
            error = DARError(
                "the trainer reported success, but published no checkpoint of step "
                f"{self._lease.total_steps}",
                code="checkpoint_missing",
            )
            return failure(self._lease.attempt, error)
        return Complete(
            attempt=self._lease.attempt, last_seq=finished.last_seq, checkpoint_id=checkpoint_id
        )

    def _tidy(self, end: AttemptEnd | None) -> None:
        """Remove files that are no longer needed; unsent rows stay for `worker.cleanup`."""
        if isinstance(end, Fail):
            self._slot_folder.keep_log(self._folder, self._record)
        self._folder.strip()
        self._caches.sweep()
