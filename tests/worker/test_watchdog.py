"""A trainer that makes no progress is noticed, whatever it hangs in, and its job goes on."""

import itertools
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest

from dar.protocol.worker import AttemptProgress, Lease, Phase
from fakes.scripted_installation import ScriptedInstallation
from worker.folders import AttemptFolder
from worker.launch import STACKS_SIGNAL
from worker.supervisor import watchdog
from worker.supervisor.state import AttemptState
from worker.supervisor.supervisor import Supervisor
from worker.supervisor.watchdog import Watchdog


class FakeTrainer:
    """Notes the signals that it gets."""

    pid = 0

    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []

    def signal(self, number: signal.Signals) -> None:
        self.signals.append(number)


class Scene:
    """A watchdog on a clock of the test."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.trainer = FakeTrainer()
        self.is_spool_full = False
        self._reports = itertools.count(1)
        self._progress = AttemptProgress(phase="starting", step=0)
        lease = cast("Lease", SimpleNamespace(resume_checkpoint_id=None))
        self.state = AttemptState(lease, AttemptFolder(folder), threading.Event())
        self.dog = Watchdog(
            self.state,
            lambda: self._progress,
            lambda: self.is_spool_full,
            shortest=60.0,
            factor=20.0,
            clock=lambda: self.now,
        )

    def report(self, phase: Phase, step: int = 0) -> None:
        self._progress = AttemptProgress(phase=phase, step=step)
        self.state.folder.progress.write_text(str(next(self._reports)))

    def let_pass(self, seconds: float, *, look: float = 1.0) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += look
            self.dog.enforce(cast("Any", self.trainer))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.mark.parametrize(
    "phase", ["starting", "sampling", "training", "evaluating", "calibrating", "checkpointing"]
)
def test_a_phase_without_progress_is_ended_at_its_limit(scene: Scene, phase: Phase) -> None:
    scene.let_pass(2)
    scene.report(phase, 4)
    scene.let_pass(59)
    assert scene.dog.stall is None
    scene.let_pass(3)
    assert scene.dog.stall is not None
    message = scene.dog.stall.message
    assert f"no progress: after step 4 the trainer was in phase '{phase}'" in message
    assert "limit of 60 s" in message
    assert scene.trainer.signals == [STACKS_SIGNAL, signal.SIGCONT], "stacks before the end"
    scene.let_pass(3)
    assert scene.trainer.signals[2:] == [signal.SIGTERM, signal.SIGCONT]
    scene.let_pass(10)
    assert scene.trainer.signals[4:] == [signal.SIGKILL]


def test_the_limit_grows_with_what_the_phase_usually_takes(scene: Scene) -> None:
    for step in range(5):
        scene.report("sampling", step)
        scene.let_pass(10)
        scene.report("training", step)
        scene.let_pass(2)
    assert scene.dog.limit_of("sampling") == pytest.approx(20 * 10, rel=0.15)
    assert scene.dog.limit_of("training") == 60
    scene.report("sampling", 5)
    scene.let_pass(150)
    assert scene.dog.stall is None
    scene.let_pass(80)
    assert scene.dog.stall is not None


def test_only_the_time_of_the_trainer_itself_counts(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    for phase in get_args(Phase):
        if phase not in watchdog.WATCHED:  # rewards are awaited, or room in the artifact store
            scene.report(phase)
            scene.let_pass(10_000)
    scene.report("training")
    scene.let_pass(40)
    for where, name in (
        (scene.state, "is_service_away"),
        (scene.state, "is_parked"),
        (scene, "is_spool_full"),
    ):
        setattr(where, name, True)
        scene.let_pass(10_000)
        setattr(where, name, False)
    scene.now += 10_000  # the worker itself was frozen, and its trainer perhaps too
    scene.let_pass(10)
    assert scene.dog.stall is None
    for _ in range(10):  # batches of one evaluation
        scene.report("evaluating")
        scene.let_pass(40)
    assert scene.dog.stall is None
    loaded = itertools.count(0, 2 * watchdog.LOADED_BYTES)
    monkeypatch.setattr(watchdog, "bytes_moved", lambda _pid: next(loaded))
    scene.report("starting")
    scene.let_pass(1000)
    assert scene.dog.stall is None, "a large model is loaded"


def test_a_trainer_that_hangs_is_noticed_while_the_artifact_store_is_full(
    supervisor: Supervisor,
) -> None:
    dog, signals = supervisor._watchdog, list[signal.Signals]()
    now = start = dog._looked_at
    dog._clock = lambda: now
    trainer: Any = type("Trainer", (), {"pid": 0, "signal": lambda _, one: signals.append(one)})()
    progress = AttemptProgress(phase="training", step=3)
    supervisor._folder.progress.write_text(progress.model_dump_json())
    supervisor._state.blocked = "the artifact store is full"
    assert supervisor._heartbeats.progress().phase == "blocked: disk"
    while dog.stall is None and now < start + 100:
        now += 1
        dog.enforce(trainer)
    assert dog.stall is not None
    assert (dog.stall.phase, dog.stall.step) == ("training", 3)
    assert signals


def log_of(installation: ScriptedInstallation, job_id: str) -> str:
    """The log of a job's first attempt."""
    log = installation.home / "worker" / "slot-0" / "logs" / f"{job_id}-1.log"
    return log.read_text()


@pytest.fixture
def hang(installation: ScriptedInstallation) -> Callable[..., Any]:
    """Runs a job whose first attempt hangs after a checkpoint; returns the job when it is over."""

    def run(*, stop_at: int | None = None, **script: object) -> Any:
        job_id = installation.submit(steps=6, every=2, **script)
        installation.start_worker(stall_seconds=3.0, stall_factor=1.0)
        if stop_at is not None:
            installation.wait_step(job_id, stop_at)
            (trainer,) = installation.trainers()
            trainer.suspend()
        return installation.wait(job_id, "succeeded", "failed", seconds=60)

    return run


@pytest.mark.slow  # a worker process and two attempts
def test_a_trainer_that_sleeps_in_a_step_is_ended_and_its_job_goes_on(
    hang: Callable[..., Any], installation: ScriptedInstallation
) -> None:
    job = hang(hang_at=5)
    assert (job["status"], job["attempt"], job["failures"]) == ("succeeded", 2, {"worker": 1})
    assert installation.steps(job["id"]) == [1, 2, 3, 4, 5, 6]
    _, first = installation.api("GET", f"/fine_tuning/jobs/{job['id']}/attempts")["data"]
    assert (first["status"], first["code"]) == ("lost", "no_progress")
    expected = "no progress: after step 4 the trainer was in phase 'training' for longer than"
    assert any(expected in message for message in installation.messages(job["id"]))
    assert "in hang" in log_of(installation, job["id"]), "the stack says where it hung"


@pytest.mark.slow  # a worker process and two attempts
def test_a_stopped_trainer_is_ended_and_its_job_goes_on(
    hang: Callable[..., Any], installation: ScriptedInstallation
) -> None:
    job = hang(stop_at=2, seconds=1.0)
    assert (job["status"], job["attempt"], job["failures"]) == ("succeeded", 2, {"worker": 1})
    assert "most recent call first" in log_of(installation, job["id"])
