"""Jobs in lists: pages without gaps, labels compared as they are, nothing of anybody else's."""

from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from dar.errors import InvalidRequestError, NotFoundError, PreconditionFailedError
from dar.protocol.job_config import UpdateJob
from fakes.world import World
from service.store import job_changes, jobs
from service.store.job_filters import JobFilter
from service.store.paging import Cursor
from service.store.tables import JobRow, ProjectRow


def ids(world: World, cursor: Cursor, **wanted: Any) -> tuple[list[str], bool]:
    with world.database.read() as transaction:
        page = jobs.list_page(transaction, world.project_id, cursor, JobFilter(**wanted))
    return [job.id for job in page.rows], page.has_more


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_go_forth_and_back_without_gaps(world: World, order: Any) -> None:
    made = [world.submit() for _ in range(5)]
    expected = made if order == "asc" else made[::-1]
    assert ids(world, Cursor(limit=2, order=order)) == (expected[:2], True)
    assert ids(world, Cursor(limit=2, order=order, after=expected[1])) == (expected[2:4], True)
    assert ids(world, Cursor(limit=2, order=order, after=expected[3])) == (expected[4:], False)
    assert ids(world, Cursor(limit=2, order=order, before=expected[3])) == (expected[1:3], True)
    assert ids(world, Cursor(limit=5, order=order, before=expected[2])) == (expected[:2], False)


def test_a_cursor_that_names_nothing_is_refused(world: World) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ids(world, Cursor(after="ftjob-none"))
    assert caught.value.param == "after"


@pytest.mark.parametrize("key", ["team", 'quo"te', "do.t", "$", "a b", "[0]", "ü'; --"])
def test_a_label_is_compared_as_it_is(world: World, key: str) -> None:
    mine = world.submit(labels={key: "a", "other": "b"})
    world.submit(labels={key: "b"})
    world.submit(labels=None)
    assert ids(world, Cursor(), labels={key: "a"}) == ([mine], False)
    assert ids(world, Cursor(), labels={key: "a", "other": "c"}) == ([], False)


def test_jobs_are_narrowed_by_status(world: World) -> None:
    held, waiting = world.running(), world.submit()
    assert ids(world, Cursor(), status="queued") == ([waiting], False)
    assert ids(world, Cursor(), status="running") == ([held.job.id], False)


def test_jobs_are_narrowed_by_model_text_label_and_time(world: World) -> None:
    first = world.submit(model="Small_1", labels={"team": "Blue 100%"}, model_name="ft-one")
    second = world.submit(model="Small-1", labels={"team": "red"}, model_name="ft-two")
    third = world.submit(model="other", labels=None, model_name="ft-three")
    for wanted, expected in (
        ({"model": "Small_1"}, [first]),
        ({"text": "small_1"}, [first]),
        ({"text": "blue 100%"}, [first]),
        ({"text": "FT-T"}, [third, second]),
        ({"text": third[-9:]}, [third]),
        ({"text": "%"}, [first]),
        ({"text": "team"}, []),
        ({"labels": {"team": None}}, [second, first]),
        ({"labels": {"team": "red"}, "model": "Small-1"}, [second]),
        ({"created_after": world.clock.now}, [third]),
        ({"created_before": world.clock.now}, [second, first]),
    ):
        assert ids(world, Cursor(), **wanted) == (expected, False), wanted


def test_a_page_follows_a_job_that_matches_no_longer(world: World) -> None:
    made = [world.submit() for _ in range(3)]
    with world.database.write() as transaction:
        jobs.cancel(transaction, world.project_id, made[1])
    assert ids(world, Cursor(after=made[1]), status="queued") == ([made[0]], False)
    assert ids(world, Cursor(before=made[1]), status="queued") == ([made[2]], False)


def test_labels_and_limits_change_only_for_who_knows_them(world: World) -> None:
    held = world.running(labels={"team": "a"})
    job_id, tag = held.job.id, job_changes.etag_of(held.job)

    def change(if_match: str | None, **values: Any) -> JobRow:
        wanted = UpdateJob.model_validate(values)
        with world.database.write() as transaction:
            return job_changes.update_job(transaction, world.project_id, job_id, wanted, if_match)

    changed = change(tag, metadata={"team": "b"}, limits={"max_reward_calls": 5})
    assert (changed.labels, changed.parsed_spec.dar.limits.max_reward_calls) == ({"team": "b"}, 5)
    with pytest.raises(PreconditionFailedError):
        change(tag, metadata=None)
    assert change("*", metadata=None).labels is None
    before = len(world.events(job_id))
    change(None, metadata=None)
    assert len(world.events(job_id)) == before  # nothing has changed
    assert ids(world, Cursor(), labels={"team": None}) == ([], False)


def test_a_job_of_another_project_is_not_there(world: World) -> None:
    with world.database.write() as transaction:
        transaction.add(ProjectRow(id="proj-other", created_at=transaction.now))
    theirs = world.submit(project_id="proj-other")
    with pytest.raises(NotFoundError):
        world.job(theirs)
    assert ids(world, Cursor()) == ([], False)


def test_a_key_makes_one_job(world: World) -> None:
    world.submit(idempotency_key="k")
    with pytest.raises(IntegrityError):
        world.submit(idempotency_key="k")
