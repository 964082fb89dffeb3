"""Events by type: a database finds those that a stream would name so."""

import re
from pathlib import Path
from typing import get_args

import pytest

from dar.protocol.stream import STREAM_TYPES, StreamType
from fakes.world import World
from service.store import events
from service.store.events import NewEvent, stream_type
from service.store.paging import Cursor

MADE = (
    NewEvent("a note"),
    NewEvent("a checkpoint", data={"kind": "checkpoint", "step": 1}),
    NewEvent("it is damaged", data={"kind": "checkpoint_damaged", "step": 1}, level="error"),
    NewEvent("a limit", data={"kind": "limit"}),
    NewEvent("no kind", data={"step": 1}),
    NewEvent("of a trainer", data={"kind": "status"}, attempt=1, step=1),
    NewEvent("of a trainer", data={"kind": "checkpoint"}, attempt=1, step=1),
    NewEvent("a step", type="metrics", data={"step": 1}, attempt=1, step=1),
    NewEvent("samples", data={"kind": "samples", "step": 1}, attempt=1, step=1),
    NewEvent("a later step", type="metrics", data={"step": 2}, attempt=1, step=2),
)


def test_each_event_has_one_type_by_which_the_database_finds_it(world: World) -> None:
    held = world.running()
    job_id = held.job.id
    with world.database.write() as transaction:
        events.append(transaction, job_id, MADE)
        assert transaction.news == {job_id}
    with world.database.read() as transaction:
        every = events.read_after(transaction, job_id, 0, 100)
        by_type = {
            name: [row.seq for row in events.read_after(transaction, job_id, 0, 100, types=[name])]
            for name in STREAM_TYPES
        }
        assert by_type == {
            name: [row.seq for row in every if events.stream_type(row) == name]
            for name in STREAM_TYPES
        }
        assert all(by_type.values())
        assert sum(map(len, by_type.values())) == len(every)
        assert len(every) == len(MADE) + 2
        cursor = Cursor(limit=100, order="asc")
        listed = events.list_page(transaction, job_id, cursor, rewound=False).rows
        assert [row.seq for row in listed] == [
            row.seq for row in every if stream_type(row) != "sample"
        ]
        assert [row.seq for row in events.read_after(transaction, job_id, 3, 2)] == [4, 5]
        assert events.newest_seqs(transaction, [job_id, "none"]) == {job_id: (12, "running")}


@pytest.mark.parametrize("name", get_args(StreamType))
def test_a_page_of_one_type_has_no_other(world: World, name: StreamType) -> None:
    job_id = world.running().job.id
    with world.database.write() as transaction:
        events.append(transaction, job_id, MADE)
    with world.database.read() as transaction:
        found = events.list_page(
            transaction, job_id, Cursor(limit=100), rewound=True, types=[name, "metrics"]
        ).rows
        assert {events.stream_type(row) for row in found} == {name, "metrics"}


def test_every_event_about_a_checkpoint_is_in_the_stream_of_checkpoints() -> None:
    sources = "".join(path.read_text() for path in Path(events.__file__).parents[1].rglob("*.py"))
    appended = r'(?:"kind": |kind, what = |_tell\(transaction, checkpoint, )"(checkpoint_\w+)"'
    kinds = set(re.findall(appended, sources))
    assert len(kinds) == 5
    assert kinds <= set(events.CHECKPOINT_KINDS)
