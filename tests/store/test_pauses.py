"""Pausing and resuming: by the user, because rewards are missing, and whatever else happens at the
same moment.
"""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from dar.errors import ConflictError, NotFoundError
from dar.protocol.worker import AttemptProgress, Complete, Fail, Outcome, Release
from fakes.world import World
from service.store import fence, jobs, leases, outcomes, reward_pauses
from service.store.tables import JobRow


def end(world: World, held: fence.Held, said: Complete | Fail | Release) -> Outcome:
    with world.database.write() as transaction:
        return outcomes.end(transaction, held.attempt.lease_id, said)


def ask(world: World, what: Any, job_id: str) -> str:
    with world.database.write() as transaction:
        return str(what(transaction, world.project_id, job_id).status)


def state(world: World, job_id: str) -> tuple[str, str | None]:
    job = world.job(job_id)
    return job.status, job.status_detail


def pausing(world: World) -> fence.Held:
    held: fence.Held = world.running()
    assert ask(world, jobs.pause, held.job.id) == "pausing"
    return held


def paused_for_reward(world: World, *, is_outage: bool = True) -> fence.Held:
    held: fence.Held = world.running()
    said = Release(
        attempt=1,
        reason="paused_reward",
        message="HTTP 401: who are you?",
        code="http_401",
        is_outage=is_outage,
    )
    assert end(world, held, said) == Outcome(status="paused", status_detail="reward")
    return held


def test_a_waiting_job_is_paused_at_once_and_goes_on_when_resumed(world: World) -> None:
    job_id = world.submit()
    for _ in range(2):
        assert ask(world, jobs.pause, job_id) == "paused"
    assert state(world, job_id) == ("paused", "by_user")
    assert world.claim() is None
    for _ in range(2):
        assert ask(world, jobs.resume, job_id) == "queued"
    assert len(world.events(job_id)) == 3, "what changes nothing is no event"
    assert world.claim().job.id == job_id


def test_a_running_job_is_paused_when_its_worker_has_left(world: World) -> None:
    held = pausing(world)
    assert ask(world, jobs.pause, held.job.id) == "pausing"
    world.publish(held, 4)
    said = Release(attempt=1, reason="paused")
    assert end(world, held, said) == end(world, held, said)
    assert state(world, held.job.id) == ("paused", "by_user")
    assert world.attempt(held).status == "drained"
    assert world.claim() is None
    ask(world, jobs.resume, held.job.id)
    again = world.claim()
    assert (again.attempt.number, again.attempt.start_step) == (2, 4)


def test_a_pause_stays_on_show_while_the_trainer_goes_on_talking(world: World) -> None:
    held = pausing(world)
    with world.database.write() as transaction:
        now = fence.hold(transaction, held.attempt.lease_id, 1)
        progress = AttemptProgress(phase="checkpointing", step=2)
        leases.renew(transaction, now, timedelta(seconds=60), progress)
    job = world.job(held.job.id)
    assert (job.status, job.status_detail, job.step) == ("pausing", None, 2)
    assert "checkpoint" in job.status_message


@pytest.mark.parametrize(
    "said",
    [
        Release(attempt=1, reason="drained"),
        Release(attempt=1, reason="waiting_for_reward"),
        Release(attempt=1, reason="paused_reward", code="http_401"),
        Fail(attempt=1, kind="transient", code="trainer_died", message="signal 9"),
    ],
)
def test_however_the_attempt_of_a_pausing_job_leaves_the_job_is_paused(
    world: World, said: Any
) -> None:
    held = pausing(world)
    end(world, held, said)
    assert state(world, held.job.id) == ("paused", "by_user")


def test_a_lease_lost_while_pausing_leaves_the_job_paused(world: World, ttl_seconds: float) -> None:
    held = pausing(world)
    world.clock.advance(ttl_seconds + 1)
    with world.database.write() as transaction:
        assert leases.expire(transaction, held.attempt.lease_id, held.attempt.lease_until)
    assert state(world, held.job.id) == ("paused", "by_user")
    assert world.attempt(held).status == "lost"


def test_a_pausing_job_may_still_finish_or_fail(world: World) -> None:
    first, second = pausing(world), pausing(world)
    final = world.publish(first, 10)
    end(world, first, Complete(attempt=1, last_seq=0, checkpoint_id=final.id))
    end(world, second, Fail(attempt=1, kind="user", code="x", message="x"))
    assert [world.job(held.job.id).status for held in (first, second)] == ["succeeded", "failed"]


def test_a_cancellation_outranks_a_pause(world: World) -> None:
    held = pausing(world)
    assert ask(world, jobs.cancel, held.job.id) == "running"
    with pytest.raises(ConflictError, match="is being cancelled"):
        ask(world, jobs.pause, held.job.id)
    with pytest.raises(ConflictError, match="is being cancelled"):
        ask(world, jobs.resume, held.job.id)
    assert end(world, held, Release(attempt=1, reason="paused")).status == "cancelled"


def test_a_paused_job_is_cancelled_at_once(world: World) -> None:
    job_id = world.submit()
    ask(world, jobs.pause, job_id)
    assert ask(world, jobs.cancel, job_id) == "cancelled"


def test_a_withdrawn_pause_costs_at_most_a_new_attempt(world: World) -> None:
    held = pausing(world)
    assert ask(world, jobs.resume, held.job.id) == "running"
    assert world.attempt(held).status == "running"
    assert end(world, held, Release(attempt=1, reason="paused")).status == "queued"
    assert world.claim().job.id == held.job.id


def test_failed_and_cancelled_jobs_start_again_from_their_newest_checkpoint(
    world: World, a_file: Any
) -> None:
    a_file("file-1")
    failed, cancelled = world.running(), world.running()
    world.publish(failed, 4)
    end(world, failed, Fail(attempt=1, kind="user", code="x", message="x"))
    ask(world, jobs.cancel, cancelled.job.id)
    end(world, cancelled, Release(attempt=1, reason="cancelled"))
    for held in (failed, cancelled):
        assert ask(world, jobs.resume, held.job.id) == "queued"
        job = world.job(held.job.id)
        assert (job.error, job.finished_at, job.cancel_requested_at) == (None, None, None)
    again = world.claim("a")
    assert (again.job.id, again.attempt.start_step) == (failed.job.id, 4)
    assert world.claim("b").job.id == cancelled.job.id


def test_a_poisoned_job_that_is_resumed_has_all_its_attempts_again(
    world: World, a_file: Any
) -> None:
    a_file("file-1")
    job_id = world.submit()
    for round_ in range(2):
        for number in range(5):
            assert world.claim("0", incarnation=f"life-{round_}-{number}") is not None
        assert world.claim("0", incarnation=f"life-{round_}-9") is None
        assert state(world, job_id) == ("failed", "poison")
        ask(world, jobs.resume, job_id)


def test_a_job_whose_file_is_gone_cannot_start_again(world: World) -> None:
    job_id = world.submit()
    ask(world, jobs.cancel, job_id)
    with pytest.raises(ConflictError, match="file-1 has been deleted"):
        ask(world, jobs.resume, job_id)


def test_a_job_that_is_over_cannot_be_paused_and_a_success_not_be_resumed(world: World) -> None:
    held = world.running()
    final = world.publish(held, 10)
    end(world, held, Complete(attempt=1, last_seq=0, checkpoint_id=final.id))
    for what in (jobs.pause, jobs.resume):
        with pytest.raises(ConflictError, match="has already succeeded"):
            ask(world, what, held.job.id)
    job_id = world.submit()
    ask(world, jobs.cancel, job_id)
    with pytest.raises(ConflictError, match="has already been cancelled"):
        ask(world, jobs.pause, job_id)
    with pytest.raises(NotFoundError):
        ask(world, jobs.pause, "ftjob-none")


def test_want_of_rewards_pauses_with_its_reason_and_frees_the_slot(world: World) -> None:
    held = paused_for_reward(world)
    job = world.job(held.job.id)
    assert job.status_message == "HTTP 401: who are you?"
    assert job.error["code"] == "http_401"
    assert world.events(job.id)[-1].data["code"] == "http_401"
    assert (job.failed_attempts, job.fruitless_attempts) == (0, 0)
    assert world.claim() is None
    other = world.submit()
    assert world.claim().job.id == other
    ask(world, jobs.resume, job.id)
    assert world.job(job.id).error is None
    assert world.claim("b").job.id == job.id


def test_a_spent_budget_that_shall_fail_the_job_has_its_own_detail(world: World) -> None:
    held = world.running()
    code = "reward_budget_exhausted"
    end(world, held, Fail(attempt=1, kind="user", code=code, message="too many"))
    assert state(world, held.job.id) == ("failed", code)
    assert world.job(held.job.id).error["code"] == code


def due(world: World) -> list[str]:
    with world.database.read() as transaction:
        return [job.id for job in reward_pauses.due(transaction, 10)]


def note(world: World, held: fence.Held, *, is_back: bool, attempt: int = 1) -> bool:
    with world.database.write() as transaction:
        check = reward_pauses.RewardCheck(is_back=is_back)
        return reward_pauses.note_probe(transaction, held.job.id, attempt, check, base_seconds=5)


@pytest.mark.parametrize(
    ("is_outage", "waits"),
    [(True, [5, 10, 20, 40, 60, 60]), (False, [60, 120, 240, 480, 720, 720])],
)
def test_looks_at_a_reward_service_become_ever_rarer(
    world: World, is_outage: bool, waits: list[float]
) -> None:
    held = paused_for_reward(world, is_outage=is_outage)
    for wait in waits:
        assert due(world) == []
        world.clock.advance(wait - 0.5)
        assert due(world) == []
        world.clock.advance(0.5)
        assert due(world) == [held.job.id]
        assert not note(world, held, is_back=False)


@pytest.mark.parametrize("reason", ["waiting_for_reward", "paused_reward"])
def test_attempts_become_rarer_when_the_probe_passes_and_training_gets_no_reward(
    world: World, reason: Any
) -> None:
    held = world.running()
    for number, wait in enumerate([5, 20, 80, 320, 600, 600], start=1):
        end(world, held, Release(attempt=number, reason=reason, message="no", is_outage=True))
        said = world.events(held.job.id)[-1].message
        assert ("answers the service's probe, but not training" in said) == (number > 1)
        world.clock.advance(wait - 0.5)
        assert due(world) == []
        world.clock.advance(0.5)
        assert due(world) == [held.job.id]
        assert note(world, held, is_back=True, attempt=number)
        held = world.claim()
    with world.database.write() as transaction:
        transaction.execute(update(JobRow).values(reward_waits=0))  # as a step does
    end(world, held, Release(attempt=7, reason=reason, message="no", is_outage=True))
    world.clock.advance(5)
    assert due(world) == [held.job.id]


def test_a_job_whose_reward_service_is_back_is_queued(world: World) -> None:
    held = paused_for_reward(world)
    assert note(world, held, is_back=True)
    assert state(world, held.job.id) == ("queued", None)
    assert world.events(held.job.id)[-1].data["by"] == "probe"
    assert world.claim().job.id == held.job.id


def test_a_look_that_comes_too_late_moves_nothing(world: World) -> None:
    held = paused_for_reward(world)
    assert not note(world, held, is_back=True, attempt=2)
    ask(world, jobs.cancel, held.job.id)
    assert not note(world, held, is_back=True)
    assert world.job(held.job.id).status == "cancelled"


def test_a_job_that_its_user_has_paused_is_not_looked_after(world: World) -> None:
    job_id = world.submit()
    ask(world, jobs.pause, job_id)
    with world.database.write() as transaction:
        transaction.execute(update(JobRow).values(not_before=transaction.now - timedelta(days=1)))
    assert due(world) == []
