"""A trainer rests while its lease cannot be renewed, by a clock of its worker that nobody sets."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dar.errors import ServiceUnavailableError
from dar.protocol.worker import Lease
from fakes.scripted_installation import ScriptedInstallation
from worker.attempt.main import SpoolSink, StdinControl
from worker.folders import AttemptFolder
from worker.launch import Order
from worker.supervisor import heartbeat
from worker.supervisor.heartbeat import Heartbeats
from worker.supervisor.state import AttemptState
from worker.supervisor.stopping import Parking

TTL = 60.0


class Recorder:
    """A trainer that records its orders, and a service that is there or not."""

    def __init__(self) -> None:
        self.orders: list[str] = []
        self.is_away = False

    def order(self, order: Order) -> None:
        self.orders.append(order.type)

    def heartbeat(self, *_: Any) -> None:
        if self.is_away:
            raise ServiceUnavailableError("away")

    def until_answered(self, call: Any, *_: Any, **__: Any) -> None:
        if not self.is_away:
            call()


def test_a_trainer_is_parked_at_three_quarters_of_the_ttl_whatever_the_wall_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elapsed = [1000.0]
    lease = Lease.model_construct(
        lease_id="lease-1", attempt=1, ttl_seconds=TTL, resume_checkpoint_id=None
    )
    folder = AttemptFolder(tmp_path / "attempts" / "lease-1")
    state = AttemptState(lease, folder, threading.Event())
    monkeypatch.setattr(heartbeat, "seconds_since_boot", lambda: elapsed[0])
    monkeypatch.setattr(time, "time", lambda: 1e9)  # an hour or decades off: nobody asks
    made: Any = Recorder()
    heartbeats = Heartbeats(state, made, 15.0)
    parking = Parking(state, lambda: elapsed[0])

    def pass_time(seconds: float) -> list[str]:
        elapsed[0] += seconds
        heartbeats._send()
        parking.enforce(made)
        return list(made.orders)

    heartbeats._send()
    assert (tmp_path / "alive").exists(), "the health check of a container reads its time"
    for _ in range(10):
        assert pass_time(15) == []
    made.is_away = True
    assert pass_time(44) == []
    assert pass_time(2) == ["park"]
    assert state.is_parked
    assert pass_time(3600) == ["park"]
    made.is_away = False
    assert pass_time(1) == ["park", "unpark"]
    assert not state.is_parked
    assert pass_time(15) == ["park", "unpark"]


@pytest.mark.parametrize(
    ("before", "last"),
    [([], "unpark"), ([], "drain"), ([], "cancel"), (["stop"], "unpark"), (["stop"], "drain")],
)
def test_a_parked_trainer_rests_after_its_step_until_it_may_go_on_or_has_to_stop(
    tmp_path: Path, before: list[str], last: str
) -> None:
    reader, writer = os.pipe()
    control = StdinControl(os.fdopen(reader, "rb"))
    control.begin()
    control.listen()
    (tmp_path / "spool").mkdir()
    sink = SpoolSink(AttemptFolder(tmp_path), rest=control.rest)

    def send(order: Any) -> None:
        os.write(writer, Order(type=order).model_dump_json().encode() + b"\n")

    sink.metrics(1, {"dar/loss": 1.0})  # it does not rest
    for order in before:
        send(order)
    send("park")
    deadline = time.monotonic() + 10
    while control._may_go_on.is_set():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    step = threading.Thread(target=sink.metrics, args=(2, {"dar/loss": 0.5}))
    step.start()
    step.join(0.1)
    assert step.is_alive()
    assert sink.flush() == 2, "the metrics of the step are there"
    send("stop")  # it can wait for the lease
    step.join(0.1)
    assert step.is_alive()
    send(last)
    step.join(10)
    assert not step.is_alive()
    assert control.requested() == ("stop" if last == "unpark" else last)


@pytest.mark.slow  # starts the service twice, and waits for the lease's time
def test_a_job_rests_while_the_service_is_away_and_loses_nothing(
    own: ScriptedInstallation,
) -> None:
    own.start_service(lease_ttl_seconds=4.0)
    job_id = own.submit(steps=120, every=20, seconds=0.05)
    own.start_worker()
    own.wait_step(job_id, 3)
    own.kill_service()
    own.until(lambda: "trainer parked" in own.log("worker"))
    time.sleep(0.5)  # the present step ends
    progress = next((own.home / "worker" / "slot-0" / "attempts").glob("*/progress*"))
    before = progress.read_bytes()
    time.sleep(1.0)
    assert progress.read_bytes() == before
    own.start_service(lease_ttl_seconds=4.0)
    job = own.wait(job_id, "succeeded", "failed", seconds=40)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    assert own.steps(job_id) == list(range(1, 121))
    assert "trainer goes on" in own.log("worker")
