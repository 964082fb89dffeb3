"""Trainer processes, and the lock of a slot."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dar.protocol.spec import JobSpec
from dar.protocol.worker import ComponentAccess, Fail
from dar.settings import environment
from fakes.scripted_installation import ScriptedInstallation
from worker.folders import AttemptFolder, AttemptRecord, SlotFolder
from worker.launch import Launch, Order, TrainerResult
from worker.supervisor.child_process import (
    TrainerExit,
    TrainerProcess,
    kill_leftover,
    trainer_environment,
)
from worker.supervisor.outcome import Finished, failure, judge

SECRET = "whsec_c2VjcmV0"
HUB_TOKEN = "hf_9XkQ2vRbW7mLpZt4"

ECHO = """
import subprocess, sys, time
print(sys.stdin.readline(), flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
print(sys.stdin.readline(), flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> AttemptFolder:
    folder = SlotFolder.of(tmp_path, "0").attempt("lease-1")
    folder.create(AttemptRecord(lease_id="lease-1", job_id="ftjob-1", attempt=1))
    return folder


@pytest.fixture
def start(folder: AttemptFolder) -> Callable[[str], TrainerProcess]:
    def start(script: str) -> TrainerProcess:
        command = [sys.executable, "-c", script]
        environment = trainer_environment("1,2", 1, is_offline=True)
        return TrainerProcess(command, folder, launch(folder), environment)

    return start


ACCESS = ComponentAccess(
    url="http://127.0.0.1:1/score",
    secrets=["whsec_bmV3", "whsec_b2xk"],
    headers={"authorization": "Bearer token-of-a-header", "x-key": "key-of-another"},
)


def launch(folder: AttemptFolder) -> Launch:
    component = {"name": "r", "url": "http://127.0.0.1:1/score"}
    dar = {"rewards": {"components": [component]}}
    spec = {"model": "m", "training_file": "f", "method": {"type": "dar", "dar": dar}}
    return Launch(
        folder=folder.path,
        job_id="ftjob-1",
        spec=JobSpec.model_validate(spec),
        seed=1,
        total_steps=1,
        model_folder=folder.path,
        hub_model=None,
        adapters=(),
        training_file=folder.path,
        resume_from=None,
        reward_secret=SECRET,
        reward_access={"r": ACCESS},
        threads=1,
    )


def ended(trainer: TrainerProcess) -> TrainerExit:
    until = time.monotonic() + 10
    while (how := trainer.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return how


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_trainer_reads_its_launch_and_its_orders_and_its_log_hides_the_secret(
    folder: AttemptFolder, start: Callable[[str], TrainerProcess]
) -> None:
    trainer = start(ECHO)
    trainer.order(Order(type="drain"))
    how = ended(trainer)
    log = folder.log.read_text()
    heard = Launch.model_validate_json(log.splitlines()[0])
    assert heard.outbox is not None
    assert heard.model_copy(update={"outbox": None}) == launch(folder)
    assert '{"type":"drain"}' in log
    assert how.code == 0
    for secret in (SECRET, *ACCESS.secrets, "token-of-a-header", "key-of-another"):
        assert secret in log
        assert secret not in how.log_tail


def test_what_a_trainer_started_ends_with_it(
    folder: AttemptFolder, start: Callable[[str], TrainerProcess]
) -> None:
    trainer = start(ECHO)
    trainer.order(Order(type="cancel"))
    ended(trainer)
    child = int(folder.log.read_text().partition("child ")[2].split()[0])
    until = time.monotonic() + 2
    while not is_gone(child):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_killed_trainer_reports_its_signal(start: Callable[[str], TrainerProcess]) -> None:
    how = start("import time; time.sleep(60)").kill()
    assert (how.code, how.signal_name) == (-9, "SIGKILL")


def test_a_trainer_sees_no_key(
    start: Callable[[str], TrainerProcess], folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    trainer = start("import os, sys, time; print(sorted(os.environ), sys.argv); time.sleep(60)")
    while not folder.log.read_text().endswith("\n"):
        time.sleep(0.02)
    trainer.kill()
    said = folder.log.read_text()
    assert "CUDA_VISIBLE_DEVICES" in said
    assert "DAR_" not in said
    assert "HF_TOKEN" not in said
    stored = [path.read_bytes() for path in folder.path.rglob("*") if path.is_file()]
    for secret in (SECRET, HUB_TOKEN, *ACCESS.secrets, *ACCESS.headers.values()):
        assert not any(secret.encode() in content for content in stored)
        assert secret not in repr(launch(folder))


def test_a_trainer_dies_with_the_process_that_started_it_even_when_it_is_deaf(
    tmp_path: Path,
) -> None:
    deaf = "import time; from dar.processes import die_with_parent; die_with_parent(); print('up', flush=True); time.sleep(60)"
    parent = f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", {deaf!r}], start_new_session=True, stdout=subprocess.PIPE)
        child.stdout.readline()
        print(child.pid, flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        until = time.monotonic() + 2
        while not is_gone(pid):
            assert time.monotonic() < until
            time.sleep(0.01)


def test_the_trainer_of_a_dead_worker_is_killed_but_never_another_process_with_its_id(
    folder: AttemptFolder, start: Callable[[str], TrainerProcess]
) -> None:
    trainer = start("import time; time.sleep(60)")
    identity = folder.trainer.read_text()
    folder.trainer.write_text(identity.replace('"started":', '"started":1'))
    assert not kill_leftover(folder)
    assert trainer.poll() is None
    folder.trainer.write_text(identity)
    assert kill_leftover(folder)
    assert ended(trainer).signal_name == "SIGKILL"


def test_a_second_worker_on_a_slot_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    hold = """
        import sys, time
        from pathlib import Path
        from worker.folders import SlotFolder
        from worker.identity import slot_held
        with slot_held(SlotFolder.of(Path(sys.argv[1]), "0"), "0"):
            print("held", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(hold), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        second = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        assert f"taken by the worker with process id {holder.pid}" in second.stderr
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as third:
        assert third.stdout is not None
        assert third.stdout.readline() == "held\n", "a dead worker's slot is free"
        third.kill()


@pytest.mark.parametrize("asked", ["cancel", "drain", None])
def test_a_job_that_finished_first_has_finished_whatever_was_asked(asked: Any) -> None:
    assert judge(1, TrainerExit(0, ""), TrainerResult(last_seq=9), asked) == Finished(9)


def test_an_exit_code_without_words_is_a_crash() -> None:
    verdict = judge(1, TrainerExit(os.EX_USAGE, "Traceback"), None, None)
    assert isinstance(verdict, Fail)
    assert (verdict.kind, verdict.code) == ("transient", "trainer_crashed")
    assert "exit code 64" in verdict.message


def test_an_error_of_the_worker_is_tried_again() -> None:
    assert failure(2, OSError("no space left")).kind == "transient"


def test_a_worker_takes_no_arguments() -> None:
    command = [sys.executable, "-m", "worker", "serve"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "unrecognized arguments: serve" in refused.stderr


def test_a_worker_without_a_key_says_where_to_get_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worker"]
    result = subprocess.run(
        command, env=environment(home=tmp_path), capture_output=True, text=True, check=False
    )
    assert result.returncode == 78
    assert (
        f"no worker key: set DAR_WORKER_KEY, or start the service once, which writes {tmp_path}"
        in (result.stderr)
    )


def test_a_key_that_no_header_can_carry_is_not_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "worker_key").write_text("dar-wk-abcdefgh-\nabcdefghijkl")
    result = subprocess.run(
        [sys.executable, "-m", "worker"],
        env=environment(without=["worker_key"], home=tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 78
    assert "DAR_WORKER_KEY" in result.stderr
    assert "abcdefgh" not in result.stderr


def test_a_refused_key_is_said_at_every_poll(installation: ScriptedInstallation) -> None:
    installation.start_worker(worker_key="dar-wk-x-wrong", slot="stranger")
    installation.until(lambda: installation.log("worker").count("rejects the worker key") >= 2)
