"""The service and the broker go away, and come back."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.postgres import Postgres
from fakes.scripted_installation import ScriptedInstallation, Valkey


@pytest.mark.slow  # starts the service three times
def test_a_service_that_is_away_before_and_amid_a_job_costs_nothing(
    own: ScriptedInstallation,
) -> None:
    own.start_service()
    job_id = own.submit(steps=60, every=10, seconds=0.05)
    own.kill_service()
    worker = own.start_worker()
    own.until(lambda: "service away" in own.log("worker"))
    assert worker.poll() is None
    own.start_service()
    own.wait_step(job_id, 3)
    own.kill_service()
    own.start_service()
    job = own.wait(job_id, "succeeded", "failed")
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    assert own.steps(job_id) == list(range(1, 61))
    assert own.row_problems(job_id) == []
    assert own.checkpoints(job_id)[0]["step_number"] == 60


@pytest.mark.slow  # three processes, and waits for the service
def test_a_job_that_ends_while_the_service_is_away_succeeds_when_it_is_back(
    own: ScriptedInstallation,
) -> None:
    own.start_service()
    job_id = own.submit(steps=20, every=10, seconds=0.03)
    own.start_worker()
    own.until(own.trainers)
    own.kill_service()
    own.until(lambda: own.trainers() == [])
    own.start_service()
    job = own.wait(job_id, "succeeded", "failed")
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    assert own.steps(job_id) == list(range(1, 21))
    assert own.row_problems(job_id) == []


@pytest.mark.slow  # waits until the worker gives up
def test_a_worker_that_is_stopped_while_the_service_is_away_still_leaves(
    own: ScriptedInstallation,
) -> None:
    own.start_service()
    job_id = own.submit(steps=1000, every=1000, seconds=0.05)
    worker = own.start_worker(drain_seconds=1.0)
    own.wait_step(job_id, 2)
    own.kill_service()
    assert own.stop_worker(worker, seconds=40) < 30
    own.start_service()
    own.start_worker()
    own.until(lambda: own.job(job_id)["attempt"] == 2)


@pytest.mark.slow  # starts a broker, a service and a worker, and waits for a poll
def test_a_wake_up_starts_a_job_long_before_the_next_poll(
    own: ScriptedInstallation, valkey: Valkey
) -> None:
    valkey.start()
    own.broker_url = valkey.url
    own.start_service()
    worker = own.start_worker(poll_seconds=30.0)
    own.wait(own.submit(steps=1), "succeeded")
    time.sleep(
        1.0
    )  # the worker has looked again, found nothing, and now only a message can wake it
    start = time.monotonic()
    job_id = own.submit(steps=1)
    own.until(lambda: own.job(job_id)["attempt"] == 1)
    assert time.monotonic() - start < 5
    own.wait(job_id, "succeeded")
    assert own.stop_worker(worker) < 15


@pytest.mark.slow  # waits for polls
def test_a_broker_that_dies_or_never_was_only_costs_the_poll(
    own: ScriptedInstallation, valkey: Valkey
) -> None:
    own.broker_url = valkey.url  # nobody listens there yet
    own.start_service()
    worker = own.start_worker()
    own.wait(own.submit(steps=2), "succeeded")
    valkey.start()
    own.wait(own.submit(steps=2), "succeeded")
    running = own.submit(steps=40, seconds=0.05)
    own.wait_step(running, 2)
    valkey.stop()
    assert own.wait(running, "succeeded", "failed")["attempt"] == 1
    own.wait(own.submit(steps=2), "succeeded")
    assert own.stop_worker(worker) < 15


@pytest.mark.slow  # starts the worker twice
def test_a_busy_worker_is_drained_by_sigterm_with_and_without_its_broker(
    own: ScriptedInstallation, valkey: Valkey
) -> None:
    valkey.start()
    own.broker_url = valkey.url
    own.start_service()
    job_id = own.submit(steps=1000, every=1000, seconds=0.05)
    for attempt in (1, 2):
        done = own.job(job_id)["progress"]["step"]
        worker = own.start_worker()
        own.until(lambda attempt=attempt: own.job(job_id)["attempt"] == attempt)
        own.until(lambda done=done: own.job(job_id)["progress"]["step"] > done)
        assert own.stop_worker(worker) < 15
        assert own.job(job_id)["status"] == "queued"
        valkey.stop()
    assert len(own.checkpoints(job_id)) == 2


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def brokerless(
    request: pytest.FixtureRequest, own: ScriptedInstallation, valkey: Valkey
) -> Iterator[ScriptedInstallation]:
    """A service on each database, whose broker was never started."""
    own.broker_url = valkey.url
    if request.param == "sqlite":
        own.start_service()
        yield own
        return
    # pytest's own folders are closed to the user that PostgreSQL runs as.
    folder = Path(tempfile.mkdtemp(prefix="dar-pg-"))
    folder.chmod(0o755)
    server = Postgres(folder)
    try:
        server.wait()
        own.database_url = server.url(server.create())
        own.start_service()
        yield own
    finally:
        own.close()
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow  # a service, and workers that are stopped and killed
def test_all_that_users_and_operators_do_works_although_the_broker_was_never_started(
    brokerless: ScriptedInstallation,
) -> None:
    own = brokerless
    assert own.readiness()["checks"]["broker"] != "ok"
    seconds = []
    waiting = []
    for _ in range(20):
        start = time.monotonic()
        waiting.append(own.submit(steps=2))
        seconds.append(time.monotonic() - start)
    assert sorted(seconds)[-2] < 2.5, "a submission waits for the broker"
    for job_id in waiting[:10]:
        own.cancel(job_id)
    own.ask(waiting[10], "pause")
    worker = own.start_worker(slot="a b")
    for job_id in waiting[11:]:
        assert own.wait(job_id, "succeeded", "failed", seconds=60)["attempt"] == 1
        assert own.row_problems(job_id) == []
    own.ask(waiting[10], "resume")
    own.wait(waiting[10], "succeeded")

    cancelled, stopped, long = (own.submit(steps=500, every=50, seconds=0.02) for _ in range(3))
    own.wait_step(cancelled, 1)
    start = time.monotonic()
    own.cancel(cancelled)
    own.wait(cancelled, "cancelled")
    own.wait_step(stopped, 1)
    assert time.monotonic() - start < 10
    own.ask(stopped, "stop")
    assert 1 <= own.wait(stopped, "succeeded")["progress"]["step"] < 500
    own.wait_step(long, 1)
    own.ask(long, "pause")
    own.wait(long, "paused")
    own.ask(long, "resume")
    own.until(lambda: own.job(long)["attempt"] == 2)
    own.until(own.trainers)
    assert own.stop_worker(worker) < 15
    assert own.job(long)["status"] == "queued"
    killed = own.start_worker(slot="a b")
    own.until(lambda: own.job(long)["attempt"] == 3)
    killed.kill()
    killed.wait()
    own.start_worker(slot="a b")
    assert own.wait(long, "succeeded", "failed", seconds=60)["attempt"] == 4
    assert own.is_undisturbed(long)
    assert own.row_problems(long) == []
    own.api("DELETE", f"/fine_tuning/jobs/{cancelled}")
    assert own.findings() == []
