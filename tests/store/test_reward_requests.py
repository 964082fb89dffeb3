"""Reward requests under concurrency and time, on both databases."""

import hashlib
import threading
from functools import partial
from typing import Any

import pytest

from dar.protocol.worker import RewardAnnouncement
from fakes.world import World
from service.secret_box import SecretBox, new_key
from service.store import fence, reward_requests
from service.store.tables import RewardDeliveryRow, RewardRequestRow

TOKEN_HASH = "a" * 64
BOX = SecretBox([new_key()])


def announce(
    world: World, held: fence.Held, request_id: str, seconds: float = 60.0
) -> RewardRequestRow:
    wanted = RewardAnnouncement(
        request_id=request_id,
        component="letters",
        step=1,
        sample_ids=["s0"],
        token_sha256=TOKEN_HASH,
        deadline=world.clock.now.timestamp() + seconds,
    )
    with world.database.write() as transaction:
        now = fence.hold(transaction, held.attempt.lease_id, held.attempt.number)
        return reward_requests.announce(transaction, BOX, now, wanted, is_signature_required=False)


def result(text: str, webhook_id: str | None = None) -> reward_requests.CallbackResult:
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return reward_requests.CallbackResult(text, sha256, None, webhook_id)


def settle(world: World, request_id: str, found: reward_requests.CallbackResult) -> str:
    fate: str
    fate, _ = world.database.transact(
        lambda transaction: reward_requests.settle(transaction, request_id, found)
    )
    return fate


def at_once(*calls: Any) -> list[Any]:
    barrier = threading.Barrier(len(calls))
    outcomes: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        barrier.wait(10)
        outcomes[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


def read(world: World, held: fence.Held, after: int = 0) -> list[tuple[int, str, str]]:
    with world.database.read() as transaction:
        return list(reward_requests.results(transaction, held, after))


def test_of_results_that_come_at_once_exactly_one_wins(world: World) -> None:
    held = world.running()
    for number in range(5):
        request_id = f"rwq_{number}"
        announce(world, held, request_id)
        bodies = [result(f"{number} {worker}") for worker in range(6)]
        fates = at_once(*[partial(settle, world, request_id, body) for body in bodies])
        assert sorted(fates) == ["accepted"] + ["conflict"] * 5
        winner = bodies[fates.index("accepted")]
        assert read(world, held, 999 + number) == [(1000 + number, request_id, winner.text)]
        assert settle(world, request_id, winner) == "duplicate"


def test_results_are_numbered_without_gaps_however_they_come(world: World) -> None:
    held = world.running()
    ids = [f"rwq_{number}" for number in range(12)]
    for request_id in ids:
        announce(world, held, request_id)
    fates = at_once(*[partial(settle, world, name, result(name)) for name in ids])
    assert set(fates) == {"accepted"}
    found = read(world, held)
    assert [number for number, _, _ in found] == list(range(1000, 1012))
    assert sorted(request_id for _, request_id, _ in found) == sorted(ids)
    assert read(world, held, 1005) == found[6:]


def test_a_result_and_the_next_attempts_announcement_at_once_lose_nothing(world: World) -> None:
    for number in range(4):
        held = world.running()
        request_id = f"rwq_{number}"
        announce(world, held, request_id)
        again = world.claim(slot=f"slot-of-{held.job.id}", incarnation="life-2")
        stored, fate = at_once(
            partial(announce, world, again, request_id),
            partial(settle, world, request_id, result("x")),
        )
        assert fate == "accepted"
        # Either the announcement has brought it, or the directives do.
        assert [body for _, _, body in read(world, again)] == ["x"]
        assert stored.result in {"x", None}


def test_a_signed_message_is_good_for_one_request_only(world: World) -> None:
    one, two = world.running(), world.running()
    announce(world, one, "rwq_1")
    announce(world, two, "rwq_2")
    fates = at_once(
        partial(settle, world, "rwq_1", result("x", "rwr_1")),
        partial(settle, world, "rwq_2", result("x", "rwr_1")),
    )
    assert sorted(fates) == ["accepted", "replayed"]
    world.clock.advance(601)
    assert settle(world, "rwq_1", result("y", "rwr_2")) in {"conflict", "late"}
    with world.database.read() as transaction:
        assert [row.id for row in transaction.query(RewardDeliveryRow).all()] == ["rwr_2"]


def test_a_page_of_results_has_a_bound_but_never_none(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = world.running()
    monkeypatch.setattr(reward_requests, "PAGE_BYTES", 100)
    for request_id, size in (("rwq_1", 60), ("rwq_2", 60), ("rwq_3", 200)):
        announce(world, held, request_id)
        assert settle(world, request_id, result("x" * size)) == "accepted"
    assert [number for number, _, _ in read(world, held)] == [1000]
    assert [number for number, _, _ in read(world, held, 1001)] == [1002]


def test_old_requests_are_forgotten_once_nobody_can_ask_for_them(world: World) -> None:
    held = world.running()
    announce(world, held, "rwq_1")
    announce(world, held, "rwq_2", seconds=86_400 * 30)
    for days, left in ((3, 2), (5, 1)):
        world.clock.advance(86_400 * days)
        with world.database.write() as transaction:
            reward_requests.forget(transaction)
        with world.database.read() as transaction:
            assert transaction.query(RewardRequestRow).count() == left
