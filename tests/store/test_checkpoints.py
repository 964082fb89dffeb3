"""Checkpoints: announced once, visible once verified, removed when newer ones make them
needless.
"""

from copy import deepcopy
from datetime import timedelta
from typing import Any

import pytest

from dar.errors import ConflictError, NotFoundError
from dar.protocol.worker import MetricsRow
from fakes.world import World
from service.store import (
    best_checkpoint,
    checkpoints,
    deletion,
    fence,
    promotions,
    rows,
    transitions,
)
from service.store.best_checkpoint import Standing
from service.store.tables import JobInputRow, JobRow


def register(world: World, held: fence.Held, step: int, sha256: str, **manifest: Any) -> Any:
    with world.database.write() as transaction:
        now = fence.hold(transaction, held.attempt.lease_id, held.attempt.number)
        made = world.manifest(step, **manifest)
        return checkpoints.register(transaction, now.job, now.attempt, made, sha256)


def visible(world: World, job_id: str) -> list[int]:
    with world.database.read() as transaction:
        page = checkpoints.list_page(transaction, job_id, checkpoints.Cursor())
    return [row.step for row in page.rows]


def test_announcing_twice_makes_one(world: World) -> None:
    held = world.running()
    first = register(world, held, 5, "a" * 64)
    assert register(world, held, 5, "a" * 64).id == first.id
    with pytest.raises(ConflictError) as caught:
        register(world, held, 5, "b" * 64)
    assert caught.value.error_code == "checkpoint_mismatch"
    assert visible(world, held.job.id) == []


def test_a_checkpoint_waits_for_the_rows_said_before_it(world: World) -> None:
    held = world.running()
    with pytest.raises(ConflictError) as caught:
        register(world, held, 5, "a" * 64, last_seq=1)
    assert caught.value.error_code == "spool_behind"


def test_publishing_is_told_once(world: World) -> None:
    held = world.running()
    made = world.publish(held, 5)
    with world.database.write() as transaction:
        now = fence.hold(transaction, held.attempt.lease_id, 1)
        checkpoints.publish(transaction, now.job, made, manifest_bytes=1)
    told = [event for event in world.events(held.job.id) if event.data["kind"] == "checkpoint"]
    assert [event.data["step"] for event in told] == [5]
    assert world.job(held.job.id).latest_checkpoint_id == made.id


def test_only_the_newest_are_kept(world: World) -> None:
    held = world.running(keep_last=2)
    other = world.running(keep_last=2)
    for step in (2, 4, 6, 8):
        world.publish(held, step)
    world.publish(other, 2)
    with world.database.write() as transaction:
        assert checkpoints.mark_superseded(transaction) == 2
        assert checkpoints.mark_superseded(transaction) == 0
        doomed = checkpoints.to_remove(transaction)
    assert sorted(item.step for item in doomed) == [2, 4]
    assert visible(world, held.job.id) == [8, 6]
    assert visible(world, other.job.id) == [2]


def test_what_another_job_starts_from_is_kept_until_that_job_is_over(world: World) -> None:
    held = world.running(keep_last=1)
    base = world.publish(held, 2)
    world.publish(held, 4)
    user = world.submit()
    with world.database.write() as transaction:
        transaction.add(JobInputRow(job_id=user, checkpoint_id=base.id))
    with world.database.write() as transaction:
        assert checkpoints.mark_superseded(transaction) == 0
    with world.database.write() as transaction:
        from_queue = world.job(user)
        assert from_queue.status == "queued"
        transitions.move(transaction, "cancelled", JobRow.id == user, "x")
        assert checkpoints.mark_superseded(transaction) == 1


def test_half_an_upload_of_an_ended_attempt_is_removed(world: World) -> None:
    held = world.running()
    register(world, held, 5, "a" * 64)
    with world.database.write() as transaction:
        assert checkpoints.mark_abandoned(transaction) == 0
    world.claim(held.attempt.slot, incarnation="life-2")
    with world.database.write() as transaction:
        assert checkpoints.mark_abandoned(transaction) == 1
        doomed = checkpoints.to_remove(transaction)
        checkpoints.mark_removed(transaction, doomed[0].id)
        assert checkpoints.to_remove(transaction) == []


def test_half_an_upload_is_no_checkpoint_before_the_next_one(world: World) -> None:
    held = world.running()
    world.publish(held, 2, Standing(1, 0.5))
    register(world, held, 4, "a" * 64)
    again = world.claim(held.attempt.slot, incarnation="life-2")
    assert again is not None
    metrics = [
        MetricsRow(type="metrics", seq=seq, step=step, at=0.0, values={"dar/rewards_mean": reward})
        for seq, (step, reward) in enumerate(((3, 1.0), (4, 2.0), (5, 3.0)), start=1)
    ]
    with world.database.write() as transaction:
        assert checkpoints.mark_abandoned(transaction) == 1
        now = fence.hold(transaction, again.attempt.lease_id, 2)
        rows.add(transaction, now, metrics)
        transaction.flush()
        manifest = world.manifest(5)
        made = checkpoints.register(transaction, now.job, now.attempt, manifest, "b" * 64)
        standing = best_checkpoint.measure(transaction, now.job, made)
    assert (standing.ordinal, standing.reward) == (2, 2.0), "the mean since step 2"


def test_the_newest_the_best_every_nth_and_pinned_ones_are_kept(world: World) -> None:
    held = world.running(keep_last=1, keep_every=3)
    rewards = {2: 0.1, 4: 0.9, 6: 0.3, 8: 0.2, 10: 0.5, 12: 0.4, 14: 0.1, 16: None}
    made = [
        world.publish(held, step, Standing(number, reward))
        for number, (step, reward) in enumerate(rewards.items(), start=1)
    ]
    assert world.job(held.job.id).best_checkpoint_id == made[1].id
    with world.database.write() as transaction:
        checkpoints.pin(transaction, made[3], is_pinned=True)
        assert checkpoints.mark_superseded(transaction) == 3
    assert visible(world, held.job.id) == [16, 12, 8, 6, 4]
    with world.database.write() as transaction:
        checkpoints.pin(transaction, made[3], is_pinned=False)
        assert checkpoints.mark_superseded(transaction) == 1
        with pytest.raises(NotFoundError, match="no longer kept"):
            checkpoints.pin(transaction, made[0], is_pinned=True)


def test_a_promoted_checkpoint_is_kept_until_its_name_is_taken_back(world: World) -> None:
    held = world.running(keep_last=1)
    made = [world.publish(held, step, Standing(step, None)) for step in (1, 2, 3, 4)]
    project = world.project_id
    with world.database.write() as transaction:
        promotions.promote(transaction, project, "mine", made[0].id)
        promotions.promote(transaction, project, "mine", made[1].id)
        promotions.promote(transaction, project, "yours", made[1].id)
        promotions.promote(transaction, project, "first", made[0].id)
        assert promotions.names_of(transaction, [one.id for one in made]) == {
            made[0].id: ["first"],
            made[1].id: ["mine", "yours"],
        }
        assert checkpoints.mark_superseded(transaction) == 1
        found = [name for name, _, _ in checkpoints.models(transaction, project, limit=3)]
        assert found[:3] == ["first", "mine", "yours"]
        [(_, row, _)] = checkpoints.models(transaction, project, name="mine")
        assert row.id == made[1].id
        with pytest.raises(ConflictError, match="is the model 'first'"):
            deletion.mark_checkpoint(transaction, project, held.job.id, made[0].id)
        assert promotions.remove(transaction, project, "first")
        assert not promotions.remove(transaction, project, "first")
        assert checkpoints.mark_superseded(transaction) == 1
    assert visible(world, held.job.id) == [4, 2]


def test_what_has_expired_and_nobody_keeps_or_needs_is_found(world: World) -> None:
    held = world.running(keep_last=9)
    made = [world.publish(held, step, Standing(step, None)) for step in (1, 2, 3, 4, 5)]
    over, later = world.clock.now, world.clock.now + timedelta(seconds=60)
    with world.database.write() as transaction:
        for row in made[1:]:
            checkpoints.set_expiry(transaction, row, over)
        checkpoints.set_expiry(transaction, made[0], later)
        checkpoints.pin(transaction, made[1], is_pinned=True)
        promotions.promote(transaction, world.project_id, "mine", made[2].id)
    place = (world.project_id, held.job.id)
    with world.database.read() as transaction:
        assert checkpoints.is_any_to_remove(transaction)
        assert checkpoints.expired(transaction) == [(*place, made[3].id)]
    too_early = pytest.raises(ConflictError, match="has not expired")  # its end was moved
    with too_early, world.database.write() as transaction:
        deletion.mark_checkpoint(transaction, *place, made[0].id, has_expired=True)
    with world.database.write() as transaction:
        deletion.mark_checkpoint(transaction, *place, made[3].id, has_expired=True)
        assert checkpoints.expired(transaction) == []
    world.clock.advance(60)
    with world.database.read() as transaction:
        assert checkpoints.expired(transaction) == [(*place, made[0].id)]


@pytest.mark.parametrize(("budget", "best"), [(None, 8), (1.0, 4), (0.1, 2), (5.0, 6)])
def test_with_a_budget_the_best_is_one_within_it_or_the_nearest(
    world: World, budget: float | None, best: int
) -> None:
    held = world.running(keep_last=1)
    with world.database.write() as transaction:
        job = transaction.get_one(JobRow, held.job.id)
        spec = deepcopy(job.spec)
        spec["method"]["dar"]["hyperparameters"]["kl_budget"] = budget
        job.spec = spec
    made = {
        step: world.publish(held, step, Standing(step // 2, reward, kl))
        for step, reward, kl in ((2, 0.1, 0.4), (4, 0.2, 1.29), (6, 0.4, 1.31), (8, 0.4, None))
    }
    assert world.job(held.job.id).best_checkpoint_id == made[best].id


def test_a_damaged_best_is_replaced_by_the_best_of_the_others(world: World) -> None:
    held = world.running(keep_last=3)
    first, best, last = (
        world.publish(held, step, Standing(step, reward))
        for step, reward in ((2, 0.5), (4, 0.9), (6, 0.1))
    )
    with world.database.write() as transaction:
        assert checkpoints.set_aside(transaction, best, "it is gone")
    assert world.job(held.job.id).best_checkpoint_id == first.id
    with world.database.write() as transaction:
        assert checkpoints.set_aside(transaction, last, "it is gone")
    assert world.job(held.job.id).latest_checkpoint_id == first.id
    world.clock.advance(8 * 24 * 3600)
    with world.database.write() as transaction:
        assert checkpoints.mark_inspected(transaction) == 0, "no newer one is whole"
    world.publish(held, 8)
    with world.database.write() as transaction:
        assert checkpoints.mark_inspected(transaction) == 2


def test_a_damaged_result_or_base_of_a_job_waits_for_a_backup(world: World) -> None:
    held = world.running(keep_last=4)
    result, base, other, _ = (world.publish(held, step) for step in (2, 4, 6, 8))
    user = world.submit()
    with world.database.write() as transaction:
        for row in (result, base, other):
            checkpoints.set_aside(transaction, row, "it is gone")
        transaction.get_one(JobRow, held.job.id).result_checkpoint_id = result.id
        transaction.add(JobInputRow(job_id=user, checkpoint_id=base.id))
    world.clock.advance(8 * 24 * 3600)
    with world.database.write() as transaction:
        assert checkpoints.is_any_to_remove(transaction)
        assert checkpoints.mark_inspected(transaction) == 1
        assert [row.id for row in checkpoints.to_remove(transaction)] == [other.id]


def test_a_checkpoint_that_was_set_aside_since_it_was_read_is_taken_back(world: World) -> None:
    held = world.running(keep_last=3)
    world.publish(held, 2)
    last = world.publish(held, 4)
    with world.database.write() as transaction:
        assert checkpoints.set_aside(transaction, last, "it is gone")
    assert last.damage is None, "it is as it was read"
    with world.database.write() as transaction:
        checkpoints.note_whole(transaction, last)
    assert world.job(held.job.id).latest_checkpoint_id == last.id
    assert world.events(held.job.id)[-1].message == "checkpoint of step 4 is whole again"
