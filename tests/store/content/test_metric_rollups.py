"""A chart shows the extremes of all rows that are the job's, whatever has roll-ups."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import delete, event, select

from dar.protocol.worker import Batch
from fakes.world import World
from service.store import fence, metric_rollups, metrics, retention, rows, tables

MOST = 500
"""Rows of a batch."""
Series = dict[str, list[tuple[int, float | None, float]]]


def metric(seq: int, step: int, **values: float | None) -> dict[str, Any]:
    named = {f"dar/{name}": value for name, value in values.items()}
    return {"type": "metrics", "seq": seq, "at": 1000.0 + seq, "step": step, "values": named}


class Told:
    """An attempt that numbers its rows."""

    def __init__(self, world: World, held: fence.Held) -> None:
        self.world, self.held, self.seq = world, held, 0

    def say(self, *steps: int, **values: Callable[[int], float | None]) -> None:
        """Report steps in batches, with values that depend on the step."""
        said = []
        for step in steps[:MOST]:
            self.seq += 1
            said.append(metric(self.seq, step, **{n: of(step) for n, of in values.items()}))
        batch = Batch.model_validate({"attempt": self.held.attempt.number, "rows": said})
        with self.world.database.write() as transaction:
            now = fence.lock(transaction, self.held.attempt.lease_id)
            rows.add(transaction, now, batch.rows)
        if steps[MOST:]:
            self.say(*steps[MOST:], **values)

    def successor(self, start: int) -> "Told":
        """The attempt that goes on from a checkpoint of this one."""
        self.world.publish(self.held, start)
        number = self.held.attempt.number + 1
        held = self.world.claim(self.held.attempt.slot, incarnation=f"life-{number}")
        assert held is not None
        assert held.attempt.start_step == start
        return Told(self.world, held)


def begin(world: World, steps: int = 10_000) -> Told:
    return Told(world, world.running(total_steps=steps))


def plain(series: dict[str, metrics.Points]) -> Series:
    return {
        name: list(zip(points.step, points.value, points.at, strict=True))
        for name, points in series.items()
    }


def sampled(world: World, job_id: str, most: int, **wanted: Any) -> tuple[Series, int]:
    with world.database.read() as transaction:
        found = metric_rollups.read(transaction, job_id, max_points=most, **wanted)
    return plain(found.series), found.resolution


def by_hand(world: World, job_id: str, most: int, **wanted: Any) -> tuple[Series, int]:
    """The same from every row."""
    with world.database.read() as transaction:
        series = plain(metrics.read(transaction, job_id, **wanted))
    steps = {step for points in series.values() for step, _, _ in points}
    if not steps or max(steps) - min(steps) < most:
        return series, 1
    size = 2
    while 2 * (max(steps) // size - min(steps) // size + 1) > most:
        size *= 2
    found: Series = {}
    for name, points in series.items():
        buckets: dict[int, list[tuple[int, float | None, float]]] = {}
        for point in points:
            buckets.setdefault(point[0] // size, []).append(point)
        kept = found[name] = []
        for inside in buckets.values():
            finite = [point for point in inside if point[1] is not None]
            least = min(finite, key=lambda point: point[1] or 0.0, default=inside[0])
            greatest = max(finite, key=lambda point: point[1] or 0.0, default=inside[0])
            kept += sorted({least, greatest})
    return found, size


def check(world: World, job_id: str) -> None:
    for most in (2, 7, 40, 64, 200, 1000):
        for wanted in ({}, {"from_step": 37}, {"to_step": 333}, {"from_step": 100, "to_step": 611}):
            expected = by_hand(world, job_id, most, **wanted)
            assert sampled(world, job_id, most, **wanted) == expected, (most, wanted)
    only = by_hand(world, job_id, 40, names=["dar/loss"])
    assert sampled(world, job_id, 40, names=["dar/loss"]) == only


def wave(step: int) -> float | None:
    """Values without order, some of them equal, and some missing."""
    return None if step % 37 == 5 else float((step * 7919) % 101)


def sparse(step: int) -> float | None:
    return float(-step % 13)


@pytest.fixture
def history(world: World) -> str:
    """A job of three attempts, of which two were rewound, and whose late rows came at last."""
    draw = random.Random(4)
    first = begin(world)
    step = 1
    while step < 700:
        size = draw.choice((1, 2, 15, 16, 17, 40))
        first.say(*range(step, min(step + size, 700)), loss=wave)
        step += size
    first.say(*range(10, 700, 50), entropy=sparse)
    second = first.successor(403)
    second.say(*range(404, 500), loss=lambda step: -float(step % 29))
    third = second.successor(450)
    third.say(*range(451, 500), loss=wave)
    second.say(*range(500, 520), loss=lambda _: 1e9)
    first.say(200, 201, 690, loss=lambda step: 5000.0 + step)
    third.say(*range(500, 900), loss=wave, entropy=sparse)
    return first.held.job.id


def test_a_chart_has_the_extremes_of_all_steps_of_the_job(world: World, history: str) -> None:
    """Of rewound rows none, of late ones those before the next attempt began."""
    check(world, history)
    series, _ = sampled(world, history, 2)
    assert {value for _, value, _ in series["dar/loss"]} == {-28.0, 5201.0}


def test_a_chart_is_right_where_an_earlier_version_has_stored_no_roll_ups(
    world: World, history: str
) -> None:
    draw = random.Random(9)
    for share in (0.1, 0.6, 1.0):
        with world.database.write() as transaction:
            for row in transaction.scalars(select(tables.MetricRollupRow)).all():
                if draw.random() < share:
                    transaction.delete(row)
        check(world, history)


def test_roll_ups_of_a_job_that_began_without_them_begin_with_its_new_steps(world: World) -> None:
    told = begin(world)
    told.say(*range(1, 300), loss=wave)
    with world.database.write() as transaction:
        transaction.execute(delete(tables.MetricRollupRow))
    told.say(*range(300, 1000), loss=wave)
    check(world, told.held.job.id)
    with world.database.read() as transaction:
        lowest = transaction.scalars(
            select(tables.MetricRollupRow.bucket).where(tables.MetricRollupRow.level == 4)
        ).all()
    assert sorted(lowest) == list(range(299 // 16, 1000 // 16))


def test_a_step_that_two_attempts_report_shows_the_later_value(world: World) -> None:
    first = begin(world)
    first.say(*range(1, 200), loss=wave)
    second = first.successor(150)
    second.say(20, 21, 150, loss=lambda _: -7.0)
    second.say(*range(151, 400), loss=wave)
    check(world, first.held.job.id)


def test_a_chart_that_grows_keeps_its_points(world: World) -> None:
    """New points come at the end; after a doubling, those that remain were there before."""
    told = begin(world)
    job_id, before, size = told.held.job.id, [], 1
    for start in range(1, 1200, 60):
        told.say(*range(start, start + 60), loss=wave)
        series, resolution = sampled(world, job_id, 100)
        points = series["dar/loss"]
        assert len(points) <= 100
        closed = start // resolution * resolution
        if resolution == size:
            assert [p for p in points if p[0] < closed] == [p for p in before if p[0] < closed]
        else:
            assert resolution == 2 * size or size == 1
            assert {p for p in points if p[0] < start} <= {*before, *points[-2:]}
        before, size = points, resolution


def test_a_chart_of_a_long_job_reads_few_rows(world: World) -> None:
    told = begin(world)
    told.say(*range(1, 3000), loss=wave)
    read: list[str] = []
    event.listen(
        world.database.engine, "before_cursor_execute", lambda *given: read.append(given[2])
    )
    with world.database.read() as transaction:
        metric_rollups.read(transaction, told.held.job.id, max_points=100)
    of_values = [statement for statement in read if "values_json" in statement]
    assert len(of_values) <= 2, of_values
    assert len(read) < 30


def test_roll_ups_go_with_their_rows(world: World) -> None:
    """By age before the rows, so that a chart never shows what the rows do not have."""
    kinds = [rule.table for rule in retention.RULES]
    assert kinds.index(tables.MetricRollupRow) < kinds.index(tables.MetricRow)
    told = begin(world)
    told.say(*range(1, 40), loss=wave)
    with world.database.read() as transaction:
        assert retention.row_counts(transaction)["metric_rollups"] == 3


def test_an_earlier_version_that_knows_no_roll_ups_can_delete_a_job(world: World) -> None:
    job_id = world.submit()
    with world.database.write() as transaction:
        place = {"job_id": job_id, "attempt": 1, "level": 4, "bucket": 0}
        transaction.add(tables.MetricRollupRow(**place, extremes_json="{}"))
    with world.database.write() as transaction:
        transaction.execute(delete(tables.JobEventRow).where(tables.JobEventRow.job_id == job_id))
        transaction.execute(delete(tables.JobRow).where(tables.JobRow.id == job_id))
    with world.database.read() as transaction:
        assert transaction.scalars(select(tables.MetricRollupRow)).all() == []
