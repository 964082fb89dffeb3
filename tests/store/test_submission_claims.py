"""Tries of a submission without a key: which of them belong together, and for how long."""

import threading
from collections.abc import Sequence
from datetime import timedelta

import pytest

from fakes.world import World
from service.store import submission_claims
from service.store.submission_claims import FIRST_WINDOW, RETRY_WINDOW

BODY = "f" * 64
BOTH = (FIRST_WINDOW.total_seconds(), RETRY_WINDOW.total_seconds())


def send(world: World, number: int, key: str = "key-1", body: str = BODY) -> str:
    """Send a try; gives the id of its job."""
    job_id = None
    with world.database.write() as transaction:
        claim = submission_claims.lock(transaction, key, body)
        job = claim.take(number)
        if job is not None:
            return job.id
        world.clock.advance(1)
        job_id = f"ftjob-{world.clock.now.timestamp()}-{number}-{key}"
        world.store(transaction, id=job_id, api_key_id=key, body_sha256=body, retry_count=number)
        claim.add(job_id, number)
    return job_id


def jobs_of(world: World, numbers: Sequence[int]) -> list[int]:
    """For each try, sent in this order, the number of its job, from 0."""
    ids = [send(world, number) for number in numbers]
    return [list(dict.fromkeys(ids)).index(one) for one in ids]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0, 1, 2], [0, 0, 0]),
        ([1, 0, 2], [0, 0, 0]),
        ([2, 1, 0], [0, 0, 0]),
        ([0, 0], [0, 1]),  # meant twice
        ([0, 1, 0, 1], [0, 0, 1, 1]),
        ([0, 0, 1, 1], [0, 1, 1, 0]),  # two calls at the same time
        ([1, 0, 0], [0, 0, 1]),
    ],
)
def test_a_call_has_each_try_once(world: World, numbers: list[int], expected: list[int]) -> None:
    assert jobs_of(world, numbers) == expected


def test_tries_of_another_key_or_body_are_other_calls(world: World) -> None:
    first = send(world, 0)
    assert send(world, 1, key="key-2") != first
    assert send(world, 1, body="e" * 64) != first
    assert send(world, 1) == first


@pytest.mark.parametrize(("number", "seconds"), [(1, BOTH[1]), (0, BOTH[0])])
@pytest.mark.parametrize("jump", [0, 3600, -3600])
def test_a_try_is_recognised_for_as_long_as_a_client_retries(
    world: World, number: int, seconds: float, jump: float
) -> None:
    first = send(world, 1 - number)

    def pass_time(seconds: float) -> None:
        world.clock.advance(seconds)

    world.clock.advance(jump)
    if jump > 0:  # the reconciler has found that the clock was set
        with world.database.write() as transaction:
            submission_claims.shift(transaction, timedelta(seconds=jump))
    pass_time(seconds - 5)
    assert send(world, number) == first
    pass_time(BOTH[1] + max(0, -jump) + 5)
    assert send(world, 2) != first
    pass_time(BOTH[1] + 5)
    with world.database.write() as transaction:
        submission_claims.forget(transaction)
        assert submission_claims.find(transaction, "key-1", BODY) is None


def test_jobs_that_an_earlier_version_has_stored_are_known(world: World) -> None:
    with world.database.write() as transaction:
        world.store(transaction, id="ftjob-old", body_sha256=BODY)
        other = {"body_sha256": BODY, "idempotency_key": "k"}
        world.store(transaction, id="ftjob-keyed", **other)
    assert send(world, 1) == "ftjob-old"


def test_tries_at_the_same_time_wait_for_each_other(world: World) -> None:
    start, ids = threading.Barrier(3), []

    def run(number: int) -> None:
        start.wait(10)
        ids.append(send(world, number))

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(ids) == 3
    assert len(set(ids)) == 1
