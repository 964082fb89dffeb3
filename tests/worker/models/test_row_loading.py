"""Rows of a hub's data set, which a process of their own loads for the trainer."""

import json
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from fakes.hub import Hub
from worker.api import GaveUpError
from worker.launch import RowsRequest
from worker.supervisor.row_loading import RowsFailedError, load_rows
from worker.supervisor.supervisor import Supervisor

TOKEN = "hf_9XkQ2vRbW7mLpZt4"
WAITS = "import sys, time; print(sys.stdin.readline(), flush=True); time.sleep(60)"


def test_a_process_that_is_killed_is_no_fault_of_the_job(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    state, settings = supervisor._state, supervisor._settings
    with pytest.raises(RowsFailedError) as ended:
        load_rows(state, settings, [sys.executable, "-c", "import os; os.abort()"])
    said = ended.value.report(3)
    assert (said.attempt, said.kind, said.owner, said.code) == (
        3,
        "transient",
        "worker",
        "rows_failed",
    )


def test_a_cancellation_ends_the_process_and_only_its_stdin_has_the_token(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(TOKEN)  # as `hf auth login` stores it
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    state, log = supervisor._state, supervisor._state.folder.log

    def cancel() -> None:
        while "hf_" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.02)
        state.cancel.set()

    threading.Thread(target=cancel, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(GaveUpError):
        load_rows(state, supervisor._settings, [sys.executable, "-c", WAITS])
    assert time.monotonic() - began < 20
    asked = RowsRequest.model_validate_json(log.read_text())
    assert asked.token == TOKEN
    assert TOKEN not in repr(asked)
    assert asked.folder.is_relative_to(state.folder.inputs)


@pytest.mark.slow  # a process that imports torch
def test_what_the_hub_refuses_ends_the_job_and_hides_the_token(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "datasets/team/rows"
    lease = supervisor._state.lease
    spec = lease.spec.model_copy(update={"training_file": "hf://team/rows"})
    supervisor._state.lease = lease.model_copy(update={"spec": spec})
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text(TOKEN)
    with Hub({name: {"train.jsonl": b'{"prompt": "a"}\n'}}, gated=frozenset({name})) as hub:
        hub.complaint = f"{TOKEN} is no token"
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        with pytest.raises(RowsFailedError) as refused:
            load_rows(supervisor._state, supervisor._settings)
    said = refused.value.report(1)
    assert (said.kind, said.owner, said.param) == ("user", "user", "training_file")
    assert "the data set 'team/rows' of the hub" in said.message
    assert TOKEN not in json.dumps(said.model_dump()) + supervisor._state.folder.log.read_text()
