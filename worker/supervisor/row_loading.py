"""Rows of a hub's data set, loaded on this host before the trainer starts."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dar.disk import read_if_there
from dar.protocol.worker import Fail
from dar.settings import Settings
from worker.api import GaveUpError
from worker.failures import IN_THE_LOG
from worker.launch import RowsFailure, RowsRequest, RowsResult
from worker.models.hub import hub_token
from worker.supervisor.child_process import trainer_environment
from worker.supervisor.state import AttemptState

COMMAND = (sys.executable, "-m", "worker.attempt.hub_rows")
FOLDER = "hub_rows"
LOOK_SECONDS = 0.05
KILLED = RowsFailure(
    owner="worker",
    code="rows_failed",
    message=f"the process that loads the rows of the hub was killed; {IN_THE_LOG}",
)


class RowsFailedError(Exception):
    """The rows could not be loaded."""

    def __init__(self, failure: RowsFailure) -> None:
        super().__init__(failure.message)
        self._failure = failure

    def report(self, attempt: int) -> Fail:
        """What to report: a failure of the user ends the job, others are tried again."""
        found = self._failure
        return Fail(
            attempt=attempt,
            kind="user" if found.owner == "user" else "transient",
            code=found.code,
            message=found.message,
            param=found.param,
            owner=found.owner,
            counts=found.owner in {"user", "service"},
        )


def load_rows(state: AttemptState, settings: Settings, command: Sequence[str] = COMMAND) -> Path:
    """Load the rows that a job names on a hub, with this worker's token.

    Returns:
        Their folder.

    Raises:
        RowsFailedError: They could not be loaded.
        GaveUpError: The attempt must stop.
    """
    folder = state.folder.inputs / FOLDER
    result = state.folder.inputs / f"{FOLDER}.json"
    asked = RowsRequest(
        address=state.lease.spec.training_file,
        token=hub_token(settings),
        folder=folder,
        result=result,
        has_begun=state.resume_checkpoint_id is not None,
    )
    with state.folder.log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=state.folder.path,
            env=trainer_environment(None, 1, is_offline=False),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it died: there is no result
            process.stdin.write(asked.model_dump_json().encode() + b"\n")
        while process.poll() is None:
            if state.must_stop():
                raise GaveUpError("rows of a hub")
            time.sleep(LOOK_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    content = read_if_there(result)
    found = RowsResult(failure=KILLED)
    if content is not None:
        found = RowsResult.model_validate_json(content)
    if found.failure is not None:
        raise RowsFailedError(found.failure)
    return folder
