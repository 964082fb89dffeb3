"""The trainer process, ``python -m worker.attempt``: the only part of the worker that uses torch.

It reads its launch from stdin, trains, reports through its folder (`worker.folders`) and ends with
an `ExitCode`. The end of stdin means that its worker is dead; then it ends too.
"""

import faulthandler
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import BinaryIO, Literal

from dar.errors import RewardUnavailableError
from dar.processes import die_with_parent
from dar.rewards.http.redaction import RedactingFormatter
from dar.training.report.sink import AFTER_STEP, NullSink, Sink, StopKind
from worker.attempt.inbox import PipeInbox
from worker.attempt.log_file import LogFile
from worker.attempt.siblings import Siblings
from worker.attempt.spool_sink import SpoolSink
from worker.failures import AttemptFailure, failure_of
from worker.folders import AttemptFolder
from worker.launch import STACKS_SIGNAL, ExitCode, Launch, Line, RewardNews

log = logging.getLogger(__name__)

STDERR = 2

URGENCY: Mapping[StopKind, int] = {"stop": 0, "drain": 1, "cancel": 2}
"""A more urgent order replaces an earlier one."""

How = Literal["finished", "drained", "cancelled"]
Train = Callable[[Launch, Sink, "StdinControl"], How]

EXIT_CODES: Mapping[How, ExitCode] = {
    "finished": ExitCode.FINISHED,
    "drained": ExitCode.DRAINED,
    "cancelled": ExitCode.CANCELLED,
}


class StdinControl:
    """Orders and news of the supervisor, read from stdin by a thread of its own.

    Until `begin` is called there is nothing to save, so an order ends the process at once.

    Args:
        stdin: Where they come from.
        inbox: For results of reward requests.
        is_resumed: Whether the job has a checkpoint.
    """

    def __init__(
        self, stdin: BinaryIO, inbox: PipeInbox | None = None, *, is_resumed: bool = False
    ) -> None:
        self._stdin = stdin
        self._is_resumed = is_resumed
        self.inbox = inbox
        """Inbox for results of reward requests; None: the supervisor sends none."""
        self._lock = threading.Lock()
        self._request: StopKind | None = None
        self._has_begun = False
        self._may_go_on = threading.Event()
        self._may_go_on.set()

    def listen(self) -> None:
        threading.Thread(target=self._read, name="control", daemon=True).start()

    def begin(self) -> None:
        """From now on orders only set `requested`."""
        with self._lock:
            self._has_begun = True

    def requested(self) -> StopKind | None:
        """The last order; a drain does not replace a cancellation, and a stop neither."""
        return self._request

    def rest(self) -> None:
        """Return at once, or, while the trainer is parked, when it may go on or has to stop."""
        self._may_go_on.wait()

    def _read(self) -> None:
        for line in self._stdin:
            order = Line.validate_json(line)
            if isinstance(order, RewardNews):
                if self.inbox is not None:
                    self.inbox.deliver(order)
                continue
            with self._lock:
                self._obey(order.type)
        os._exit(ExitCode.CRASHED)  # the worker is dead, and nothing reads further reports

    def _obey(self, order: StopKind | Literal["park", "unpark"]) -> None:
        if order == "park":
            if self._request in AFTER_STEP:  # a trainer that has to leave must get to its end
                self._may_go_on.clear()
            return
        if order != "stop":
            self._may_go_on.set()
        if order == "unpark":
            return
        if self._request is None or URGENCY[order] > URGENCY[self._request]:
            self._request = order
        # A job without a checkpoint has no model to end with, so it makes one step.
        needs_step = order == "stop" and not self._is_resumed
        if not self._has_begun and not needs_step:
            os._exit(ExitCode.CANCELLED if order == "cancel" else ExitCode.DRAINED)


def train_with_torch(launch: Launch, sink: Sink, control: StdinControl) -> How:
    """Train with `dar.training`, alone or as one of several processes."""
    # Imported objects all stay, and searching them for garbage takes a fifth of the import time.
    gc.disable()
    from dar.rewards.from_spec import RewardAccess  # noqa: PLC0415 - takes CPU time as well
    from dar.training.from_spec import (  # noqa: PLC0415 - takes seconds of CPU, during which a cancellation must be noticed
        JobInputs,
        train_job,
    )
    from dar.training.parallel.ranks import meet  # noqa: PLC0415 - takes seconds of CPU too

    gc.freeze()
    gc.enable()
    control.begin()
    if launch.processes > 1:
        meet(launch.process, launch.processes, port=launch.port, listener=launch.listener)
    model = launch.model_folder or launch.hub_model
    assert model is not None
    inputs = JobInputs(
        job_id=launch.job_id,
        spec=launch.spec,
        seed=launch.seed,
        total_steps=launch.total_steps,
        model=model,
        adapters=launch.adapters,
        training_file=launch.training_file,
        validation_file=launch.validation_file,
        work_dir=AttemptFolder(launch.folder).work,
        resume_from=launch.resume_from,
        reward_secret=launch.reward_secret,
        reward_access=RewardAccess(
            launch.reward_access, launch.reward_guard, control.inbox, launch.reward_cache
        ),
        reward_models=launch.reward_models,
        threads=launch.threads,
        offline=True,  # the worker has fetched what the hub has
    )
    return train_job(inputs, sink, control)


def failure_for(error: BaseException, launch: Launch) -> AttemptFailure:
    """The failure that an exception of training means, without secrets of the launch."""
    found = failure_of(error, names=launch.names(), has_begun=launch.resume_from is not None)
    return replace(found, message=launch.redactor()(found.message))


def ending_of(error: BaseException, failure: AttemptFailure, launch: Launch) -> ExitCode:
    """The exit code for an error; CRASHED means that the job is tried again.

    Missing rewards pause the job, unless the spec says that they fail it. So no work is lost while
    the reward service is repaired.
    """
    if isinstance(error, RewardUnavailableError):
        return ExitCode.REWARD_UNAVAILABLE
    rewards = launch.spec.dar.rewards
    if failure.owner == "reward" and rewards is not None:
        is_pausing = rewards.failure.on_budget == "pause"
        return ExitCode.REWARD_PAUSED if is_pausing else ExitCode.USER_ERROR
    return ExitCode.USER_ERROR if failure.owner == "user" else ExitCode.CRASHED


def attend(launch: Launch, control: StdinControl, train: Train) -> ExitCode:
    """Train as process 0, and report the result."""
    sink = SpoolSink(
        AttemptFolder(launch.folder),
        launch.total_steps,
        limit_bytes=launch.spool_bytes,
        is_stopping=lambda: control.requested() is not None,
        rest=control.rest,
    )
    siblings = Siblings(launch)
    try:
        how = train(siblings.launch, sink, control)
        siblings.finish()
    except BaseException as error:  # whatever ends training is reported, a panic in Rust as well
        failure = failure_for(error, launch)
        code = ending_of(error, failure, launch)
        log.exception("training ends with %s: %s", code.name, failure.code)
        sink.close(failure)
        return code
    sink.close()
    return EXIT_CODES[how]


def attend_as_sibling(launch: Launch, control: StdinControl, train: Train) -> ExitCode:
    """Train as one of the other processes, which report nothing."""
    try:
        return EXIT_CODES[train(launch, NullSink(), control)]
    except BaseException as error:  # the outermost frame of this process
        failure = failure_for(error, launch)
        log.exception("training ends with an error of the %s: %s", failure.owner, failure.code)
        return ending_of(error, failure, launch)


def main(train: Train = train_with_torch) -> ExitCode:
    """Run a trainer.

    Args:
        train: Does the training; tests replace it.
    """
    die_with_parent()
    # In C, so it also works while no Python code runs.
    faulthandler.register(STACKS_SIGNAL, file=STDERR, all_threads=True)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # At INFO it logs every URL with its query string.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    stdin = sys.stdin.buffer
    launch = Launch.model_validate_json(stdin.readline())
    redact = launch.redactor()
    for handler in logging.getLogger().handlers:  # a traceback may quote a reward service
        handler.setFormatter(RedactingFormatter(handler.formatter or logging.Formatter(), redact))
    log.info("job %s, submitted by request %s", launch.job_id, launch.request_id or "(unknown)")
    LogFile(AttemptFolder(launch.folder).log_of(launch.process), launch.log_bytes).watch()
    control = StdinControl(
        stdin,
        None if launch.outbox is None else PipeInbox(launch.outbox),
        is_resumed=launch.resume_from is not None,
    )
    control.listen()
    try:
        return (attend_as_sibling if launch.process else attend)(launch, control, train)
    except Exception:  # outermost frame of the process: the supervisor reads this from the log
        log.exception("training crashed")
        return ExitCode.CRASHED


def leave(code: ExitCode) -> None:
    """End the process without the interpreter's shutdown, in which native libraries may hang."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
