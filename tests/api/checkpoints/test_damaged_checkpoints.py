"""Damage of stored files, as users and the scrubber find it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.live_service import Lease, Live
from service.background.scrubber import Scrubber
from service.store.tables import CheckpointRow


def folder_of(live: Live, job_id: str, step: int) -> Path:
    return live.settings.artifacts_path / live.runtime.artifacts.checkpoint(job_id, 1, step)


def scrubber(live: Live) -> Scrubber:
    runtime = live.runtime
    return Scrubber(
        runtime.database,
        runtime.artifacts,
        runtime.notifier,
        period_seconds=3600,
        bytes_per_second=2**40,
    )


def scrub(live: Live) -> int:
    """Verify all checkpoints, as if none had been verified for long."""
    with live.runtime.database.write() as transaction:
        transaction.query(CheckpointRow).update({"verified_at": None})
    one, count = scrubber(live), 0
    while one.run_once():
        count += 1
    return count


@pytest.fixture
def two(live: Live) -> tuple[str, Lease, list[str]]:
    """A job with checkpoints of steps 2 and 4."""
    job_id, lease = live.running()
    return job_id, lease, [lease.checkpoint(2), lease.checkpoint(4)]


@pytest.mark.parametrize("is_short", [True, False], ids=["short", "missing"])
def test_a_download_of_a_damaged_file_is_refused_before_its_first_byte(
    live: Live, two: Any, error_of: Callable[..., Any], is_short: bool
) -> None:
    job_id, _, (older, newest) = two
    weights = folder_of(live, job_id, 4) / "model.safetensors"
    weights.write_bytes(b"wei") if is_short else weights.unlink()
    path = f"/v1/fine_tuning/jobs/{job_id}/checkpoints/{newest}"
    for _ in range(2):
        answer = live.http.get(f"{path}/files/model.safetensors")
        assert (answer.status_code, error_of(answer)["code"]) == (409, "checkpoint_damaged")
    what = "has 3 of 7 bytes" if is_short else "is missing"
    message = error_of(live.http.get(path))["message"]
    assert f"model.safetensors {what}. It was set aside" in message
    assert f"its newest whole one is {older}, of step 2" in message
    assert [item["id"] for item in live.job(job_id, "/checkpoints")["data"]] == [older]
    kinds = [event["data"].get("kind") for event in live.job(job_id, "/events")["data"]]
    assert kinds.count("checkpoint_damaged") == 1
    file_id = live.job(job_id)["training_file"]
    (live.settings.artifacts_path / "files" / file_id).write_bytes(b"{")
    answer = live.http.get(f"/v1/files/{file_id}/content")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "content_damaged")


def test_a_scrub_finds_altered_bytes_and_takes_restored_files_back(live: Live, two: Any) -> None:
    job_id, _, (_, newest) = two
    assert scrub(live) == 2
    assert not scrubber(live).run_once(), "all were verified just now"
    weights = folder_of(live, job_id, 4) / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(b"x" + good[1:])
    scrub(live)
    assert [item["step_number"] for item in live.job(job_id, "/checkpoints")["data"]] == [2]
    event = live.job(job_id, "/events")["data"][0]
    assert (event["level"], event["data"]["checkpoint_id"]) == ("error", newest)
    assert event["data"]["damage"] == "model.safetensors was altered"
    scrub(live)
    assert len(live.job(job_id, "/events")["data"]) == event["seq"], "it is told once"
    weights.write_bytes(good)
    scrub(live)
    assert [item["step_number"] for item in live.job(job_id, "/checkpoints")["data"]] == [4, 2]
    assert live.job(job_id, "/events")["data"][0]["message"] == (
        "checkpoint of step 4 is whole again"
    )


def test_a_damaged_checkpoint_is_unpinned_and_deleted(
    live: Live, two: Any, error_of: Callable[..., Any]
) -> None:
    job_id, _, (older, _) = two
    path = f"/v1/fine_tuning/jobs/{job_id}/checkpoints/{older}"
    assert live.http.post(f"{path}/pin").status_code == 200
    (folder_of(live, job_id, 2) / "model.safetensors").unlink()
    scrub(live)
    assert error_of(live.http.post(f"{path}/pin"))["code"] == "checkpoint_damaged"
    assert error_of(live.http.delete(path))["code"] == "checkpoint_in_use"
    assert not live.http.post(f"{path}/unpin").json()["is_pinned"]
    assert live.http.delete(path).status_code == 200
    assert live.http.post(f"{path}/unpin").status_code == 404


def test_a_volume_that_is_not_mounted_damages_nothing(
    live: Live, two: Any, error_of: Callable[..., Any], tmp_path: Path
) -> None:
    job_id, _, (_, newest) = two
    root = live.settings.artifacts_path / "checkpoints"
    shutil.move(root, tmp_path / "away")
    path = f"/v1/fine_tuning/jobs/{job_id}/checkpoints/{newest}"
    answer = live.http.get(f"{path}/files/model.safetensors")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "storage_unavailable")
    shutil.move(tmp_path / "away", root)
    assert live.http.get(f"{path}/files/model.safetensors").content == b"weights"


def test_a_damaged_result_is_no_model_and_never_replaced_by_an_older_one(
    live: Live, two: Any, error_of: Callable[..., Any]
) -> None:
    job_id, lease, (_, newest) = two
    lease.post("/complete", last_seq=0, checkpoint_id=newest)
    name = live.job(job_id)["fine_tuned_model"]
    (folder_of(live, job_id, 4) / "resume" / "state.json").unlink()
    scrub(live)
    assert error_of(live.http.get(f"/v1/models/{name}"))["code"] == "not_found"
    assert live.job(job_id, "/events")["data"][0]["message"].endswith(
        "restore its files from a backup"
    )
