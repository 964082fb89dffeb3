"""The artifact store fills up: a small volume of a whole installation."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from fakes.scripted_installation import ScriptedInstallation
from worker.supervisor.supervisor import Supervisor


@pytest.fixture
def volume(own: ScriptedInstallation) -> Iterator[Path]:
    """An artifact store of 12 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a volume")
    folder = own.home / "artifacts"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts no volume")
    yield folder
    own.close()
    subprocess.run(["umount", "-l", str(folder)], check=True)


def blocked(own: ScriptedInstallation, job_id: str) -> bool:
    return own.job(job_id)["status_detail"] == "blocked: disk"


@pytest.mark.slow  # a service and workers of its own, and waits for room
def test_a_full_store_blocks_jobs_visibly_and_they_obey_and_go_on(
    own: ScriptedInstallation, volume: Path
) -> None:
    own.start_service(min_free_bytes=1024**2)
    own.start_worker(drain_seconds=3.0)
    ballast = volume / "ballast"

    def fill() -> None:
        ballast.write_bytes(bytes(shutil.disk_usage(volume).free))

    cancelled = own.submit(seconds=0.2)
    own.until(lambda: own.job(cancelled)["status"] == "running")
    fill()
    own.until(lambda: blocked(own, cancelled))
    own.until(lambda: own.job(cancelled)["progress"]["step"] == 4)
    job = own.job(cancelled)
    assert "the artifact store is full" in job["status_message"]
    assert httpx2.get(f"{own.url}/readyz", trust_env=False).json()["status"] == "degraded"
    started = time.monotonic()
    own.cancel(cancelled)
    own.wait(cancelled, "cancelled")
    assert time.monotonic() - started < 2.5

    ballast.unlink()
    paused = own.submit(seconds=0.2)
    own.until(lambda: own.job(paused)["status"] == "running")
    fill()
    own.until(lambda: blocked(own, paused))
    started = time.monotonic()
    own.ask(paused, "pause")
    own.wait(paused, "paused")
    assert time.monotonic() - started < 5

    own.ask(paused, "resume")
    own.until(lambda: blocked(own, paused))
    ballast.unlink()
    job = own.wait(paused, "succeeded")
    assert own.steps(paused) == [1, 2, 3, 4]
    assert [item["step_number"] for item in own.checkpoints(paused)] == [4, 2]
    assert job["attempt"] == 2


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
