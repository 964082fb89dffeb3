"""Leases: one attempt at a time, the fence, and what becomes of a job when its attempt ends."""

import threading
from datetime import timedelta
from typing import Any

import pytest

from dar.errors import ConflictError, FencedError
from dar.protocol.worker import AttemptProgress, Complete, Fail, Outcome, Release
from fakes.world import World
from service.store import fence, jobs, leases, outcomes, reward_pauses


def end(world: World, held: fence.Held, said: Complete | Fail | Release) -> Outcome:
    with world.database.write() as transaction:
        return outcomes.end(transaction, held.attempt.lease_id, said)


def transient(attempt: int = 1) -> Fail:
    return Fail(attempt=attempt, kind="transient", code="trainer_died", message="signal 9")


def cancel(world: World, job_id: str) -> None:
    with world.database.write() as transaction:
        jobs.cancel(transaction, world.project_id, job_id)


def test_the_oldest_job_that_is_due_is_given_first(world: World) -> None:
    later = world.clock.now.replace(year=2030)
    world.submit(not_before=later)
    second, third = world.submit(), world.submit()
    claims = [world.claim(slot) for slot in "abc"]
    assert [held and held.job.id for held in claims] == [second, third, None]


def test_a_claim_starts_an_attempt(world: World) -> None:
    held = world.running()
    job = world.job(held.job.id)
    assert (job.status, job.status_detail, job.attempt) == ("running", "starting", 1)
    assert job.started_at == world.clock.now
    assert world.attempt(held).status == "running"
    assert world.events(job.id)[-1].data["node"] == "node-1"


def test_many_claimers_never_get_the_same_job(world: World) -> None:
    expected = {world.submit() for _ in range(20)}
    claimed: list[str] = []

    def take(worker: int) -> None:
        count = 0
        while (held := world.claim(f"{worker}-{count}")) is not None:
            claimed.append(held.job.id)
            count += 1

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(expected)


def test_a_new_life_of_the_slot_frees_what_the_old_one_held(world: World) -> None:
    job_id = world.submit()
    first = world.claim("0", incarnation="life-1")
    second = world.claim("0", incarnation="life-2")
    assert second.job.id == job_id
    assert second.attempt.number == 2
    assert world.attempt(first).status == "lost"
    assert world.job(job_id).status == "running"


def test_another_slot_of_the_node_keeps_its_lease(world: World) -> None:
    held = world.running()
    assert world.claim("other", incarnation="life-9") is None
    assert world.attempt(held).status == "running"


def test_a_restart_of_the_machine_frees_all_its_slots(world: World) -> None:
    for _ in range(2):
        world.submit()
    held = [world.claim(slot, report=world.report()) for slot in "ab"]
    elsewhere_job = world.submit()
    elsewhere = world.claim("0", node="node-2")
    assert world.claim("new-slot", boot_id="boot-2", report=world.report()) is not None
    assert [world.attempt(one).status for one in held] == ["lost", "lost"]
    assert world.attempt(elsewhere).status == "running"
    assert world.job(elsewhere_job).status == "running"


def test_the_fence_turns_a_late_attempt_away(world: World) -> None:
    job_id = world.submit()
    first = world.claim("0", incarnation="life-1")
    world.claim("0", incarnation="life-2")
    for said in (transient(), Release(attempt=1, reason="drained")):
        with pytest.raises(FencedError):
            end(world, first, said)
    with pytest.raises(FencedError), world.database.write() as transaction:
        fence.hold(transaction, first.attempt.lease_id, 1)
    assert world.job(job_id).attempt == 2


def test_an_attempt_cannot_write_under_another_number(world: World) -> None:
    held = world.running()
    with pytest.raises(FencedError), world.database.write() as transaction:
        fence.hold(transaction, held.attempt.lease_id, 2)


def test_a_heartbeat_renews_the_lease_and_shows_what_is_done(
    world: World, ttl_seconds: float
) -> None:
    held = world.running()
    world.clock.advance(ttl_seconds - 1)
    progress = AttemptProgress(phase="sampling", step=3, message="24 of 64")
    with world.database.write() as transaction:
        now = fence.hold(transaction, held.attempt.lease_id, 1)
        assert leases.renew(transaction, now, timedelta(seconds=ttl_seconds), progress)
    lease_id, seen = held.attempt.lease_id, held.attempt.lease_until
    with world.database.write() as transaction:
        assert leases.running(transaction) == {lease_id: seen + timedelta(seconds=ttl_seconds - 1)}
        assert not leases.expire(transaction, lease_id, seen)
    job = world.job(held.job.id)
    assert (job.step, job.status_detail, job.status_message) == (3, "sampling", "24 of 64")


def test_a_lease_runs_out_and_the_job_waits_again(world: World, ttl_seconds: float) -> None:
    held = world.running()
    lease_id = held.attempt.lease_id
    world.clock.advance(ttl_seconds + 1)
    with world.database.write() as transaction:
        seen = leases.running(transaction)[lease_id]
        assert leases.expire(transaction, lease_id, seen)
        assert not leases.expire(transaction, lease_id, seen)
        assert leases.running(transaction) == {}
    assert world.job(held.job.id).status == "queued"
    assert world.attempt(held).status == "lost"


def test_the_next_attempt_goes_on_from_the_newest_checkpoint(world: World) -> None:
    held = world.running()
    world.publish(held, 4)
    newest = world.publish(held, 8)
    again = world.claim(held.attempt.slot, incarnation="life-2")
    assert again.attempt.resume_checkpoint_id == newest.id
    assert world.job(held.job.id).step == 8


def test_complete_needs_every_row_and_the_final_checkpoint(world: World) -> None:
    held = world.running(total_steps=10)
    half = world.publish(held, 5)
    with pytest.raises(ConflictError, match="has rows up to 3") as behind:
        end(world, held, Complete(attempt=1, last_seq=3, checkpoint_id=half.id))
    with pytest.raises(ConflictError, match="is not of step 10") as missing:
        end(world, held, Complete(attempt=1, last_seq=0, checkpoint_id=half.id))
    assert (behind.value.error_code, missing.value.error_code) == (
        "spool_behind",
        "checkpoint_missing",
    )
    assert world.job(held.job.id).status == "running"


def test_complete_again_gets_the_same_answer(world: World) -> None:
    held = world.running()
    final = world.publish(held, 10)
    said = Complete(attempt=1, last_seq=0, checkpoint_id=final.id)
    first, events = end(world, held, said), world.events(held.job.id)
    assert end(world, held, said) == first == Outcome(status="succeeded", status_detail=None)
    assert len(world.events(held.job.id)) == len(events)
    with pytest.raises(FencedError):
        end(world, held, transient())


def test_a_users_mistake_ends_the_job_with_its_reason(world: World) -> None:
    held = world.running()
    said = Fail(attempt=1, kind="user", code="training_failed", message="no", param="model")
    assert end(world, held, said) == Outcome(status="failed", status_detail="user_error")
    job = world.job(held.job.id)
    assert job.error == {"code": "training_failed", "message": "no", "param": "model"}


def test_a_transient_failure_is_tried_again_after_a_growing_pause(world: World) -> None:
    held = world.running()
    pauses = []
    for number in (1, 2):
        end(world, held, transient(number))
        job = world.job(held.job.id)
        assert (job.status, job.status_detail) == ("queued", "backoff")
        assert world.claim() is None
        pauses.append((job.not_before - world.clock.now).total_seconds())
        world.clock.advance(pauses[-1])
        held = world.claim()
    assert 1 <= pauses[0] <= 2 <= pauses[1] <= 4
    assert end(world, held, transient(3)).status_detail == "poison"


def probe(world: World, job_id: str, **found: Any) -> bool:
    """Store a probe, made when it is due. Returns whether a worker may claim the job."""
    job = world.job(job_id)
    world.clock.advance(max(0.0, (job.not_before - world.clock.now).total_seconds()))
    with world.database.write() as transaction:
        assert [one.id for one in reward_pauses.due(transaction, 9)] == [job_id]
        check = reward_pauses.RewardCheck(**{"is_back": False, **found})
        return reward_pauses.note_probe(transaction, job_id, job.attempt, check, base_seconds=5)


def waiting_for_reward(world: World) -> str:
    held = world.running()
    said = Release(attempt=1, reason="waiting_for_reward", message="connection refused")
    assert end(world, held, said).status_detail == "waiting_for_reward"
    return str(held.job.id)


def test_a_job_whose_reward_service_is_down_takes_no_slot_before_a_probe_passes(
    world: World,
) -> None:
    job_id = waiting_for_reward(world)
    assert (
        world.job(job_id).status_message == "the worker on node-1 got no reward: connection refused"
    )
    waits = []
    for _ in range(6):
        job = world.job(job_id)
        waits.append((job.not_before - world.clock.now).total_seconds())
        assert not probe(world, job_id, reason="HTTP 503")
        assert world.claim() is None
        with world.database.read() as transaction:
            assert leases.count_due(transaction, timedelta(0)) == 0, "no worker is woken for it"
    assert waits == [5, 10, 20, 40, 60, 60]
    messages = [event.message for event in world.events(job_id)]
    assert len([text for text in messages if "HTTP 503" in text]) == 1, "one event for one cause"
    assert probe(world, job_id, is_back=True)
    job = world.job(job_id)
    assert (job.status, job.status_detail) == ("queued", None)
    assert world.claim().job.id == job_id


def test_a_job_that_waited_for_rewards_is_claimed_behind_those_that_waited_for_a_worker(
    world: World,
) -> None:
    waited = waiting_for_reward(world)
    paused = world.running()
    end(world, paused, Release(attempt=1, reason="paused_reward", is_outage=True))
    good = [world.submit(), world.submit()]
    world.clock.advance(1)
    with world.database.write() as transaction:
        check = reward_pauses.RewardCheck(is_back=True)
        for job_id in (waited, paused.job.id):
            assert reward_pauses.note_probe(transaction, job_id, 1, check, base_seconds=5)
    claimed = [world.claim(slot=f"s{number}").job.id for number in range(4)]
    assert claimed[:2] == good
    assert set(claimed[2:]) == {waited, paused.job.id}


def test_a_job_whose_worker_was_lost_or_stopped_keeps_its_place(world: World) -> None:
    lost, drained = world.running(), world.running()
    younger = world.submit()
    end(world, drained, Release(attempt=1, reason="drained"))
    assert world.claim(lost.attempt.slot, incarnation="life-2").job.id == lost.job.id
    assert world.claim(slot="x").job.id == drained.job.id
    assert world.claim(slot="y").job.id == younger


def test_where_the_service_cannot_connect_a_worker_tries_once_in_ten_minutes(world: World) -> None:
    job_id = waiting_for_reward(world)
    ended, number = world.clock.now, 1
    tries = []
    while len(tries) < 2:
        if probe(world, job_id, reason="connection refused", is_undecided=True):
            tries.append((world.clock.now - ended).total_seconds())
            message = world.job(job_id).status_message
            assert "the service cannot connect" in message
            assert "A worker tries now" in message
            held = world.claim()
            assert held.job.id == job_id
            number += 1
            end(world, held, Release(attempt=number, reason="waiting_for_reward"))
            ended = world.clock.now
        else:
            assert world.claim() is None
            assert "a worker, which may reach it" in world.job(job_id).status_message
    assert tries == [600, 600]


def test_cancelling_a_waiting_job_is_done_at_once(world: World) -> None:
    job_id = world.submit()
    cancel(world, job_id)
    cancel(world, job_id)
    assert world.job(job_id).status == "cancelled"
    assert world.claim() is None


def test_cancelling_a_running_job_waits_for_its_worker(world: World) -> None:
    held = world.running()
    cancel(world, held.job.id)
    cancel(world, held.job.id)
    job = world.job(held.job.id)
    assert (job.status, job.status_detail) == ("running", "cancelling")
    with world.database.write() as transaction:
        now = fence.hold(transaction, held.attempt.lease_id, 1)
        progress = AttemptProgress(phase="training", step=2)
        leases.renew(transaction, now, timedelta(seconds=60), progress)
    assert world.job(held.job.id).status_detail == "cancelling"
    assert end(world, held, Release(attempt=1, reason="cancelled")).status == "cancelled"


@pytest.mark.parametrize(
    "said",
    [
        transient(),
        Fail(attempt=1, kind="user", code="x", message="x"),
        Release(attempt=1, reason="drained"),
        Release(attempt=1, reason="waiting_for_reward"),
    ],
)
def test_a_job_to_be_cancelled_never_goes_back_into_the_queue(world: World, said: Any) -> None:
    held = world.running()
    cancel(world, held.job.id)
    assert end(world, held, said).status == "cancelled"


def test_a_lost_attempt_of_a_job_to_be_cancelled_cancels_it(world: World) -> None:
    held = world.running()
    cancel(world, held.job.id)
    assert world.claim(held.attempt.slot, incarnation="life-2") is None
    assert world.job(held.job.id).status == "cancelled"


def test_a_job_that_finished_first_has_succeeded(world: World) -> None:
    held = world.running()
    final = world.publish(held, 10)
    cancel(world, held.job.id)
    said = Complete(attempt=1, last_seq=0, checkpoint_id=final.id)
    assert end(world, held, said).status == "succeeded"


def test_a_cancellation_that_nobody_asked_for_is_refused(world: World) -> None:
    held = world.running()
    with pytest.raises(ConflictError, match="no cancellation of job"):
        end(world, held, Release(attempt=1, reason="cancelled"))


def test_a_finished_job_cannot_be_cancelled(world: World) -> None:
    held = world.running()
    end(world, held, Fail(attempt=1, kind="user", code="x", message="x"))
    with pytest.raises(ConflictError, match="has already failed"):
        cancel(world, held.job.id)
