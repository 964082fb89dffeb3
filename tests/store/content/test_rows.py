"""What a trainer says is stored once, in order, whatever is sent twice or late."""

from typing import Any

import pytest
from sqlalchemy import event, update

from dar.errors import ConflictError, NotFoundError
from dar.protocol.jobs import Forecast
from dar.protocol.samples import FLAGS, prompt_id_of
from dar.protocol.worker import Batch
from fakes.world import World
from service.store import events, fence, jobs, metrics, outcomes, rows, samples, tables
from service.store.paging import Cursor


def metric(seq: int, step: int, **values: float | None) -> dict[str, Any]:
    named = {f"dar/{name}": value for name, value in values.items()}
    return {"type": "metrics", "seq": seq, "at": 1000.0 + seq, "step": step, "values": named}


def say(world: World, held: fence.Held, *said: dict[str, Any]) -> int | rows.Contradiction:
    batch = Batch.model_validate({"attempt": held.attempt.number, "rows": list(said)})
    with world.database.write() as transaction:
        now = fence.lock(transaction, held.attempt.lease_id)
        return rows.add(transaction, now, batch.rows)


def read(world: World, job_id: str, **wanted: Any) -> dict[str, list[tuple[int, float | None]]]:
    with world.database.read() as transaction:
        found = metrics.read(transaction, job_id, **wanted)
    return {
        name: list(zip(points.step, points.value, strict=True)) for name, points in found.items()
    }


def test_rows_are_acknowledged_up_to_the_last(world: World) -> None:
    held = world.running()
    assert say(world, held, metric(1, 1, loss=3.0), metric(2, 2, loss=2.0)) == 2
    assert say(world, held) == 2
    assert read(world, held.job.id) == {"dar/loss": [(1, 3.0), (2, 2.0)]}
    assert world.job(held.job.id).step == 2


def test_rows_sent_again_are_stored_once(world: World) -> None:
    held = world.running()
    for _ in range(3):
        assert say(world, held, metric(1, 1, loss=3.0), metric(2, 2, loss=2.0)) == 2
    assert say(world, held, metric(2, 2, loss=2.0), metric(3, 3, loss=1.0)) == 3
    assert read(world, held.job.id) == {"dar/loss": [(1, 3.0), (2, 2.0), (3, 1.0)]}
    steps = [event for event in world.events(held.job.id) if event.type == "metrics"]
    assert [event.data["step"] for event in steps] == [1, 2, 3]


def test_a_gap_is_refused_and_says_where_to_go_on(world: World) -> None:
    held = world.running()
    say(world, held, metric(1, 1, loss=3.0))
    with pytest.raises(ConflictError, match="send from 2") as caught:
        say(world, held, metric(3, 3, loss=1.0))
    assert caught.value.error_code == "seq_gap"


def test_the_same_row_with_other_content_is_a_contradiction(world: World) -> None:
    held = world.running()
    say(world, held, metric(1, 1, loss=3.0))
    said = say(world, held, metric(1, 1, loss=3.5), metric(2, 2, loss=2.0))
    assert said == rows.Contradiction(seq=1)
    assert read(world, held.job.id) == {"dar/loss": [(1, 3.0)]}


def test_a_value_that_is_no_number_is_null(world: World) -> None:
    held = world.running()
    say(world, held, metric(1, 1, loss=None, rewards_mean=0.5))
    assert read(world, held.job.id)["dar/loss"] == [(1, None)]


def successor(world: World, first: fence.Held) -> fence.Held:
    held = world.claim(first.attempt.slot, incarnation=f"life-{first.attempt.number + 1}")
    assert held is not None
    return held


def told(world: World, job_id: str, *, rewound: bool = False) -> list[Any]:
    """The steps and messages of the events of trainers, the oldest first."""
    cursor = Cursor(limit=100, order="asc")
    with world.database.read() as transaction:
        found = events.list_page(transaction, job_id, cursor, rewound=rewound).rows
    said = [event for event in found if event.attempt is not None]
    return [event.step if event.type == "metrics" else event.message for event in said]


def test_what_a_later_attempt_does_again_is_shown_once(world: World) -> None:
    """At once, not only when the later attempt comes there."""
    first, job_id = world.running(), "ftjob-0001"
    assert first.job.id == job_id
    say(world, first, *[metric(n, n, loss=float(n)) for n in (1, 2, 3, 4)])
    world.publish(first, 2)
    second = successor(world, first)
    assert read(world, job_id) == {"dar/loss": [(1, 1.0), (2, 2.0)]}
    assert told(world, job_id) == [1, 2]
    say(world, second, metric(1, 3, loss=30.0))
    assert read(world, job_id) == {"dar/loss": [(1, 1.0), (2, 2.0), (3, 30.0)]}
    assert told(world, job_id) == [1, 2, 3]
    assert told(world, job_id, rewound=True) == [1, 2, 3, 4, 3]
    with world.database.read() as transaction:
        undone = metrics.read_rewound(transaction, job_id)
    assert {n: points["dar/loss"].value for n, points in undone.items()} == {1: [3.0, 4.0]}


def test_a_zombies_rows_are_the_jobs_up_to_the_step_its_successor_started_from(
    world: World,
) -> None:
    first, job_id = world.running(), "ftjob-0001"
    say(world, first, metric(1, 1, loss=1.0))
    world.publish(first, 2)
    second = successor(world, first)
    say(world, second, metric(1, 3, loss=30.0))
    said = {"type": "event", "at": 1000.5, "level": "error", "message": "ahead"}
    data = {"kind": "calibration", "phase": "policy"}
    late = [
        metric(2, 2, loss=2.0, rewards_mean=0.5),
        said | {"seq": 3, "step": 2, "message": "in time"},
        metric(4, 3, loss=-1.0),
        metric(5, 7, loss=-1.0),
        said | {"seq": 6, "step": 8, "data": data},
        said | {"seq": 7, "message": "from a worker of an earlier version"},
        {"type": "samples", "seq": 8, "at": 1.0, "step": 7, "samples": [sample(7, 9.0)]},
        {"type": "samples", "seq": 9, "at": 1.0, "step": 2, "samples": [sample(2, 0.0)]},
    ]
    assert say(world, first, *late) == 9
    assert read(world, job_id)["dar/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert groups(world, job_id) == [2]
    assert groups(world, job_id, rewound=True) == [7, 2]
    say(world, second, metric(2, 4, loss=40.0))
    assert told(world, job_id) == [1, 3, 2, "in time", 4]
    assert told(world, job_id, rewound=True)[4:6] == [
        "ahead",
        "from a worker of an earlier version",
    ]
    job = world.job(job_id)
    assert (job.step, job.forecast) == (4, None)
    with world.database.read() as transaction:
        newest = metrics.newest_of_running(transaction, 10)[job_id]
    assert newest == {"dar/loss": 40.0}


def test_an_attempt_from_an_older_checkpoint_rewinds_all_before_it(world: World) -> None:
    first, job_id = world.running(), "ftjob-0001"
    say(world, first, *[metric(n, n, loss=1.0) for n in (1, 2, 3, 4, 5)])
    world.publish(first, 2)
    damaged = world.publish(first, 4)
    second = successor(world, first)
    say(world, second, metric(1, 5, loss=2.0))
    with world.database.write() as transaction:
        transaction.get_one(tables.CheckpointRow, damaged.id).status = "deleting"
    third = successor(world, second)
    assert third.attempt.start_step == 2
    assert read(world, job_id) == {"dar/loss": [(1, 1.0), (2, 1.0)]}
    say(world, third, metric(1, 3, loss=3.0))
    assert read(world, job_id) == {"dar/loss": [(1, 1.0), (2, 1.0), (3, 3.0)]}


def test_steps_after_the_checkpoint_that_a_stopped_job_ended_with_are_not_the_jobs(
    world: World,
) -> None:
    held, job_id = world.running(), "ftjob-0001"
    say(world, held, *[metric(n, n, loss=float(n)) for n in (1, 2, 3)])
    world.publish(held, 2)
    with world.database.write() as transaction:
        jobs.stop(transaction, world.project_id, job_id)
    with world.database.read() as transaction:
        cursor = metrics.last_id(transaction, job_id)
        assert metrics.rewound_to(transaction, world.job(job_id), cursor) is None
    with world.database.write() as transaction:
        outcomes.lose(transaction, fence.lock(transaction, held.attempt.lease_id), "gone")
    said = {"type": "samples", "seq": 4, "at": 1.0}
    late = [
        said | {"step": 3, "samples": [sample(3, 0.0)]},
        said | {"seq": 5, "step": 2, "samples": [sample(2, 0.0)]},
        metric(6, 4, loss=4.0),
    ]
    assert say(world, held, *late) == 6
    job = world.job(job_id)
    assert (job.status, job.step) == ("succeeded", 2)
    assert read(world, job_id) == {"dar/loss": [(1, 1.0), (2, 2.0)]}
    assert told(world, job_id) == [1, 2]
    assert groups(world, job_id) == [2]
    assert told(world, job_id, rewound=True) == [1, 2, 3]
    assert groups(world, job_id, rewound=True) == [3, 2]
    with world.database.read() as transaction:
        undone = metrics.read_rewound(transaction, job_id)
        assert metrics.rewound_to(transaction, job, cursor) == 2
    assert undone[1]["dar/loss"].step == [3, 4]


def test_a_cursor_brings_what_is_new_and_what_was_replayed(world: World) -> None:
    first = world.running()
    say(world, first, *[metric(n, n, loss=float(n)) for n in (1, 2, 3)])
    world.publish(first, 2)
    with world.database.read() as transaction:
        cursor = metrics.last_id(transaction, first.job.id)
    assert read(world, first.job.id, after=cursor) == {}
    second = world.claim(first.attempt.slot, incarnation="life-2")
    say(world, second, metric(1, 3, loss=30.0), metric(2, 4, loss=40.0))
    say(world, first, metric(4, 4, loss=4.0))
    assert read(world, first.job.id, after=cursor) == {"dar/loss": [(3, 30.0), (4, 40.0)]}


def test_series_are_narrowed_by_name_and_step(world: World) -> None:
    held = world.running()
    say(world, held, *[metric(n, n, loss=float(n), rewards_mean=0.0) for n in (1, 2, 3)])
    wanted = {"names": ["dar/loss"], "from_step": 2, "to_step": 2}
    assert read(world, held.job.id, **wanted) == {"dar/loss": [(2, 2.0)]}


def test_what_a_trainer_tells_becomes_an_event_of_its_attempt(world: World) -> None:
    held = world.running()
    said = {"type": "event", "seq": 1, "at": 1000.5, "level": "warn", "message": "hm"}
    say(world, held, said | {"data": {"kind": "memory", "free": 3}})
    event = world.events(held.job.id)[-1]
    assert (event.level, event.message, event.created_at.timestamp()) == ("warn", "hm", 1000.5)
    assert event.data == {"kind": "memory", "free": 3, "attempt": 1}


def sample(group: int, reward: float | None) -> dict[str, Any]:
    return {
        "group": group,
        "index": 0,
        "prompt": "p",
        "completion": "c",
        "finish_reason": "stop",
        "completion_tokens": 3,
        "reward": reward,
        "reward_status": "error" if reward is None else "reward",
        "advantage": reward,
        "weight": 1.0,
        "logp_policy": None,
        "logp_ref": None,
        "logp_behavior": -1.0,
    }


def groups(world: World, job_id: str, **wanted: Any) -> list[int]:
    found = {
        name: wanted.pop(name) for name in ("order", "limit", "after", "rewound") if name in wanted
    }
    asked = {"order": "asc", "limit": 10, "after": None} | found
    only = samples.Wanted(**wanted)
    with world.database.read() as transaction:
        return [row.body["group"] for row in samples.read(transaction, job_id, only, **asked)]


def test_samples_are_ordered_by_age_or_reward_with_missing_last(world: World) -> None:
    held = world.running()
    made = [sample(0, 0.5), sample(1, None), sample(2, -1.0), sample(3, 0.5)]
    say(world, held, {"type": "samples", "seq": 1, "at": 1.0, "step": 1, "samples": made})
    job_id = held.job.id
    assert groups(world, job_id) == [0, 1, 2, 3]
    assert groups(world, job_id, order="desc") == [3, 2, 1, 0]
    assert groups(world, job_id, order="reward") == [2, 0, 3, 1]
    assert groups(world, job_id, order="-reward") == [0, 3, 2, 1]
    assert groups(world, job_id, step=2) == []


def test_samples_are_found_by_prompt_group_flag_and_reward(world: World) -> None:
    held = world.running()
    first = [sample(0, 0.5), sample(1, None), sample(2, -1.0), sample(3, 2.0)]
    first[1] |= {"reward_status": "skip", "prompt": "other"}
    first[2]["finish_reason"] = "length"
    second = [sample(4, None), sample(5, 1.0) | {"prompt": "other"}]
    say(
        world,
        held,
        {"type": "samples", "seq": 1, "at": 1.0, "step": 1, "samples": first},
        {"type": "samples", "seq": 2, "at": 1.0, "step": 2, "samples": second},
    )
    job_id = held.job.id
    assert groups(world, job_id, prompt_id=prompt_id_of("other")) == [1, 5]
    assert groups(world, job_id, group=3) == [3]
    assert groups(world, job_id, flag="truncated") == [2]
    assert groups(world, job_id, flag="error") == [4]
    assert groups(world, job_id, flag="skipped") == [1]
    assert groups(world, job_id, flag="unscored") == [1, 4]
    assert groups(world, job_id, min_reward=0.5) == [0, 3, 5]
    assert groups(world, job_id, min_reward=-1.0, max_reward=0.5, order="-reward") == [0, 2]
    assert groups(world, job_id, step=2, flag="unscored", prompt_id=prompt_id_of("other")) == []
    with world.database.read() as transaction:
        found = samples.read(
            transaction, job_id, samples.Wanted(), order="asc", limit=10, after=None
        )
        for flag in FLAGS:
            named = [row.body["group"] for row in found if flag in samples.flags(row)]
            assert groups(world, job_id, flag=flag) == named
        with pytest.raises(NotFoundError):
            samples.get(transaction, "another", found[0].id)
        assert samples.get(transaction, job_id, found[0].id).body["group"] == 0


def test_the_completions_of_a_prompt_are_together_whatever_their_order(world: World) -> None:
    held = world.running()
    mixed = [sample(group, 1.0) | {"index": index} for index in (1, 0) for group in (2, 0, 1)]
    for step in (1, 2):
        row = {"type": "samples", "seq": step, "at": 1.0, "step": step, "samples": mixed}
        say(world, held, row)
    with world.database.write() as transaction:
        older = {"group_number": None, "group_index": None}
        statement = update(tables.SampleRow).where(tables.SampleRow.step == 1)
        transaction.execute(statement.where(tables.SampleRow.group_number == 2).values(older))
    whole, after = list[tuple[int, int, int]](), None
    while True:
        with world.database.read() as transaction:
            page = samples.read(
                transaction, held.job.id, samples.Wanted(), order="group", limit=5, after=after
            )
        if not page:
            break
        whole += [(row.step, row.body["group"], row.body["index"]) for row in page]
        after = page[-1].id
    second = [(2, group, index) for group in (0, 1, 2) for index in (0, 1)]
    first = [(1, group, index) for group in (0, 1) for index in (0, 1)]
    assert whole == [*second, *first, (1, 2, 1), (1, 2, 0)], "older rows have no number"


@pytest.mark.parametrize("order", ["asc", "desc", "reward", "-reward", "advantage", "-advantage"])
def test_pages_of_samples_neither_skip_nor_repeat(world: World, order: str) -> None:
    held = world.running()
    made = [sample(n, value) for n, value in enumerate([0.5, None, 0.5, -1.0, None, 2.0])]
    say(world, held, {"type": "samples", "seq": 1, "at": 1.0, "step": 1, "samples": made})
    whole, paged, after = groups(world, held.job.id, order=order), list[int](), None
    while True:
        with world.database.read() as transaction:
            page = samples.read(
                transaction, held.job.id, samples.Wanted(), order=order, limit=2, after=after
            )
        if not page:
            break
        paged += [row.body["group"] for row in page]
        after = page[-1].id
    assert paged == whole


def test_samples_of_a_replayed_step_are_those_of_the_last_attempt(world: World) -> None:
    first = world.running()
    row = {"type": "samples", "seq": 1, "at": 1.0, "step": 1}
    say(world, first, row | {"samples": [sample(0, 0.0)]})
    second = world.claim(first.attempt.slot, incarnation="life-2")
    say(world, second, row | {"samples": [sample(7, 0.0)]})
    assert groups(world, first.job.id) == [7]


@pytest.mark.parametrize("dialect", ["sqlite"], indirect=True)
def test_the_newest_samples_are_read_along_the_index(world: World) -> None:
    asked: list[tuple[str, Any]] = []

    def note(*said: Any) -> None:
        asked.append((said[2], said[3]))

    event.listen(world.database.engine, "before_cursor_execute", note)
    groups(world, "ftjob-none", order="desc")
    statement, values = asked[-1]
    with world.database.read() as transaction:
        plan = transaction.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
        steps = " ".join(row[-1] for row in plan)
    assert "ix_samples_job_id" in steps
    assert "TEMP B-TREE" not in steps


def test_the_forecast_of_a_calibration_stands_in_the_job(world: World) -> None:
    """The newest counts; one that this version cannot read leaves the job as it is."""
    held = world.running()
    forecast = {
        "step": 0, "phase": "base", "method": "frontier", "ending": "untrusted", "kl_budget": 1.0, "alpha": 0.2,
        "beta": 0.6, "reward_std": 0.3, "prompts": 16, "completions": 256, "tokens": 5000,
        "spent_completions": 256, "spent_tokens": 5000, "samples_per_prompt": 16,
        "start_reward": 0.1, "reward": 0.6, "kl": 0.8, "frontier": [{"alpha": 0.4, "reward": 0.4, "kl": 0.5}],
    }  # fmt: skip

    def event_row(seq: int, **values: object) -> dict[str, Any]:
        data = {"kind": "calibration", **forecast, **values}
        return {
            "type": "event",
            "seq": seq,
            "at": 1.0,
            "level": "info",
            "message": "m",
            "data": data,
        }

    assert world.job(held.job.id).forecast is None
    say(world, held, event_row(1), metric(2, 1, loss=3.0))
    assert world.job(held.job.id).forecast == forecast
    say(world, held, event_row(3, phase="policy", alpha=0.1), event_row(4, alpha="much"))
    assert world.job(held.job.id).forecast == forecast | {"phase": "policy", "alpha": 0.1}
    assert Forecast.model_validate(world.job(held.job.id).forecast).frontier[0].kl == 0.5
