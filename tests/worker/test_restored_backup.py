"""An older copy is restored under workers that run: nothing succeeds twice, nothing is ignored."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dar.settings import environment
from fakes.scripted_installation import ScriptedInstallation


def run_service(home: Path, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env=environment(home=home),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow  # two workers, and three starts of the service
def test_a_copy_from_before_is_restored_under_running_workers(
    own: ScriptedInstallation, tmp_path: Path
) -> None:
    own.start_service()
    running = own.submit(steps=150, every=5, seconds=0.05)
    own.start_worker()
    own.wait_step(running, 12)
    run_service(own.home, "backup", str(tmp_path / "backup"))
    at_backup = own.job(running)["progress"]["step"]
    vanished = own.submit(steps=1000, every=10, seconds=0.05)
    own.start_worker(slot="1")
    own.wait_step(vanished, 3)
    own.wait_step(running, at_backup + 20)
    own.kill_service()
    old, own.home = own.home, tmp_path / "restored"
    said = run_service(own.home, "restore", str(tmp_path / "backup"))
    assert f"{running} had not ended and goes on" in said
    (own.home / "logs").mkdir()
    shutil.copytree(old / "models", own.home / "models")
    own.start_service()
    job = own.wait(running, "succeeded", "failed", seconds=60)
    assert job["status"] == "succeeded"
    assert own.steps(running) == list(range(1, 151))
    events = own.api("GET", f"/fine_tuning/jobs/{running}/events?order=asc&limit=100")["data"]
    statuses = [one["data"].get("status") for one in events]
    assert statuses.count("succeeded") <= 1
    assert own.checkpoints(running)[0]["step_number"] == 150
    assert [one["id"] for one in own.api("GET", "/fine_tuning/jobs")["data"]] == [running]

    def reported() -> bool:
        lines = [json.loads(line) for line in own.log("service").splitlines()]
        return any(line.get("job_id") == vanished for line in lines)

    own.until(reported)
    worker_log = (old / "logs" / "worker.log").read_text()
    assert vanished in worker_log
    assert "rows of an earlier attempt cannot be sent" in worker_log
    own.wait(own.submit(steps=2), "succeeded")
