"""What a supervisor does beside the usual course of an attempt."""

import errno
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dar.protocol.worker import AttemptProgress, Lease
from dar.settings import Settings
from worker.folders import SlotFolder
from worker.supervisor.supervisor import Supervisor

SPEC = {
    "model": "tiny",
    "training_file": "file-1",
    "method": {
        "type": "dar",
        "dar": {"rewards": {"components": [{"name": "r", "url": "http://127.0.0.1:1/score"}]}},
    },
}
LEASE = {
    "lease_id": "lease-1",
    "job_id": "ftjob-1",
    "attempt": 1,
    "token": "token",
    "ttl_seconds": 60.0,
    "spec": SPEC,
    "seed": 7,
    "total_steps": 4,
    "model": {"kind": "folder", "name": "tiny", "checkpoint_id": None, "adapter_ids": []},
    "resume_checkpoint_id": None,
    "reward_secret": None,
}


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    """Of an attempt that has a folder, but no trainer and no service."""
    settings = Settings(
        home=tmp_path, base_url="http://127.0.0.1:9", drain_seconds=0.1, stall_seconds=60.0
    )
    lease = Lease.model_validate(LEASE)
    made = Supervisor(settings, lease, SlotFolder.of(tmp_path, "0"), threading.Event())
    made._folder.create(made._record)
    yield made
    made._state.over.set()
    made._client.close()


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


@pytest.mark.parametrize("why", ["drain", "pause", "leave"])
def test_a_job_that_leaves_its_slot_does_not_wait_long_for_room_in_the_store(
    supervisor: Supervisor, why: str
) -> None:
    state = supervisor._state
    getattr(state, why).set()
    state.blocked = "the artifact store is full"

    def upload() -> None:
        while not state.is_given_up():
            time.sleep(0.01)

    waiting = threading.Thread(
        target=supervisor._await, args=[state.spawn("uploader", upload)], daemon=True
    )
    waiting.start()
    waiting.join(5)
    assert not waiting.is_alive()


def test_an_attempt_frees_its_folder_even_if_that_cannot_be_tidied(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(SlotFolder, "keep_logs", fail)
    supervisor._state.lost.set()  # it ends at once, without a report
    with pytest.raises(OSError, match="Input/output error"):
        supervisor.run()
    with supervisor._folder.held() as is_free:
        assert is_free
