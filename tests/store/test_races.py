"""What happens when two requests meet: the second waits for the first and sees what it did."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dar.errors import ConflictError
from fakes.world import World
from service.store import checkpoints, deletion, files, jobs, promotions, transitions
from service.store.database import Transaction
from service.store.tables import FileRow, JobInputRow, JobRow

pytestmark = pytest.mark.parametrize("dialect", ["postgresql"], indirect=True)
HEAD_START = 0.3


@contextmanager
def meanwhile(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Runs ``work`` in a thread that has got to its first wait when the block begins.

    Gives its outcome afterwards.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except ConflictError as error:
            outcome.append(error.error_code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(HEAD_START)
    assert thread.is_alive(), outcome
    yield outcome
    thread.join(10)


def in_transaction(world: World, work: Callable[[Transaction], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with world.database.write() as transaction:
            return work(transaction)

    return run


def test_a_cancellation_waits_for_a_drain_and_then_holds(world: World) -> None:
    held = world.running()
    cancel = in_transaction(world, lambda tx: jobs.cancel(tx, world.project_id, held.job.id).status)
    with world.database.write() as drain:
        transitions.move(drain, "drained", JobRow.id == held.job.id, "drained")
        with meanwhile(cancel) as outcome:
            drain.commit()
    assert outcome == ["cancelled"]


def test_a_file_is_not_deleted_under_a_submission(world: World) -> None:
    with world.database.write() as transaction:
        transaction.add(
            FileRow(
                id="file-1",
                project_id=world.project_id,
                filename="rows.jsonl",
                purpose="fine-tune",
                bytes=2,
                sha256="0" * 64,
                num_rows=1,
                columns={},
                created_at=world.clock.now,
            )
        )
    delete = in_transaction(world, lambda tx: files.remove(tx, world.project_id, "file-1"))
    with world.database.write() as submission:
        files.get(submission, world.project_id, "file-1", is_keeping=True)
        with meanwhile(delete) as outcome:
            world.submit()
            submission.commit()
    assert outcome == ["file_in_use"]


def test_a_checkpoint_is_not_removed_under_a_submission(world: World) -> None:
    held = world.running(keep_last=1)
    base = world.publish(held, 2)
    world.publish(held, 4)
    with world.database.write() as submission:
        assert checkpoints.keep(submission, [base.id])
        with meanwhile(in_transaction(world, checkpoints.mark_superseded)) as outcome:
            user = world.submit()
            submission.add(JobInputRow(job_id=user, checkpoint_id=base.id))
            submission.commit()
    assert outcome == [0]
    with world.database.write() as submission:
        assert not checkpoints.keep(submission, ["ckpt-none"])


def test_a_checkpoint_is_not_removed_under_its_promotion(world: World) -> None:
    held = world.running(keep_last=1)
    older = world.publish(held, 2)
    world.publish(held, 4)
    place = (world.project_id, held.job.id, older.id)
    delete = in_transaction(world, lambda tx: deletion.mark_checkpoint(tx, *place))
    for work, expected in (
        (in_transaction(world, checkpoints.mark_superseded), 0),
        (delete, "checkpoint_in_use"),
    ):
        with world.database.write() as promotion:
            assert checkpoints.keep(promotion, [older.id])
            with meanwhile(work) as outcome:
                promotions.promote(promotion, world.project_id, "mine", older.id)
                promotion.commit()
        assert outcome == [expected]
        with world.database.write() as transaction:
            promotions.remove(transaction, world.project_id, "mine")


@pytest.mark.parametrize("work", [checkpoints.set_aside, checkpoints.note_whole])
def test_a_verification_and_a_deletion_do_not_wait_for_each_other(world: World, work: Any) -> None:
    held = world.running()
    older = world.publish(held, 2)
    world.publish(held, 4)
    said = ("it is gone",) if work is checkpoints.set_aside else ()
    if not said:
        with world.database.write() as transaction:
            checkpoints.set_aside(transaction, older, "it is gone")
    verify = in_transaction(world, lambda tx: work(tx, older, *said))
    with world.database.write() as user:
        jobs.locked(user, world.project_id, held.job.id)
        with meanwhile(verify) as outcome:
            deletion.mark_checkpoint(user, world.project_id, held.job.id, older.id)
            user.commit()
    assert outcome == [False if said else None]
    kinds = [event.data.get("kind") for event in world.events(held.job.id)]
    assert kinds[-1] == "checkpoint_deleted", "what was deleted is neither damaged nor whole"
