"""The service and the broker go away, and come back."""

import time

import pytest

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
