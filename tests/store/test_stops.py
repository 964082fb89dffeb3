"""A job that is stopped succeeds with the model that it has, however its attempt ends."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dar.errors import ConflictError
from dar.protocol.reward_stats import REQUEST_SECONDS
from dar.protocol.worker import (
    AttemptProgress,
    Complete,
    Fail,
    Outcome,
    Release,
    RewardsRow,
)
from fakes.world import World
from service.artifacts import Artifacts
from service.audit import audit
from service.storage.folder import FolderStorage
from service.store import checkpoints, fence, jobs, leases, outcomes, rows, stops
from service.store.best_checkpoint import Standing


def end(world: World, held: fence.Held, said: Complete | Fail | Release) -> Outcome:
    with world.database.write() as transaction:
        return outcomes.end(transaction, held.attempt.lease_id, said)


def ask(world: World, what: Any, job_id: str) -> str:
    with world.database.write() as transaction:
        return str(what(transaction, world.project_id, job_id).status)


def check_time(world: World) -> list[str]:
    """What the reconciler does; the jobs that it stopped."""
    with world.database.read() as transaction:
        found = stops.over_time(transaction)
    stopped = []
    for job_id in found:
        with world.database.write() as transaction:
            if stops.check_time(transaction, job_id):
                stopped.append(job_id)
    return stopped


def test_a_running_job_ends_with_the_checkpoint_of_its_present_step(world: World) -> None:
    held = world.running()
    job_id, say = held.job.id, Complete(attempt=1, last_seq=0, checkpoint_id="")
    early = say.model_copy(update={"checkpoint_id": world.publish(held, 3).id})
    with pytest.raises(ConflictError, match="not of step 10"):
        end(world, held, early)  # nobody asked for an early end
    for _ in range(2):
        assert ask(world, jobs.stop, job_id) == "running"
    with world.database.write() as transaction:
        job = fence.hold(transaction, held.attempt.lease_id, 1).job
        leases.note_progress(transaction, job, AttemptProgress(phase="sampling", step=3))
    assert world.job(job_id).status_detail == "stopping"
    with pytest.raises(ConflictError, match="is being stopped, so it cannot be paused"):
        ask(world, jobs.pause, job_id)
    said = say.model_copy(update={"checkpoint_id": world.publish(held, 4).id})
    assert end(world, held, said) == Outcome(status="succeeded", status_detail=None)
    job = world.job(job_id)
    assert (job.step, job.latest_checkpoint_id) == (4, said.checkpoint_id)
    assert (
        job.status_message
        == f"stopped after step 4 of 10; the result is the model ft-base-{job_id}"
    )
    assert ask(world, jobs.stop, job_id) == "succeeded", "a repeated call is no error"
    with world.database.read() as transaction:
        (model,) = checkpoints.models(transaction, world.project_id, name=f"ft-base-{job_id}")
    assert model[1].id == said.checkpoint_id


@pytest.mark.parametrize(
    ("how", "status"),
    [
        (Release(attempt=1, reason="drained"), "drained"),
        (Release(attempt=1, reason="paused"), "drained"),
        (Release(attempt=1, reason="waiting_for_reward"), "drained"),
        (
            Fail(attempt=1, kind="transient", code="disk_full", message="no", owner="worker"),
            "failed",
        ),
        (None, "lost"),
    ],
)
@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_if_the_attempt_ends_otherwise_the_newest_checkpoint_is_the_result(
    world: World, how: Fail | Release | None, status: str, *, has_checkpoint: bool
) -> None:
    held = world.running()
    if has_checkpoint:
        world.publish(held, 4)
    ask(world, jobs.stop, held.job.id)
    if how is not None:
        end(world, held, how)
    else:
        with world.database.write() as transaction:
            outcomes.lose(transaction, fence.lock(transaction, held.attempt.lease_id), "gone")
    assert world.attempt(held).status == status
    job = world.job(held.job.id)
    if has_checkpoint:
        assert (job.status, job.step) == ("succeeded", 4)
    else:  # another attempt makes one step
        assert (job.status, job.stop_requested_at is None) == ("queued", False)
        assert ask(world, jobs.stop, job.id) == "queued"


@pytest.mark.parametrize("keeps_best", [False, True])
@pytest.mark.parametrize("is_reported", [False, True])
def test_the_result_of_a_stopped_job_is_the_last_checkpoint_or_with_keep_best_the_best(
    world: World, tmp_path: Path, *, is_reported: bool, keeps_best: bool
) -> None:
    spec = world.limited()
    spec["method"]["dar"]["checkpointing"] = {"keep_best": keeps_best}
    held = world.running(spec=spec)
    best = world.publish(held, 2, Standing(1, reward=0.9))
    last = world.publish(held, 4, Standing(2, reward=0.1))
    ask(world, jobs.stop, held.job.id)
    done = Complete(attempt=1, last_seq=0, checkpoint_id=last.id)
    end(world, held, done if is_reported else Release(attempt=1, reason="drained"))
    job = world.job(held.job.id)
    assert (job.status, job.step, job.latest_checkpoint_id) == ("succeeded", 4, last.id)
    assert job.result_checkpoint_id == (best if keeps_best else last).id
    assert ("of step 2, the best checkpoint" in job.status_message) == keeps_best
    found = audit(world.database, Artifacts(FolderStorage(tmp_path))).findings
    assert {one.rule for one in found} == {"checkpoints"}, "only the files are not there"


def test_a_waiting_job_ends_at_once_if_it_has_a_model(world: World) -> None:
    first = world.submit()
    with pytest.raises(ConflictError, match="no checkpoint yet"):
        ask(world, jobs.stop, first)
    ask(world, jobs.cancel, first)
    held = world.running()
    world.publish(held, 2)
    ask(world, jobs.pause, held.job.id)
    assert ask(world, jobs.stop, held.job.id) == "running", "it replaces the pause"
    end(world, held, Release(attempt=1, reason="paused"))
    assert world.job(held.job.id).status == "succeeded"
    for wait in (jobs.pause, None):
        held = world.running()
        world.publish(held, 2)
        end(world, held, Release(attempt=1, reason="drained"))
        if wait is not None:
            ask(world, wait, held.job.id)
        for _ in range(2):
            assert ask(world, jobs.stop, held.job.id) == "succeeded"


def test_a_cancellation_wins_over_a_stop_and_a_resume_forgets_it(world: World) -> None:
    held = world.running(training_file="")  # its rows come from a hub
    world.publish(held, 2)
    ask(world, jobs.stop, held.job.id)
    ask(world, jobs.cancel, held.job.id)
    with pytest.raises(ConflictError, match="is being cancelled, so it cannot be stopped"):
        ask(world, jobs.stop, held.job.id)
    end(world, held, Release(attempt=1, reason="cancelled"))
    with pytest.raises(ConflictError, match="has already been cancelled"):
        ask(world, jobs.stop, held.job.id)
    assert ask(world, jobs.resume, held.job.id) == "queued"
    assert world.job(held.job.id).stop_requested_at is None


def test_the_running_time_of_all_attempts_is_limited(world: World) -> None:
    held = world.running(spec=world.limited(max_seconds=100))
    world.publish(held, 2)
    world.clock.advance(60)
    end(world, held, Release(attempt=1, reason="drained"))
    world.clock.advance(1000)
    assert check_time(world) == [], "time in the queue does not count"
    held = world.claim()
    assert held is not None
    world.clock.advance(30)
    assert check_time(world) == []
    world.clock.advance(11)
    assert check_time(world) == [held.job.id]
    job = world.job(held.job.id)
    assert (job.status, job.status_detail) == ("running", "stopping")
    assert check_time(world) == [], "once"
    *_, event = world.events(held.job.id)
    assert (event.level, "limits.max_seconds: it ran for 101 of 100 s" in event.message) == (
        "warn",
        True,
    )


def test_a_waiting_job_whose_time_is_up_ends_with_its_model(world: World) -> None:
    held = world.running(spec=world.limited(max_seconds=100))
    world.publish(held, 2)
    world.clock.advance(150)
    end(world, held, Release(attempt=1, reason="drained"))
    assert check_time(world) == [held.job.id]
    assert world.job(held.job.id).status == "succeeded"
    levels = [event.level for event in world.events(held.job.id)]
    assert levels[-2:] == ["warn", "info"]


def test_the_requests_of_all_attempts_are_limited(world: World) -> None:
    held = world.running(spec=world.limited(max_reward_calls=7))

    def report(held: fence.Held, seq: int, requests: int, retries: int) -> None:
        row = RewardsRow.model_validate(
            {
                "type": "rewards",
                "seq": seq,
                "at": 1.0,
                "step": 1,
                "requests": [
                    {
                        "component": "letters",
                        "outcome": "ok",
                        "samples": 8 * requests,
                        "retries": retries,
                        "buckets": [requests] + [0] * len(REQUEST_SECONDS),
                        "seconds": 1.0,
                        "queued_seconds": 0.0,
                    }
                ],
                "failures": [],
            }
        )
        with world.database.write() as transaction:
            rows.add(transaction, fence.lock(transaction, held.attempt.lease_id), [row])

    for _ in range(3):
        report(held, 1, 2, 1)  # the same row again counts nothing
    assert (world.job(held.job.id).reward_calls, world.job(held.job.id).status_detail) == (
        3,
        "starting",
    )
    end(world, held, Release(attempt=1, reason="drained"))
    first, held = held, world.claim()
    assert held is not None
    report(held, 1, 4, 0)
    job = world.job(held.job.id)
    assert (job.reward_calls, job.status_detail) == (7, "stopping")
    *_, event = world.events(held.job.id)
    assert event.level == "warn"
    assert "limits.max_reward_calls: 7 of 7 requests were sent" in event.message
    assert world.clock.now - job.stop_requested_at < timedelta(seconds=1)
    report(first, 2, 1, 0)
    job = world.job(held.job.id)
    assert job.reward_calls == 8, "it was sent, although its step is done again"
    assert world.events(held.job.id)[-1].seq == event.seq, "the limit is reached once"
