"""Roll-ups of metrics: the least and the greatest value of each series in each bucket of steps.

A bucket of level n has ``2**n`` steps; its first one is a multiple of ``2**n``. Once an attempt has
reported a step after a bucket, the bucket is closed, and one row has its extremes of all series. A
row of a level is made of two rows of the level below, those of the lowest level of the attempt's
own rows. A row that comes late replaces the roll-ups of its step. So a chart of a long job reads a
few hundred rows, and what it shows of closed buckets does not change while the job goes on.

Each attempt has roll-ups of its own, so a rewind changes none of them. A reader takes only buckets
that lie inside the steps that the job has of an attempt (`service.store.rewinds`). It reads the
rows of all other steps: of open buckets, where one attempt follows another, and of jobs or parts of
jobs that an earlier version has stored without roll-ups.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import orjson
from sqlalchemy import delete, func, select

from dar.protocol.base import MAX_COUNT
from dar.protocol.metrics import current_name
from dar.protocol.worker import MetricsRow
from service.store import metrics, rewinds
from service.store.database import Transaction
from service.store.fence import Held
from service.store.metrics import Points
from service.store.tables import AttemptRow, MetricRollupRow, MetricRow

LOWEST = 4
"""Lowest level that is stored. Lower ones would take as much room as the rows themselves."""
LONG_GAP = 4
"""Neighbouring buckets without a roll-up of which the rows are read at once; those of fewer buckets
may have roll-ups of lower levels."""

Extremes = Sequence[Any]
"""Step, value and time of the least value, and the same of the greatest if that is another step.
The value is None if the bucket has only steps without one."""
ByName = dict[str, Extremes]


@dataclass(frozen=True, slots=True)
class Sampled:
    """Series of which a bucket of steps has at most two points."""

    series: dict[str, Points]
    resolution: int
    """Steps of a bucket; 1: every point is there."""


# --- written when rows arrive ---


def add(transaction: Transaction, held: Held, rows: Sequence[MetricsRow]) -> None:
    """Write the roll-ups of buckets that rows have closed or changed; the rows are stored."""
    if not rows:
        return
    job_id, attempt = held.job.id, held.attempt.number
    start = held.attempt.start_step
    if doubled := {row.step for row in rows if row.step < start}:
        _forget(transaction, job_id, doubled)
    before = (
        transaction.scalars(
            select(func.max(MetricRow.step)).where(
                MetricRow.job_id == job_id,
                MetricRow.attempt == attempt,
                MetricRow.seq < rows[0].seq,
            )
        ).one()
        or 0
    )
    newest = max(before, *(row.step for row in rows))
    touched = {row.step >> LOWEST for row in rows if row.step >= start}
    if before:
        touched.add(before >> LOWEST)
    closed = {bucket for bucket in touched if (bucket + 1) << LOWEST <= newest}
    level, fresh = LOWEST, _of_rows(transaction, job_id, attempt, closed)
    while fresh:
        _store(transaction, job_id, attempt, level, fresh, before)
        level += 1
        parents = {bucket >> 1 for bucket in fresh}
        closed = {bucket for bucket in parents if (bucket + 1) << level <= newest}
        fresh = _of_halves(transaction, job_id, attempt, level, closed, fresh)


def _forget(transaction: Transaction, job_id: str, steps: Collection[int]) -> None:
    """Delete the roll-ups of steps that two attempts have reported, of all attempts."""
    for level in range(LOWEST, MAX_COUNT.bit_length()):
        transaction.execute(
            delete(MetricRollupRow)
            .where(
                MetricRollupRow.job_id == job_id,
                MetricRollupRow.level == level,
                MetricRollupRow.bucket.in_({step >> level for step in steps}),
            )
            .execution_options(synchronize_session=False)
        )


def _of_rows(
    transaction: Transaction, job_id: str, attempt: int, buckets: Collection[int]
) -> dict[int, ByName]:
    """The extremes of buckets of the lowest level, from the rows of an attempt."""
    found: dict[int, ByName] = {}
    for first, after in _runs(sorted(buckets)):
        rows = transaction.execute(
            select(MetricRow.step, MetricRow.at, MetricRow.values_json)
            .where(
                MetricRow.job_id == job_id,
                MetricRow.step.between(first << LOWEST, (after << LOWEST) - 1),
                MetricRow.attempt == attempt,
            )
            .order_by(MetricRow.step, MetricRow.id)
        ).all()
        for name, points in metrics.series_of(rows).items():
            for bucket, extremes in _buckets(points, LOWEST):
                if bucket in buckets:
                    found.setdefault(bucket, {})[name] = extremes
    return found


def _of_halves(
    transaction: Transaction,
    job_id: str,
    attempt: int,
    level: int,
    buckets: Collection[int],
    known: Mapping[int, ByName],
) -> dict[int, ByName]:
    """The extremes of buckets, from those of the level below, of which some are known.

    A bucket is left out if an earlier version has stored rows of it without a roll-up.
    """
    if not buckets:
        return {}
    missing = [half for one in buckets for half in (2 * one, 2 * one + 1) if half not in known]
    halves: dict[int, ByName] = {half: {} for half in missing}
    stored = transaction.execute(
        select(MetricRollupRow.bucket, MetricRollupRow.extremes_json).where(
            MetricRollupRow.job_id == job_id,
            MetricRollupRow.attempt == attempt,
            MetricRollupRow.level == level - 1,
            MetricRollupRow.bucket.in_(missing),
        )
    ).all()
    halves |= {bucket: orjson.loads(text) for bucket, text in stored}
    bare = [half for half in missing if not halves[half]]
    unknown = {half for half in bare if _has_rows(transaction, job_id, attempt, level - 1, half)}
    halves |= known
    return {
        one: _merged_names(halves[2 * one], halves[2 * one + 1])
        for one in buckets
        if unknown.isdisjoint((2 * one, 2 * one + 1))
    }


def _has_rows(transaction: Transaction, job_id: str, attempt: int, level: int, bucket: int) -> bool:
    first = bucket << level
    found = select(MetricRow.id).where(
        MetricRow.job_id == job_id,
        MetricRow.step.between(first, first + (1 << level) - 1),
        MetricRow.attempt == attempt,
    )
    return transaction.scalars(found.limit(1)).first() is not None


def _store(
    transaction: Transaction,
    job_id: str,
    attempt: int,
    level: int,
    fresh: Mapping[int, ByName],
    before: int,
) -> None:
    """Store roll-ups; those that were closed before step ``before`` came may replace others."""
    replaced = [bucket for bucket in fresh if (bucket + 1) << level <= before]
    if replaced:
        transaction.execute(
            delete(MetricRollupRow)
            .where(
                MetricRollupRow.job_id == job_id,
                MetricRollupRow.attempt == attempt,
                MetricRollupRow.level == level,
                MetricRollupRow.bucket.in_(replaced),
            )
            .execution_options(synchronize_session=False)
        )
    transaction.insert_rows(
        MetricRollupRow,
        [
            {
                "job_id": job_id,
                "attempt": attempt,
                "level": level,
                "bucket": bucket,
                "extremes_json": orjson.dumps(extremes).decode(),
            }
            for bucket, extremes in sorted(fresh.items())
        ],
    )


# --- extremes ---


def _buckets(points: Points, level: int) -> list[tuple[int, Extremes]]:
    """The extremes of a series in each bucket that has points, in their order."""
    found: list[tuple[int, Extremes]] = []
    start, steps = 0, points.step
    while start < len(steps):
        bucket = steps[start] >> level
        end = bisect_left(steps, (bucket + 1) << level, start)
        found.append((bucket, _extremes(points, start, end)))
        start = end
    return found


def _extremes(points: Points, start: int, end: int) -> Extremes:
    values = points.value[start:end]
    finite = [value for value in values if value is not None]
    if not finite:
        return points.step[start], None, points.at[start]
    low = start + values.index(min(finite))
    high = start + values.index(max(finite))
    least = (points.step[low], points.value[low], points.at[low])
    if low == high:
        return least
    return *least, points.step[high], points.value[high], points.at[high]


def _merged(first: Extremes, second: Extremes) -> Extremes:
    """The extremes of two ranges of steps, the earlier one first."""
    if second[1] is None:
        return first
    if first[1] is None:
        return second
    low = second[:3] if second[1] < first[1] else first[:3]
    high = second[-3:] if second[-2] > first[-2] else first[-3:]
    return low if low[0] == high[0] else (*low, *high)


def _merged_names(first: ByName, second: ByName) -> ByName:
    merged = {**first, **second}
    for name in first.keys() & second.keys():
        merged[name] = _merged(first[name], second[name])
    return merged


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ranges of consecutive numbers among sorted ones: the first and the one after the last."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


# --- read for a chart ---


@dataclass(frozen=True, slots=True)
class _Segment:
    """Steps of which an attempt's rows are the job's."""

    attempt: int
    first: int
    last: int


def read(
    transaction: Transaction,
    job_id: str,
    *,
    max_points: int,
    names: Collection[str] | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
) -> Sampled:
    """The series of a job with at most ``max_points`` points each.

    If the steps are too many, each bucket of steps keeps the least and the greatest value of a
    series. The buckets are the smallest for which that suffices, so they change only when the
    number of steps has doubled, and then each point that remains was there before.
    """
    last = rewinds.last_steps(transaction, job_id)
    started = transaction.execute(
        select(AttemptRow.number, AttemptRow.start_step)
        .where(AttemptRow.job_id == job_id)
        .order_by(AttemptRow.number)
    ).all()
    segments = [_Segment(n, start, last[n]) for n, start in started if start <= last[n]]
    first = _first(transaction, job_id, from_step or 0)
    limit = MAX_COUNT if to_step is None else to_step
    newest = _newest(transaction, job_id, segments, from_step or 0, limit)
    if first is None or newest is None:
        return Sampled({}, 1)
    level = _level(first, newest, max_points)
    if level == 0:
        found = metrics.read(transaction, job_id, names=names, from_step=from_step, to_step=to_step)
        return Sampled(found, 1)
    collector = _Collector(transaction, job_id, level, names)
    collector.take(segments, first, newest)
    return Sampled(collector.series(), 1 << level)


def _first(transaction: Transaction, job_id: str, from_step: int) -> int | None:
    found = select(func.min(MetricRow.step)).where(
        MetricRow.job_id == job_id, MetricRow.step >= from_step
    )
    return transaction.scalars(found).one()


def _newest(
    transaction: Transaction, job_id: str, segments: Sequence[_Segment], least: int, limit: int
) -> int | None:
    """The last step of the job from ``least`` to ``limit``; None: it has none."""
    for segment in reversed(segments):
        found = transaction.scalars(
            select(func.max(MetricRow.step)).where(
                MetricRow.job_id == job_id,
                MetricRow.attempt == segment.attempt,
                MetricRow.step.between(max(segment.first, least), min(segment.last, limit)),
            )
        ).one()
        if found is not None:
            return found
    return None


def _level(first: int, newest: int, max_points: int) -> int:
    """The lowest level at which these steps give at most ``max_points`` points."""
    if newest - first < max_points:
        return 0
    level = 1
    while 2 * ((newest >> level) - (first >> level) + 1) > max(2, max_points) and level < 63:
        level += 1
    return level


@dataclass(slots=True)
class _Collector:
    """Collects the extremes of each series in buckets of one level."""

    transaction: Transaction
    job_id: str
    level: int
    names: Collection[str] | None
    found: dict[str, list[tuple[int, Extremes]]] = field(default_factory=dict)
    stored: dict[str, list[tuple[int, Extremes]] | None] = field(default_factory=dict)
    """The same lists by the names in the database; None: nobody has asked for the series."""
    bare: list[tuple[int, int]] = field(default_factory=list)
    """First and last steps of ranges whose rows are to be read."""

    def take(self, segments: Sequence[_Segment], first: int, newest: int) -> None:
        """Take the steps from ``first`` to ``newest``."""
        position = first
        for number, segment in enumerate(segments):
            # The step where one attempt follows another may have rows of both.
            low = max(position, first if number == 0 else segment.first + 1)
            is_last = number == len(segments) - 1
            high = min(newest, segment.last if is_last else segment.last - 1)
            if low > high:
                continue
            if low > position:
                self.bare.append((position, low - 1))
            self._fill(segment.attempt, low, high, self.level)
            position = high + 1
        if position <= newest:
            self.bare.append((position, newest))
        self._read_bare()

    def series(self) -> dict[str, Points]:
        """The series, each with at most two points of a bucket."""
        return {name: _points(buckets) for name, buckets in self.found.items() if buckets}

    def _fill(self, attempt: int, low: int, high: int, level: int) -> None:
        """Take steps of one attempt from the largest buckets that they have as a whole."""
        if low > high:
            return
        if level < LOWEST:
            self.bare.append((low, high))
            return
        start, end = (low + (1 << level) - 1) >> level, (high + 1) >> level
        if start >= end:
            self._fill(attempt, low, high, level - 1)
            return
        there = self._take_stored(attempt, level, start, end)
        self._fill(attempt, low, (start << level) - 1, level - 1)
        for before, after in pairwise([start - 1, *there, end]):
            gap = ((before + 1) << level, (after << level) - 1)
            if after - before > LONG_GAP:
                self.bare.append(gap)
            else:
                self._fill(attempt, *gap, level - 1)
        self._fill(attempt, end << level, high, level - 1)

    def _take_stored(self, attempt: int, level: int, start: int, end: int) -> list[int]:
        """Take the roll-ups of buckets; returns those that there are."""
        rows = self.transaction.execute(
            select(MetricRollupRow.bucket, MetricRollupRow.extremes_json)
            .where(
                MetricRollupRow.job_id == self.job_id,
                MetricRollupRow.attempt == attempt,
                MetricRollupRow.level == level,
                MetricRollupRow.bucket.between(start, end - 1),
            )
            .order_by(MetricRollupRow.bucket)
        ).all()
        for bucket, text in rows:
            whole = bucket >> (self.level - level)
            for name, extremes in orjson.loads(text).items():
                if name not in self.stored:
                    self.stored[name] = self._list_of(current_name(name))
                into = self.stored[name]
                if into is not None:
                    into.append((whole, extremes))
        return [bucket for bucket, _ in rows]

    def _list_of(self, name: str) -> list[tuple[int, Extremes]] | None:
        if self.names is not None and name not in self.names:
            return None
        return self.found.setdefault(name, [])

    def _read_bare(self) -> None:
        """Take the steps that have no roll-ups from their rows."""
        ranges: list[tuple[int, int]] = []
        for low, high in sorted(self.bare):
            if ranges and ranges[-1][1] + 1 >= low:
                ranges[-1] = (ranges[-1][0], high)
            else:
                ranges.append((low, high))
        for low, high in ranges:
            found = metrics.read(
                self.transaction, self.job_id, names=self.names, from_step=low, to_step=high
            )
            for name, points in found.items():
                self.found.setdefault(name, []).extend(_buckets(points, self.level))


def _points(buckets: list[tuple[int, Extremes]]) -> Points:
    """The points of a series, from the extremes of ranges of which some share a bucket."""
    buckets.sort(key=lambda one: one[1][0])
    merged: list[tuple[int, Extremes]] = []
    for bucket, extremes in buckets:
        if merged and merged[-1][0] == bucket:
            merged[-1] = (bucket, _merged(merged[-1][1], extremes))
        else:
            merged.append((bucket, extremes))
    points = Points()
    for _, extremes in merged:
        low, high = extremes[:3], extremes[-3:]
        pair = (low,) if len(extremes) == 3 else (low, high) if low[0] < high[0] else (high, low)
        for step, value, at in pair:
            points.step.append(step)
            points.value.append(value)
            points.at.append(at)
    return points
