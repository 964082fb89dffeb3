"""Whose fault a failure is decides whether it counts against the job."""

from collections.abc import Callable
from typing import Any

import pytest

from dar.protocol.worker import Fail, FailureOwner, Release
from fakes.world import World
from service.store import fence, jobs, outcomes, tables


def fail(world: World, held: fence.Held, owner: FailureOwner | None, **values: Any) -> str | None:
    """The detail of the job after its attempt failed; the job is due again at once."""
    said = {"kind": "transient", "code": "it_failed", "message": "it failed"} | values
    report = Fail(attempt=held.attempt.number, owner=owner, **said)
    with world.database.write() as transaction:
        detail = outcomes.end(transaction, held.attempt.lease_id, report).status_detail
    world.clock.advance(700)
    return detail


def lose(world: World, held: fence.Held) -> tables.JobRow:
    with world.database.write() as transaction:
        now = fence.lock(transaction, held.attempt.lease_id)
        outcomes.lose(transaction, now, f"the worker on {held.attempt.node} was restarted")
    return world.job(held.job.id)


@pytest.mark.parametrize(
    ("owner", "counts", "is_poison"),
    [
        ("user", None, True),
        (None, None, True),
        ("service", None, True),
        ("service", False, False),
        ("worker", None, False),
        ("reward", None, False),
        ("storage", None, False),
        ("database", None, False),
    ],
)
def test_only_failures_of_the_job_itself_count(
    world: World, owner: FailureOwner | None, counts: bool | None, is_poison: bool
) -> None:
    job_id = world.submit()
    details = [fail(world, world.claim(), owner, counts=counts) for _ in range(2)]
    assert details == ["backoff", "backoff"]
    for number in range(1, 5):
        detail = fail(world, world.claim(), owner, counts=counts)
        if is_poison:
            break
        assert detail == "backoff", number
    job = world.job(job_id)
    assert (job.status_detail == "poison") is is_poison
    if is_poison:
        assert (job.attempt, job.error["code"]) == (3, "poison")
        assert "3 attempts in a row failed without a newer checkpoint" in job.error["message"]
    assert job.failures == {owner or "unknown": job.attempt}
    newest = world.events(job_id)[-1]
    assert newest.data["owner"] == owner


def test_failures_of_others_neither_count_nor_reset(world: World) -> None:
    job_id = world.submit()
    for owner in ("user", "worker", "user", "storage", "database"):
        assert fail(world, world.claim(), owner) == "backoff"
    assert fail(world, world.claim(), "user") == "poison"
    assert world.job(job_id).failures == {"user": 3, "worker": 1, "storage": 1, "database": 1}


def test_an_attempt_with_a_newer_checkpoint_is_no_fruitless_one(world: World) -> None:
    """Two failures after a success are two."""
    job_id = world.submit()
    held = world.claim()
    world.publish(held, 5)
    for _ in range(3):
        assert fail(world, held, "user") == "backoff"
        held = world.claim()
    assert held.attempt.start_step == 5
    assert fail(world, held, "user") == "poison"
    assert world.job(job_id).attempt == 4


def test_a_preemptible_machine_never_ends_a_job_that_progresses(world: World) -> None:
    job_id = world.submit(total_steps=100)
    for number in range(1, 22):
        held = world.claim()
        world.publish(held, number)
        if number % 4:
            lose(world, held)
        else:
            fail(world, held, "user")
    job = world.job(job_id)
    assert (job.status, job.attempt, job.fruitless_attempts) == ("queued", 21, 0)


def test_a_checkpoint_that_is_not_newer_is_no_progress(world: World) -> None:
    world.submit()
    held = world.claim()
    world.publish(held, 5)
    fail(world, held, "user")
    for expected in ("backoff", "backoff", "poison"):
        held = world.claim()
        world.publish(held, 5)
        assert fail(world, held, "user") == expected


def test_a_job_that_is_lost_on_three_nodes_is_at_fault_itself(world: World) -> None:
    job_id = world.submit()
    for node in ("a", "b"):
        assert lose(world, world.claim(node=node)).status == "queued"
    job = lose(world, world.claim(node="c"))
    assert (job.id, job.status_detail) == (job_id, "poison")
    assert "lost on 3 nodes (a, b, c)" in job.error["message"]
    for cause in ("memory", "the machine", "data or model"):
        assert cause in job.error["message"]


def test_a_job_that_is_lost_five_times_on_one_node_is_at_fault_itself(world: World) -> None:
    world.submit()
    for _ in range(4):
        assert lose(world, world.claim()).status == "queued"
    job = lose(world, world.claim())
    assert job.status_detail == "poison"
    assert "lost 5 times on node-1" in job.error["message"]


def test_a_crash_that_the_job_may_cause_counts_on_three_nodes_only(world: World) -> None:
    job_id = world.submit()
    for _ in range(9):
        held = world.claim(node="a")
        assert fail(world, held, "worker", code="device_failed") == "backoff"
    fail(world, world.claim(node="b"), "worker", code="device_failed")
    for _ in range(3):
        assert fail(world, world.claim(node="c"), "worker", code="disk_full") == "backoff"
    assert fail(world, world.claim(node="c"), "worker", code="trainer_crashed") == "poison"
    assert world.job(job_id).attempt == 14


def test_a_newer_checkpoint_and_a_resume_reset_every_count(
    world: World, a_file: Callable[[str], None]
) -> None:
    a_file("file-1")
    job_id = world.submit()
    for _ in range(4):
        lose(world, world.claim())
    held = world.claim()
    world.publish(held, 3)
    lose(world, held)
    for _ in range(4):
        assert lose(world, world.claim()).status == "queued"
    assert lose(world, world.claim()).status_detail == "poison"
    with world.database.write() as transaction:
        jobs.resume(transaction, world.project_id, job_id)
    for _ in range(4):
        assert lose(world, world.claim()).status == "queued"


def test_drained_attempts_are_never_poison(world: World) -> None:
    job_id = world.submit()
    for number in range(1, 9):
        held = world.claim()
        with world.database.write() as transaction:
            said = Release(attempt=number, reason="drained")
            outcomes.end(transaction, held.attempt.lease_id, said)
    job = world.job(job_id)
    assert (job.status, job.failures) == ("queued", None)
