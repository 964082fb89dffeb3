"""Remembered rewards on a worker's disk: where they lie, and when they go."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dar.protocol.spec import JobSpec
from dar.rewards.cache.cache import CachePlace
from dar.settings import Settings
from fakes.scripted_installation import ScriptedInstallation
from worker.launch import Launch
from worker.supervisor.reward_caches import KEPT_SECONDS, RewardCaches

METHOD = {
    "type": "dar",
    "dar": {"rewards": {"components": [{"name": "r", "url": "http://127.0.0.1:61999/score"}]}},
}


@pytest.fixture
def caches(tmp_path: Path) -> RewardCaches:
    return RewardCaches.of(Settings(home=tmp_path, reward_cache_bytes=1000))


def fill(folder: Path, age_seconds: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    for path in (folder / "rewards.sqlite3", folder / "rewards.sqlite3-wal", folder):
        if path != folder:
            path.write_text("x")
        then = datetime.now(UTC).timestamp() - age_seconds
        os.utime(path, (then, then))
    return folder


def test_slots_of_a_host_share_one_place(caches: RewardCaches, tmp_path: Path) -> None:
    root = tmp_path / "worker" / "reward-caches"
    assert caches.place_of("ftjob-1") == CachePlace(root / "job-ftjob-1", root, 1000)
    assert caches.place_of("../up").job == root / "job-..%2Fup"


def test_a_place_reaches_the_trainer(caches: RewardCaches, tmp_path: Path) -> None:
    place = caches.place_of("ftjob-1")
    spec = JobSpec.model_validate({"model": "m", "training_file": "f", "method": METHOD})
    launch = Launch(
        folder=tmp_path,
        job_id="ftjob-1",
        spec=spec,
        seed=1,
        total_steps=1,
        model_folder=tmp_path,
        hub_model=None,
        adapters=(),
        training_file=tmp_path,
        resume_from=None,
        reward_secret=None,
        threads=1,
        reward_cache=place,
    )
    assert Launch.model_validate_json(launch.model_dump_json()).reward_cache == place


def test_what_a_job_remembered_goes_with_it(caches: RewardCaches) -> None:
    gone, other = (fill(caches.path / f"job-ftjob-{number}") for number in (1, 2))
    shared = fill(caches.path / "endpoint-rwe_1")
    caches.forget("ftjob-1")
    caches.forget("ftjob-unknown")
    assert (gone.exists(), other.exists(), shared.exists()) == (False, True, True)
    assert len(list(caches.path.iterdir())) == 2, "nothing is left of it under another name"


def test_what_nobody_used_for_long_is_swept(caches: RewardCaches) -> None:
    caches.sweep()  # there is no folder yet
    old = fill(caches.path / "job-old", KEPT_SECONDS + 60)
    left = fill(caches.path / ".going-job-x-1", KEPT_SECONDS + 60)
    fresh = fill(caches.path / "endpoint-fresh", KEPT_SECONDS - 60)
    used = fill(caches.path / "endpoint-used", KEPT_SECONDS + 60)
    os.utime(used / "rewards.sqlite3-wal")
    caches.sweep()
    assert (old.exists(), left.exists(), fresh.exists(), used.exists()) == (
        False,
        False,
        True,
        True,
    )


def test_only_a_job_that_has_succeeded_is_forgotten(installation: ScriptedInstallation) -> None:
    root = installation.home / "worker" / "reward-caches"
    done, failed = installation.submit(steps=2), installation.submit(steps=2, exit="user")
    folders = [fill(root / f"job-{job_id}") for job_id in (done, failed)]
    installation.start_worker()
    assert installation.wait(done, "succeeded", "failed")["status"] == "succeeded"
    assert installation.wait(failed, "succeeded", "failed")["status"] == "failed"
    installation.until(lambda: not folders[0].exists())
    assert folders[1].exists(), "a failed job may be resumed"
