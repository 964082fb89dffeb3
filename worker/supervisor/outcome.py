"""What a worker reports when an attempt ends, as a pure function of how the trainer ended."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from dar.errors import CheckpointError, ConflictError, DARError
from dar.protocol.worker import NO_PROGRESS, Fail, Release, WorkerFault
from worker.failures import (
    IN_THE_LOG,
    MEMORY,
    OUT_OF_MEMORY_HINT,
    PROCESS_FAILED,
    UNKNOWN,
    failure_of,
)
from worker.launch import ExitCode, TrainerResult
from worker.supervisor.child_process import TrainerExit

Reason = Literal["cancel", "pause", "drain", "stop"]
RELEASES: Mapping[Reason, Literal["cancelled", "paused", "drained"]] = {
    "cancel": "cancelled",
    "pause": "paused",
    "drain": "drained",
    "stop": "paused",
}
"""Why the attempt is stopped -> reason of its release.

A job that is to stop is released only before its trainer runs; it then ends with the checkpoint
from which the attempt would have resumed.
"""
CRASHED = "trainer_crashed"
CHECKPOINT_MISSING = "checkpoint_missing"
NEEDS_MORE = frozenset({MEMORY.code, PROCESS_FAILED})
"""Codes of failures of a job that needs more than a machine has that is well."""
EITHERS = NEEDS_MORE | {CRASHED, UNKNOWN.code}
"""Codes of failures that the machine may have caused, or the job."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The trainer finished, or was stopped.

    Its rows and checkpoints must arrive before the job succeeds.
    """

    last_seq: int


AttemptEnd = Finished | Fail | Release


def judge(
    attempt: int, ended: TrainerExit, result: TrainerResult | None, asked: Reason | None
) -> AttemptEnd:
    """What to report about an attempt.

    Args:
        attempt: Its number.
        ended: How the process of its trainer ended.
        result: The trainer's own report; None if it could not write one.
        asked: Why the trainer was ordered to stop; None: it was not.
    """
    if ended.code == ExitCode.FINISHED and result is not None:
        return Finished(result.last_seq)
    if asked is None and ended.code == ExitCode.DRAINED:
        asked = "drain"
    if asked == "stop" and ended.code == ExitCode.DRAINED and result is not None:
        return Finished(result.last_seq)
    # A trainer that was stopped before it began has no result; its job has a checkpoint.
    if asked is not None and (asked != "stop" or ended.code == ExitCode.DRAINED):
        return Release(attempt=attempt, reason=RELEASES[asked])
    if (
        result is not None
        and result.message is not None
        and (
            # A trainer ends by the signal that ended one of its processes, after reporting that.
            ended.signal_name is None or result.code == PROCESS_FAILED
        )
    ):
        return _reported(attempt, ended.code, result, result.message)
    return Fail(
        attempt=attempt,
        kind="transient",
        code=CRASHED,
        message=crash(ended),
        # Without a signal it did not even report an error: the installation may be broken.
        owner="worker" if ended.signal_name is None else "user",
    )


def _reported(attempt: int, exit_code: int, result: TrainerResult, message: str) -> AttemptEnd:
    """What to report about a trainer that has reported an error."""
    code = result.code or "trainer_failed"
    if exit_code == ExitCode.REWARD_UNAVAILABLE:
        return Release(attempt=attempt, reason="waiting_for_reward", message=message)
    if exit_code == ExitCode.REWARD_PAUSED:
        return Release(
            attempt=attempt,
            reason="paused_reward",
            message=message,
            code=code,
            is_outage=result.is_outage,
        )
    return Fail(
        attempt=attempt,
        kind="user" if exit_code == ExitCode.USER_ERROR else "transient",
        code=code,
        message=message,
        param=result.param,
        owner=result.owner,
        counts=result.owner in {"user", "service"},
    )


def crash(ended: TrainerExit) -> str:
    """A message about a trainer that ended without a report."""
    if ended.signal_name is None:
        return f"the trainer ended with exit code {ended.code}; {IN_THE_LOG}"
    hint = OUT_OF_MEMORY_HINT if ended.signal_name == "SIGKILL" else IN_THE_LOG
    return f"the trainer was ended by {ended.signal_name}; {hint}"


def of_the_user(attempt: int, error: DARError) -> Fail:
    """The report about an error that only the user can correct, found before training."""
    found = failure_of(error)
    return Fail(
        attempt=attempt,
        kind="user",
        code=found.code,
        message=found.message,
        param=found.param,
        owner="user",
    )


def failure(attempt: int, error: BaseException, *, has_begun: bool = False) -> Fail:
    """The report when the worker itself could not continue the attempt.

    Args:
        attempt: Its number.
        error: What ended it.
        has_begun: See `worker.failures.failure_of`.
    """
    found = failure_of(error, has_begun=has_begun)
    return Fail(
        attempt=attempt,
        kind="transient",
        code=found.code,
        message=f"the worker could not continue the attempt: {found.message}",
        owner="service" if found.owner == "user" else found.owner,
        counts=False,  # no training has failed
    )


def refused(attempt: int, error: ConflictError) -> Fail:
    """The report after the service refused the first one, as when it lost the last checkpoint."""
    if error.error_code == CHECKPOINT_MISSING:
        return failure(attempt, CheckpointError(error.message, code=CHECKPOINT_MISSING))
    return failure(attempt, error)


def no_progress(attempt: int, message: str) -> Fail:
    """The report about a trainer that was ended because it made no progress.

    The machine may have caused it as well as the job; the service counts it as a lost attempt.
    """
    return Fail(
        attempt=attempt,
        kind="transient",
        code=NO_PROGRESS,
        message=message,
        owner="worker",
        counts=False,
    )


def settle(end: Fail, check: Callable[[], WorkerFault | None]) -> Fail:
    """Decide who caused a failure that the machine as well as the job may have caused.

    Args:
        end: The report.
        check: The worker's self-check.
    """
    if end.kind == "user" or end.code not in EITHERS:
        return end
    if (fault := check()) is not None:
        message = f"{end.message.rstrip('.')}; the worker's self-check fails: {fault.message}"
        changes = {"owner": "worker", "code": fault.code, "message": message, "counts": False}
        return end.model_copy(update=changes)
    if end.code in NEEDS_MORE:
        return end.model_copy(update={"owner": "user", "counts": True})
    return end
