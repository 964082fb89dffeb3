"""A sick worker beside a healthy one: no job is harmed, and everybody can see why it gets none."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.scripted_installation import ScriptedInstallation


def workers(installation: ScriptedInstallation) -> dict[str, Any]:
    return {worker["node"]: worker for worker in installation.api("GET", "/workers")["data"]}


def attempts(installation: ScriptedInstallation, job_id: str) -> list[Any]:
    path = f"/fine_tuning/jobs/{job_id}/attempts?order=asc"
    return list(installation.api("GET", path)["data"])


@pytest.mark.slow  # two workers
def test_a_worker_without_room_claims_nothing_and_says_why(own: ScriptedInstallation) -> None:
    own.start_service()
    own.start_worker(node="sick", work_dir=own.home / "small", min_disk_bytes=10**17)
    own.until(lambda: "sick" in workers(own))
    jobs = [own.submit(steps=2) for _ in range(3)]
    own.start_worker(node="well")
    for job_id in jobs:
        assert own.wait(job_id, "succeeded", "failed")["attempt"] == 1
    sick = workers(own)["sick"]
    assert (sick["state"], sick["faults"]) == ("failing", 0)
    assert sick["reason"].startswith("disk_full: the worker's disk has")
    assert "this worker claims no job" in own.log("worker")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow  # two workers, and attempts that fail on a full disk
def test_a_worker_that_lies_about_its_disk_poisons_no_job(
    own: ScriptedInstallation, small_disk: Path
) -> None:
    own.start_service()
    jobs = [own.submit(steps=2, every=1) for _ in range(4)]
    own.start_worker(node="liar", work_dir=small_disk, min_disk_bytes=1)
    own.until(lambda: workers(own).get("liar", {"faults": 0})["faults"] > 0)
    own.start_worker(node="well")
    for job_id in jobs:
        assert own.wait(job_id, "succeeded", "failed", seconds=60)["status"] == "succeeded"
    ended = [one for job_id in jobs for one in attempts(own, job_id) if one["status"] == "failed"]
    assert {(one["node"], one["owner"], one["code"]) for one in ended} == {
        ("liar", "worker", "disk_full")
    }
    assert len(ended) <= 3, "it waits longer after each fault"


@pytest.mark.slow  # three attempts
def test_a_trainer_that_the_kernel_kills_each_time_is_the_jobs_own_failure(
    own: ScriptedInstallation,
) -> None:
    own.start_service()
    own.start_worker()
    job_id = own.submit(steps=9, every=9, crash_at=1, die="")
    job = own.wait(job_id, "succeeded", "failed", seconds=60)
    assert (job["status_detail"], job["attempt"]) == ("poison", 3)
    assert job["failures"] == {"user": 3}
    assert "memory" in job["error"]["message"]


@pytest.mark.slow  # a whole attempt on each of two workers
def test_a_drained_worker_gives_its_job_to_another_with_every_step(
    own: ScriptedInstallation,
) -> None:
    own.start_service()
    first = own.start_worker(node="first", poll_seconds=30.0, heartbeat_seconds=15.0)
    job_id = own.submit(steps=60, every=1000, seconds=0.05)
    own.wait_step(job_id, 3)
    own.api("POST", "/workers/drain", json={"node": "first", "reason": "a new disk"})
    own.until(lambda: workers(own)["first"]["state"] == "drained", seconds=10)
    assert own.job(job_id)["status"] == "queued"
    assert first.poll() is None, "it goes on running"
    own.start_worker(node="second", work_dir=own.home / "second")
    assert own.wait(job_id, "succeeded", "failed")["attempt"] == 2
    assert own.steps(job_id) == list(range(1, 61)), "a drain loses no step"
    assert [one["status"] for one in attempts(own, job_id)] == ["drained", "succeeded"]


@pytest.mark.slow  # two workers
def test_two_machines_of_one_name_harm_no_job(own: ScriptedInstallation, tmp_path: Path) -> None:
    own.start_service()
    own.start_worker()
    job_id = own.submit(steps=80, every=1000, seconds=0.05)
    own.wait_step(job_id, 2)
    second = own.start_worker(work_dir=tmp_path / "elsewhere")
    assert second.wait(30) == 78
    assert "another worker with the name node" in own.log("worker")
    assert own.wait(job_id, "succeeded", "failed")["attempt"] == 1
