"""Whole attempts: real service, real worker process, scripted trainer."""

import signal
import time
from pathlib import Path

import pytest

from fakes.scripted_installation import ScriptedInstallation


def kept_log(installation: ScriptedInstallation, job_id: str, attempt: int) -> Path:
    return installation.home / "worker" / "slot-0" / "logs" / f"{job_id}-{attempt}.log"


def test_a_job_runs_to_its_end_and_leaves_only_its_log_on_the_workers_disk(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=4, every=2)
    installation.need_worker()
    job = installation.wait(job_id, "succeeded", "failed")
    assert job["status"] == "succeeded", job
    assert installation.steps(job_id) == [1, 2, 3, 4]
    assert [item["step_number"] for item in installation.checkpoints(job_id)] == [4, 2]
    installation.until(lambda: installation.attempt_folders() == [])
    assert kept_log(installation, job_id, 1).is_file()


def test_the_trainer_gets_the_validation_file_and_without_a_hub_the_name_of_a_data_set(
    installation: ScriptedInstallation,
) -> None:
    content = '{"prompt": "Twice"}\n'
    dar = {
        "hyperparameters": {"max_steps": 1},
        "rewards": {"components": [{"name": "r", "url": "http://127.0.0.1:61999/score"}]},
        "evaluation": {"every_steps": 1},
    }
    fields = {
        "training_file": "hf://trl-lib/ultrafeedback-prompt?split=train",
        "validation_file": installation.upload(content.encode()),
    }
    job_id = installation.submit_spec(b'{"prompt": "unused"}\n', dar, **fields)
    installation.start_worker(is_offline=True)
    job = installation.wait(job_id, "succeeded", "failed")
    assert job["status"] == "succeeded", job
    said = installation.messages(job_id)
    assert f"validation file: {content}" in said
    assert "no training file: hf://trl-lib/ultrafeedback-prompt?split=train" in said


def test_a_crash_is_tried_again_from_the_last_checkpoint_and_tells_why(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=6, every=2, crash_at=4)
    installation.need_worker()
    job = installation.wait(job_id, "succeeded", "failed")
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert installation.steps(job_id) == [1, 2, 3, 4, 5, 6]
    said = installation.messages(job_id)
    assert any("RuntimeError: a cosmic ray" in text for text in said)
    assert not any("Traceback" in text for text in said)
    kept = kept_log(installation, job_id, 1).read_text()
    shown = installation.api("GET", f"/fine_tuning/jobs/{job_id}/logs", params={"attempt": 1})
    assert (shown["text"], shown["bytes"]) == (kept, len(kept))
    assert "a cosmic ray" in kept
    params = {"order": "asc", "limit": 1}
    first = installation.api("GET", f"/fine_tuning/jobs/{job_id}/events", params=params)["data"][0]
    assert f"job {job_id}, submitted by request {first['data']['request_id']}" in kept


@pytest.mark.slow  # two attempts
def test_a_trainer_killed_by_the_kernel_is_tried_again_with_a_hint(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=3, every=1, crash_at=1, die="")
    installation.need_worker()
    job = installation.wait(job_id, "succeeded", "failed")
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert any("SIGKILL" in text and "memory" in text for text in installation.messages(job_id))


def test_a_model_removed_after_the_submission_fails_the_job_at_once(
    installation: ScriptedInstallation,
) -> None:
    folder = installation.home / "models" / "tiny"
    installation.stop_plain_worker()
    job_id = installation.submit(steps=1, every=1)
    aside = folder.rename(folder.with_name(".aside"))
    try:
        installation.need_worker()
        job = installation.wait(job_id, "succeeded", "failed")
    finally:
        aside.rename(folder)
    assert (job["status_detail"], job["attempt"]) == ("user_error", 1)
    assert (job["error"]["code"], job["error"]["param"]) == ("model_not_found", "model")
    assert "the model 'tiny' was removed after the job was submitted" in job["error"]["message"]


def test_an_error_of_the_users_fails_the_job_with_its_parameter(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(exit="user")
    installation.need_worker()
    job = installation.wait(job_id, "succeeded", "failed")
    assert job["error"] == {
        "code": "training_failed",
        "message": "the data cannot work",
        "param": "training_file",
    }
    assert job["attempt"] == 1


def test_a_nul_is_shown_as_a_replacement_character(installation: ScriptedInstallation) -> None:
    job_id = installation.submit(nul="")
    installation.need_worker()
    job = installation.wait(job_id, "succeeded", "failed")
    assert job["error"]["message"] == "an odd\N{REPLACEMENT CHARACTER}prompt"
    assert "an odd\N{REPLACEMENT CHARACTER}event" in installation.messages(job_id)
    (sample,) = installation.api("GET", f"/fine_tuning/jobs/{job_id}/samples")["data"]
    said = [sample["prompt"], sample["completion"], sample["feedback"]["r"]]
    assert said == [f"{a}\N{REPLACEMENT CHARACTER}{b}" for a, b in ("ab", "cd", "ef")]


@pytest.mark.slow  # a whole attempt
def test_rows_that_the_service_refuses_end_the_attempt_with_its_words(
    own: ScriptedInstallation,
) -> None:
    own.start_service()
    job_id = own.submit(steps=1000, every=1000, seconds=0.05, metric="dar/none")
    own.start_worker()
    own.until(lambda: any("no metric 'dar/none'" in text for text in own.messages(job_id)))
    assert own.job(job_id)["status"] == "queued"
    assert own.trainers() == []
    assert len(own.attempt_folders()) == 1, "the rows are kept for whoever looks into it"


def test_an_input_that_is_gone_is_said(installation: ScriptedInstallation) -> None:
    job_id = installation.submit()
    file_id = installation.job(job_id)["training_file"]
    (installation.home / "artifacts" / "files" / file_id).unlink()
    installation.need_worker()
    installation.until(
        lambda: any("its content is missing" in text for text in installation.messages(job_id)),
        seconds=10,
    )
    installation.cancel(job_id)


def test_only_their_user_reads_the_files_of_an_attempt(installation: ScriptedInstallation) -> None:
    job_id = installation.submit(steps=1000, every=2, seconds=0.05)
    installation.start_worker()
    installation.wait_step(job_id, 3)
    for folder in ("worker", "artifacts"):
        made = [installation.home / folder, *(installation.home / folder).rglob("*")]
        assert len(made) > 5
        assert [path for path in made if path.exists() and path.stat().st_mode & 0o077] == []
    installation.cancel(job_id)


def test_a_model_folder_on_the_worker_with_a_link_out_of_it_is_not_used(
    installation: ScriptedInstallation, tmp_path: Path
) -> None:
    elsewhere = tmp_path
    (elsewhere / "tiny").mkdir(parents=True)
    (elsewhere / "tiny" / "config.json").symlink_to(installation.home / "api_key")
    job_id = installation.submit()
    installation.start_worker(models_dir=elsewhere)
    said = installation.until(
        lambda: [text for text in installation.messages(job_id) if "symbolic link" in text],
        seconds=20,
    )
    assert "config.json in" in said[0]
    installation.cancel(job_id)


def test_a_reward_service_that_is_down_puts_the_job_back_with_the_reason(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(exit="reward")
    installation.need_worker()
    job = installation.until(
        lambda: (j := installation.job(job_id))["status_detail"] == "waiting_for_reward" and j
    )
    assert job["status"] == "queued"
    assert "connection refused" in job["status_message"]
    installation.cancel(job_id)


def test_a_cancelled_trainer_is_asked_and_leaves_by_itself(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=1000, every=1000, seconds=0.05)
    installation.start_worker(cancel_seconds=30.0, poll_seconds=30.0, heartbeat_seconds=15.0)
    installation.wait_step(job_id, 2)
    start = time.monotonic()
    installation.cancel(job_id)
    installation.wait(job_id, "cancelled")
    assert time.monotonic() - start < 10, "no heartbeat, poll or signal was needed"
    installation.until(lambda: installation.trainers() == [])


@pytest.mark.slow  # waits for the limit of a cancellation
def test_a_trainer_that_does_not_heed_a_cancellation_is_terminated(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=1000, every=1000, seconds=0.05, deaf="")
    installation.start_worker(cancel_seconds=0.3)
    installation.wait_step(job_id, 2)
    installation.cancel(job_id)
    installation.wait(job_id, "cancelled")
    installation.until(lambda: installation.trainers() == [])


@pytest.mark.slow  # two workers
def test_a_stopped_worker_drains_with_a_checkpoint_and_its_successor_goes_on(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=40, every=1000, seconds=0.05)
    worker = installation.start_worker()
    installation.wait_step(job_id, 3)
    assert installation.stop_worker(worker) < 10
    job = installation.job(job_id)
    assert job["status"] == "queued"
    (checkpoint,) = installation.checkpoints(job_id)
    done = installation.steps(job_id)
    assert done == list(range(1, checkpoint["step_number"] + 1)), "a drain loses no step"
    installation.start_worker()
    assert installation.wait(job_id, "succeeded", "failed")["attempt"] == 2
    assert installation.steps(job_id) == list(range(1, 41))
    assert installation.row_problems(job_id) == []


@pytest.mark.slow  # waits for the drain limit
def test_a_trainer_that_does_not_drain_in_time_is_killed_and_the_job_goes_back(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=1000, every=1000, seconds=0.05, deaf="")
    worker = installation.start_worker(drain_seconds=0.5)
    installation.wait_step(job_id, 2)
    assert installation.stop_worker(worker) < 10
    assert installation.trainers() == []
    assert installation.job(job_id)["status"] == "queued"
    installation.cancel(job_id)


def test_a_killed_worker_takes_its_trainer_along_and_its_successor_goes_on_at_once(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=40, every=5, seconds=0.05)
    worker = installation.start_worker(spool_seconds=0.5)
    installation.until(lambda: installation.checkpoints(job_id))
    worker.kill()
    worker.wait()
    installation.until(lambda: installation.trainers() == [], seconds=2)
    installation.start_worker()
    job = installation.wait(job_id, "succeeded", "failed")
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    said = " ".join(installation.messages(job_id))
    assert "was restarted" in said, "its claim ended the lease of the killed worker"
    assert "has sent no heartbeat" not in said, "the lease would have expired later"
    assert installation.steps(job_id) == list(range(1, 41))
    assert installation.row_problems(job_id) == []
    installation.until(lambda: installation.attempt_folders() == [])
    assert kept_log(installation, job_id, 1).is_file(), "that of the worker that was killed"


@pytest.mark.slow  # two workers
def test_what_a_dead_worker_had_not_sent_is_sent_by_its_successor(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=1000, every=1000, seconds=0.02)
    earlier = set(installation.attempt_folders())  # a worker killed by another test leaves its own
    worker = installation.start_worker(spool_seconds=60.0)
    (folder,) = installation.until(lambda: set(installation.attempt_folders()) - earlier)
    spool = installation.home / "worker" / "slot-0" / "attempts" / folder / "spool"
    written = spool / "000000000001.jsonl"
    installation.until(lambda: written.exists() and written.read_bytes().count(b"\n") >= 20)
    worker.kill()
    worker.wait()
    assert len(installation.steps(job_id)) < 20
    installation.cancel(job_id)
    installation.start_worker()
    installation.until(lambda: len(installation.steps(job_id)) >= 20)
    installation.wait(job_id, "cancelled")


@pytest.mark.slow  # waits until a lease expires
def test_a_worker_that_was_frozen_is_turned_away_when_it_wakes(own: ScriptedInstallation) -> None:
    own.start_service(lease_ttl_seconds=1.0)
    job_id = own.submit(steps=120, every=5, seconds=0.05)
    frozen = own.start_worker(slot="frozen")
    own.until(lambda: own.checkpoints(job_id))
    frozen.send_signal(signal.SIGSTOP)  # its trainer goes on, and gets ahead of its successor
    successor = own.start_worker(slot="successor")
    own.until(lambda: own.job(job_id)["attempt"] == 2)
    assert own.trainers_of("frozen")
    frozen.send_signal(signal.SIGCONT)
    own.until(lambda: own.trainers_of("frozen") == [], seconds=2)
    path = f"/fine_tuning/jobs/{job_id}/metrics"
    [undone] = own.until(lambda: own.api("GET", path, params={"rewound": True})["rewound"])
    assert undone["attempt"] == 1
    assert own.wait(job_id, "succeeded", "failed")["attempt"] == 2
    assert own.row_problems(job_id) == []
    assert own.steps(job_id) == list(range(1, 121))
    assert frozen.poll() is None
    own.stop_worker(successor)
