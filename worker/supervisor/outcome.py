"""What a worker reports when an attempt ends, as a pure function of how the trainer ended."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dar.errors import DARError
from dar.protocol.worker import Fail, Release
from worker.launch import ExitCode, TrainerResult
from worker.supervisor.child_process import TrainerExit

Reason = Literal["cancel", "pause", "drain"]
RELEASES: Mapping[Reason, Literal["cancelled", "paused", "drained"]] = {
    "cancel": "cancelled",
    "pause": "paused",
    "drain": "drained",
}
"""Why the attempt is stopped -> reason of its release."""

MESSAGE_LENGTH = 8000
"""Longest `Fail.message`."""
OUT_OF_MEMORY_HINT = (
    "The usual reason is that the machine ran out of memory: use a smaller batch_size, dar_k, "
    "max_new_tokens or model, or give the worker more memory."
)


@dataclass(frozen=True, slots=True)
class Finished:
    """The trainer finished; its rows and checkpoints must arrive before the job succeeds."""

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
    if asked is not None:
        return Release(attempt=attempt, reason=RELEASES[asked])
    if result is not None and result.message is not None:
        code = result.code or "trainer_failed"
        if ended.code == ExitCode.USER_ERROR:
            return Fail(
                attempt=attempt,
                kind="user",
                code=code[:64],
                message=result.message[:MESSAGE_LENGTH],
                param=result.param,
            )
        if ended.code == ExitCode.REWARD_UNAVAILABLE:
            return Release(
                attempt=attempt, reason="waiting_for_reward", message=result.message[:2000]
            )
        if ended.code == ExitCode.REWARD_PAUSED:
            return Release(
                attempt=attempt,
                reason="paused_reward",
                message=result.message[:2000],
                code=code[:64],
                is_outage=result.is_outage,
            )
    return Fail(attempt=attempt, kind="transient", code="trainer_crashed", message=crash(ended))


def crash(ended: TrainerExit) -> str:
    """A message about a crash, with the end of the trainer's log."""
    how = f"exit code {ended.code}" if ended.signal_name is None else ended.signal_name
    hint = f" {OUT_OF_MEMORY_HINT}" if ended.signal_name == "SIGKILL" else ""
    tail = f"\n{ended.log_tail.strip()}" if ended.log_tail.strip() else ""
    return f"the trainer ended with {how}.{hint}{tail}"[:MESSAGE_LENGTH]


def failure(attempt: int, error: BaseException) -> Fail:
    """The report when the worker itself could not continue the attempt."""
    code = error.error_code if isinstance(error, DARError) else "worker_error"
    message = f"the worker could not continue the attempt: {error}"
    return Fail(attempt=attempt, kind="transient", code=code, message=message[:MESSAGE_LENGTH])
