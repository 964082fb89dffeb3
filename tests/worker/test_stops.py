"""Stops and limits, seen from the worker: real service, real worker process, scripted trainer."""

import threading
import time
from collections.abc import Iterator
from typing import BinaryIO, cast

import pytest

from dar.training.report.sink import StopKind
from fakes.scripted_installation import ScriptedInstallation
from worker.attempt.main import StdinControl
from worker.launch import Order


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
