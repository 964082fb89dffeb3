"""Whole attempts: real service, real worker process, scripted trainer."""

import signal
import time
from pathlib import Path

import psutil
import pytest


def test_a_job_runs_to_its_end_and_leaves_nothing_on_the_workers_disk(installation) -> None:
    job_id = installation.submit(steps=4, every=2)
    installation.start_worker()
    job = installation.wait(job_id, "succeeded", "failed")
    assert job["status"] == "succeeded", job
    assert installation.steps(job_id) == [1, 2, 3, 4]
    assert [item["step_number"] for item in installation.checkpoints(job_id)] == [4, 2]
    time.sleep(0.5)
    assert installation.attempt_folders() == []
