"""The state table: every legal move works, every other is refused, each leaves one event."""

import pytest
from sqlalchemy import update

from dar.protocol.status import JOB_STATUSES, TERMINAL
from fakes.world import World
from service.store import transitions
from service.store.tables import JobRow


def put(world: World, job_id: str, status: str, *, is_cancelling: bool = False) -> None:
    """Put a job into a state, however it could have got there."""
    values = {
        "status": status,
        "finished_at": world.clock.now if status in TERMINAL else None,
        "cancel_requested_at": world.clock.now if is_cancelling else None,
    }
    with world.database.write() as transaction:
        transaction.execute(update(JobRow).where(JobRow.id == job_id).values(values))


def test_every_move_starts_from_its_sources_only(world: World) -> None:
    job_id = world.submit()
    for name, row in transitions.MOVES.items():
        for status in JOB_STATUSES:
            put(world, job_id, status, is_cancelling=row.is_cancelling is True)
            before = world.job(job_id)
            with world.database.write() as transaction:
                moved = transitions.move(transaction, name, JobRow.id == job_id, "a reason")
            after = world.job(job_id)
            assert (moved is not None) is (status in row.sources), (name, status)
            if moved is None:
                assert (after.status, after.event_seq) == (status, before.event_seq)
            else:
                assert (after.status, after.status_detail) == (row.target, row.detail)
                assert after.event_seq == before.event_seq + 1
                assert (after.finished_at is not None) is (row.target in TERMINAL)


@pytest.mark.parametrize(
    "name", [name for name, row in transitions.MOVES.items() if row.is_cancelling is not None]
)
def test_a_pending_cancellation_decides_which_moves_are_open(
    world: World, name: transitions.MoveName
) -> None:
    job_id = world.submit()
    row = transitions.MOVES[name]
    put(world, job_id, min(row.sources), is_cancelling=not row.is_cancelling)
    with world.database.write() as transaction:
        assert transitions.move(transaction, name, JobRow.id == job_id, "a reason") is None


def test_a_move_leaves_an_event_that_says_what_happened(world: World) -> None:
    job_id = world.submit()
    with world.database.write() as transaction:
        transitions.move(
            transaction, "cancelled", JobRow.id == job_id, "because", facts={"who": "me"}
        )
    first, second = world.events(job_id)
    assert (first.seq, first.data["status"]) == (1, "queued")
    assert (second.seq, second.message, second.type) == (2, "because", "message")
    assert second.data == {
        "kind": "status",
        "status": "cancelled",
        "status_detail": None,
        "attempt": 0,
        "who": "me",
    }


def test_a_move_that_is_rolled_back_leaves_no_event(world: World) -> None:
    job_id = world.submit()

    def work() -> None:
        with world.database.write() as transaction:
            transitions.move(transaction, "cancelled", JobRow.id == job_id, "because")
            raise LookupError

    with pytest.raises(LookupError):
        work()
    assert world.job(job_id).status == "queued"
    assert len(world.events(job_id)) == 1
