"""The database's clock is set an hour forward or back: nothing ends early, nothing waits it out.

Leases are in `test_reconciler`, submissions in `test_submission_claims`.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import update

from dar.errors import ConflictError
from dar.protocol.worker import Fail, Release, RewardAnnouncement
from fakes.world import World
from service.artifacts import Artifacts
from service.background.notifier import Notifier
from service.background.reconciler import Reconciler
from service.background.waker import Waker
from service.secret_box import SecretBox
from service.storage.folder import FolderStorage
from service.store import fence, leases, outcomes, reward_pauses, reward_requests, workers
from service.store.reward_pauses import RewardCheck
from service.store.tables import JobRow, RewardRequestRow

HOUR = 3600


@pytest.fixture(params=[HOUR, -HOUR])
def jump(request: pytest.FixtureRequest) -> int:
    seconds: int = request.param
    return seconds


def end(world: World, held: fence.Held, said: Any) -> str:
    with world.database.write() as transaction:
        outcomes.end(transaction, held.attempt.lease_id, said)
    return str(held.job.id)


def probes_due(world: World) -> list[str]:
    with world.database.read() as transaction:
        return [job.id for job in reward_pauses.due(transaction, 10)]


def note(world: World, job_id: str, check: RewardCheck) -> bool:
    with world.database.write() as transaction:
        return reward_pauses.note_probe(transaction, job_id, 1, check, 5.0)


def test_waits_of_jobs_end(world: World, jump: int) -> None:
    paused = end(world, world.running(), Release(attempt=1, reason="paused_reward", is_outage=True))
    waiting = end(world, world.running(), Release(attempt=1, reason="waiting_for_reward"))
    fails = Fail(attempt=1, kind="transient", code="x", message="x", owner="service")
    failed = end(world, world.running(), fails)
    fresh = world.submit()
    world.clock.advance(jump)
    claimed = [world.claim(slot=f"slot-{number}") for number in range(3)]
    ids = {held.job.id for held in claimed if held is not None}
    assert ids == {failed, fresh}, "neither waits for an hour"
    with world.database.read() as transaction:
        assert leases.count_due(transaction, timedelta(seconds=5)) == 0
    assert set(probes_due(world)) == {paused, waiting}
    # only a worker can reach the service: one tries ten minutes after the last attempt
    unsure = RewardCheck(is_back=False, reason="connect", is_undecided=True)
    assert note(world, waiting, unsure)
    assert not note(world, paused, unsure)
    assert probes_due(world) == [], "the next probe has its usual wait"
    world.clock.advance(60)
    assert probes_due(world) == [paused]


def test_a_worker_that_is_gone_frees_its_name(world: World, jump: int) -> None:
    world.claim(report=world.report("one"))
    world.clock.advance(jump)
    with world.database.read() as transaction:
        assert workers.able(transaction) == []
        assert [view.state for view in workers.list_all(transaction)] == ["gone"]
    stranger = {"report": world.report("two"), "incarnation": "life-2"}
    assert world.claim(**stranger) is None
    world.clock.advance(-1)  # it is seen by a transaction that began before
    with pytest.raises(ConflictError):
        world.claim(report=world.report("three"), incarnation="life-3")


def test_a_wait_that_has_begun_is_kept_when_the_clock_goes_on(world: World) -> None:
    waiting = world.submit(not_before=world.clock.now + timedelta(seconds=60))
    world.clock.advance(30)
    assert world.claim() is None
    world.clock.advance(40)
    assert world.claim().job.id == waiting  # type: ignore[union-attr] # it fails if it is None


def test_a_wait_that_an_earlier_version_has_set_is_kept(world: World) -> None:
    job_id = world.submit(not_before=world.clock.now + timedelta(seconds=60))
    with world.database.write() as transaction:
        transaction.execute(
            update(JobRow).where(JobRow.id == job_id).values(not_before_set_at=None)
        )
    assert world.claim() is None
    world.clock.advance(61)
    assert world.claim() is not None


def reconciler_of(world: World, folder: Path, elapsed: list[float]) -> Reconciler:
    """A reconciler whose own clock is ``elapsed``."""
    artifacts = Artifacts(FolderStorage(folder / "artifacts"))
    artifacts.storage.prepare()
    notifier = Notifier(world.database)
    clocks = {"ttl_seconds": 60.0, "pause_seconds": 1.0, "monotonic": lambda: elapsed[0]}
    return Reconciler(world.database, artifacts, Waker(None), notifier, **clocks)  # type: ignore[arg-type] # each has its type


def test_a_job_runs_for_as_long_as_it_may_with_several_replicas(
    world: World, tmp_path: Path
) -> None:
    elapsed = [0.0]
    replicas = [reconciler_of(world, tmp_path, elapsed) for _ in range(2)]
    held = world.running(spec=world.limited(max_seconds=100))
    started_at = held.attempt.started_at

    def look(seconds: float) -> str | None:
        for _ in range(int(seconds / 10)):
            elapsed[0] += 10
            world.clock.advance(10)
            with world.database.write() as transaction:
                now = fence.hold(transaction, held.attempt.lease_id, 1)
                leases.renew(transaction, now, timedelta(seconds=60), None)
            for replica in replicas:
                replica.run_once()
        return world.job(held.job.id).status_detail

    look(20)
    for number in (1, 2):
        world.clock.advance(HOUR)
        assert look(10) == "starting"
        assert world.attempt(held).started_at == started_at + timedelta(seconds=number * HOUR)
    assert look(50) == "starting"
    assert look(10) == "stopping"


def test_a_reward_request_keeps_the_time_that_it_has(
    world: World, jump: int, tmp_path: Path
) -> None:
    elapsed = [0.0]
    reconciler = reconciler_of(world, tmp_path, elapsed)
    held, box = world.running(), SecretBox([Fernet.generate_key().decode()])
    wanted = RewardAnnouncement(
        request_id="rwq_1",
        component="judge",
        step=1,
        sample_ids=["s0"],
        token_sha256="1" * 64,
        deadline=1.0,  # the worker's clock is off by decades
        seconds=300.0,
    )

    def announce() -> tuple[RewardRequestRow, float | None]:
        with world.database.write() as transaction:
            now = fence.hold(transaction, held.attempt.lease_id, 1)
            row = reward_requests.announce(
                transaction, box, now, wanted, is_signature_required=False
            )
            return row, reward_requests.seconds_left(transaction, row, wanted)

    row, left = announce()
    assert (row.deadline - world.clock.now).total_seconds() == 300
    assert left == 300
    reconciler.run_once()
    elapsed[0] += 100
    world.clock.advance(100 + jump)
    reconciler.run_once()
    row, left = announce()
    assert left == pytest.approx(200 if jump > 0 else 300)
    result = reward_requests.CallbackResult("{}", "2" * 64, None)
    with world.database.write() as transaction:
        outcome, _ = reward_requests.settle(transaction, "rwq_1", result)
    assert outcome == "accepted"
