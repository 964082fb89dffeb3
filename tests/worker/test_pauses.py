"""Pauses, stops and limits, seen from the worker: real processes, and a scripted trainer."""

import threading
import time
from collections.abc import Iterator
from typing import BinaryIO, cast

import pytest

from dar.protocol.worker import Fail, Release
from dar.training.report.sink import StopKind
from fakes.scripted_installation import ScriptedInstallation
from worker.attempt.main import StdinControl
from worker.launch import ExitCode, Order, TrainerResult
from worker.supervisor.child_process import TrainerExit
from worker.supervisor.outcome import Finished, Reason, judge


@pytest.mark.slow  # three attempts; tests/e2e pauses a job too
def test_a_paused_job_leaves_a_checkpoint_and_its_slot_to_others(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=60, every=1000, seconds=0.05)
    installation.start_worker(cancel_seconds=30.0, poll_seconds=30.0, heartbeat_seconds=15.0)
    installation.wait_step(job_id, 3)
    start = time.monotonic()
    assert installation.ask(job_id, "pause")["status"] == "pausing"
    job = installation.wait(job_id, "paused")
    assert time.monotonic() - start < 10, "no heartbeat, poll or signal was needed"
    assert (job["status_detail"], job["attempt"]) == ("by_user", 1)
    (checkpoint,) = installation.checkpoints(job_id)
    assert installation.steps(job_id) == list(range(1, checkpoint["step_number"] + 1))
    installation.until(lambda: installation.trainers() == [])
    other = installation.submit(steps=1)
    installation.start_worker(slot="other")
    installation.wait(other, "succeeded")
    installation.ask(job_id, "resume")
    job = installation.wait(job_id, "succeeded", "failed", seconds=40)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert installation.steps(job_id) == list(range(1, 61)), "a pause loses no step"


@pytest.mark.slow  # waits for the limit of a pause
def test_a_trainer_that_does_not_heed_a_pause_is_killed_and_the_job_paused(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=1000, every=1000, seconds=0.05, deaf="")
    installation.start_worker(drain_seconds=0.5)
    installation.wait_step(job_id, 2)
    installation.ask(job_id, "pause")
    installation.wait(job_id, "paused")
    installation.until(lambda: installation.trainers() == [])
    installation.cancel(job_id)


@pytest.mark.slow  # two workers
def test_a_worker_stopped_while_its_job_pauses_leaves_the_job_paused(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=1000, every=1000, seconds=0.2)
    worker = installation.start_worker()
    installation.wait_step(job_id, 2)
    installation.ask(job_id, "pause")
    assert installation.stop_worker(worker) < 15
    assert installation.job(job_id)["status"] == "paused"
    assert len(installation.checkpoints(job_id)) == 1
    installation.cancel(job_id)


def test_a_refusal_of_the_reward_service_pauses_the_job_with_its_reason_and_no_secret(
    installation: ScriptedInstallation,
) -> None:
    job_id = installation.submit(steps=4, exit="refused")
    installation.need_worker()
    job = installation.wait(job_id, "paused", "failed")
    assert (job["status"], job["status_detail"], job["error"]["code"]) == (
        "paused",
        "reward",
        "http_401",
    )
    assert "HTTP 401: not [redacted]" in job["status_message"]
    secret = (installation.home / "reward_secret").read_text().strip()
    assert secret not in str(job) + str(installation.messages(job_id))
    assert [item["step_number"] for item in installation.checkpoints(job_id)] == [2]
    installation.ask(job_id, "resume")
    job = installation.wait(job_id, "succeeded", "failed")
    assert (job["status"], job["attempt"], job["error"]) == ("succeeded", 2, None)
    assert installation.steps(job_id) == [1, 2, 3, 4]


def test_a_refusal_fails_the_job_whose_spec_says_so(installation: ScriptedInstallation) -> None:
    job_id = installation.submit(exit="refused", on_budget="fail")
    installation.need_worker()
    job = installation.wait(job_id, "paused", "failed")
    assert (job["status"], job["error"]["code"]) == ("failed", "http_401")


def exit_of(code: int) -> TrainerExit:
    return TrainerExit(code, "")


@pytest.mark.parametrize("asked", ["pause", None])
def test_a_trainer_that_finished_first_has_finished(asked: Reason | None) -> None:
    assert judge(1, exit_of(ExitCode.FINISHED), TrainerResult(last_seq=3), asked) == Finished(3)


def test_an_attempt_that_was_asked_to_pause_is_given_back_so() -> None:
    for code in (ExitCode.DRAINED, -9, ExitCode.CRASHED):
        assert judge(1, exit_of(code), None, "pause") == Release(attempt=1, reason="paused")


def test_a_stop_before_the_trainer_began_is_no_failure() -> None:
    assert judge(1, exit_of(ExitCode.DRAINED), None, "stop") == Release(attempt=1, reason="paused")


def test_want_of_rewards_is_told_as_what_it_is() -> None:
    said = TrainerResult(last_seq=3, code="reward_unavailable", message="HTTP 503", is_outage=True)
    verdict = judge(2, exit_of(ExitCode.REWARD_PAUSED), said, None)
    assert verdict == Release(
        attempt=2,
        reason="paused_reward",
        message="HTTP 503",
        code="reward_unavailable",
        is_outage=True,
    )
    assert isinstance(judge(2, exit_of(ExitCode.REWARD_PAUSED), None, None), Fail)


@pytest.mark.slow  # a worker process and two attempts
def test_a_job_ends_with_its_present_step_by_request_or_at_its_time_limit(
    installation: ScriptedInstallation,
) -> None:
    installation.start_worker(heartbeat_seconds=15.0)
    asked = installation.submit(steps=1000, every=1000, seconds=0.1)
    installation.wait_step(asked, 2)
    job = installation.ask(asked, "stop")
    assert (job["status"], job["status_detail"], job["actions"]) == (
        "running",
        "stopping",
        ["cancel"],
    )
    limited = installation.submit_spec(
        b'{"prompt": "Once"}\n',
        {
            "hyperparameters": {"max_steps": 1000},
            "rewards": {"components": [{"name": "r", "url": "http://127.0.0.1:61999/score"}]},
            "limits": {"max_seconds": 3},
        },
        metadata={"seconds": "0.1"},
    )
    for job_id in (asked, limited):
        job = installation.wait(job_id, "succeeded", "failed", seconds=40)
        assert (job["status"], job["attempt"]) == ("succeeded", 1)
        (checkpoint,) = installation.checkpoints(job_id)
        last = checkpoint["step_number"]
        assert job["progress"]["step"] == last < 1000
        assert installation.steps(job_id) == list(range(1, last + 1)), "nothing is lost"
        assert job["fine_tuned_model"]
    assert any("limits.max_seconds" in message for message in installation.messages(limited))


def open_stdin(*orders: StopKind) -> Iterator[bytes]:
    """Lines of a supervisor that lives on: an end of stdin would end this process."""
    for order in orders:
        yield Order(type=order).model_dump_json().encode()
    threading.Event().wait()


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        (["stop"], "stop"),
        (["stop", "drain", "stop"], "drain"),
        (["stop", "cancel", "drain"], "cancel"),
    ],
)
def test_a_stop_waits_for_the_first_step_and_yields_to_other_orders(
    orders: list[StopKind], expected: StopKind
) -> None:
    control = StdinControl(cast("BinaryIO", open_stdin(*orders)))
    if orders != ["stop"]:
        control.begin()
    control.listen()
    until = time.monotonic() + 10
    while control.requested() != expected and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)  # for the orders after it
    assert control.requested() == expected
