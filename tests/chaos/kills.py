"""Workers and trainers are killed; the jobs go on from their newest checkpoints."""

import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import psutil

from chaos import books
from chaos.books import Running
from chaos.scoreboard import Result, Row, percentile
from chaos.stack import DIALECTS, Dialect, Stack, stack, until

SLOTS = ("a", "b", "c")
JOBS = 40
STEPS = 60
KILLS = 100
BUCKET_KILLS = 200
RECOVERIES = 40
MOST_IN_A_ROW = 2
"""Kills of a job without a newer checkpoint; a third would make the job's own fault likely."""
RECOVERY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Kill:
    """A killed worker or trainer."""

    at: datetime
    victim: str
    attempt: Running


def kill_at_random(
    dialect: Dialect, *, most: int = KILLS, jobs: int = JOBS, has_bucket: bool = False
) -> Result:
    """Kill workers and trainers while jobs run."""
    with stack(
        has_broker=True, dialect=dialect, slots=SLOTS, has_bucket=has_bucket
    ) as installation:
        for number in range(jobs):
            installation.submit(number, steps=STEPS, every=4, seconds=0.05)
        kills = _kill(installation, most, seconds=900)
        books.until_all_ended(installation, 300)
        found = books.close(installation)
    figures = _counts(kills) | {
        "jobs": found.jobs,
        "attempts": found.attempts,
        "lost": found.lost,
        "doubled": found.doubled,
        "poisoned": found.poisoned,
        "unequal weights": found.unequal,
        "findings": len(found.findings),
    }
    problems = list(found.findings)
    if found.ends.get("succeeded", 0) != jobs:
        problems.append(f"attempts ended as {found.ends}")
    return Result(found.is_clean and len(kills) >= most, figures, problems)


def _recovery() -> Result:
    """Kill what runs one of two jobs, with a slot for each, and wait for the next claim."""
    with stack(has_broker=True, slots=SLOTS[:2]) as installation:
        jobs = [installation.submit(n, steps=10**5, every=20, seconds=0.05) for n in range(2)]
        kills = _kill(installation, RECOVERIES, seconds=600, pause=3.0)
        until(lambda: len(books.running(installation)) == len(jobs), 60, "the last claim")
        waits = {kind: _recoveries(installation, kills, kind) for kind in ("worker", "trainer")}
        for job_id in jobs:
            installation.api("POST", f"/fine_tuning/jobs/{job_id}/cancel")
    figures = _counts(kills)
    for kind, seconds in waits.items():
        figures[f"{kind} death to next claim, p50"] = percentile(seconds, 0.5)
        figures[f"{kind} p99"] = percentile(seconds, 0.99)
    slowest = max(max(seconds) for seconds in waits.values())
    return Result(slowest <= RECOVERY_SECONDS and len(kills) >= RECOVERIES, figures)


def _counts(kills: list[Kill]) -> dict[str, Any]:
    return {
        f"{kind} kills": sum(kill.victim == kind for kill in kills)
        for kind in ("worker", "trainer")
    }


def _kill(installation: Stack, count: int, *, seconds: float, pause: float = 1.0) -> list[Kill]:
    """Kill workers and trainers at random until ``count`` attempts were ended so."""
    chance = random.Random(2)
    kills: list[Kill] = []
    killed: set[tuple[str, int]] = set()
    in_a_row: Counter[str] = Counter()
    give_up = time.monotonic() + seconds
    while len(kills) < count and time.monotonic() < give_up:
        time.sleep(chance.uniform(0.2, pause))
        living = [
            one for one in books.running(installation) if (one.job_id, one.attempt) not in killed
        ]
        for attempt in living:
            if attempt.checkpoints:
                in_a_row[attempt.job_id] = 0
        victims = [one for one in living if in_a_row[one.job_id] < MOST_IN_A_ROW]
        if not victims:
            if not living and books.have_all_ended(installation):
                break
            continue
        victim, kind = chance.choice(victims), chance.choice(("worker", "trainer"))
        if _kill_one(installation, victim, kind):
            kills.append(Kill(datetime.now(UTC), kind, victim))
            killed.add((victim.job_id, victim.attempt))
            in_a_row[victim.job_id] += 1
    return kills


def _kill_one(installation: Stack, victim: Running, kind: str) -> bool:
    if kind == "worker":
        installation.kill(f"worker-{victim.slot}")
        return True
    for trainer in installation.trainers(victim.slot):
        with contextlib.suppress(psutil.NoSuchProcess):
            trainer.kill()
            return True
    return False


def _recoveries(installation: Stack, kills: list[Kill], victim: str) -> list[float]:
    """Seconds from each death to the next claim of its job."""
    seconds = []
    for kill in kills:
        if kill.victim == victim:
            begun = books.next_start(installation, kill.attempt.job_id, kill.attempt.attempt)
            if begun is not None and begun > kill.at:
                seconds.append((begun - kill.at).total_seconds())
    return seconds or [0.0]


def rows() -> list[Row]:
    """Kills on each database, and how soon a job goes on."""
    promise = "every job ends once, with the weights of an undisturbed run; none is poisoned"
    made = [
        Row(
            f"kills-{dialect}",
            f"{KILLS} kills of workers and trainers over {JOBS} jobs, {dialect}",
            promise,
            partial(kill_at_random, dialect),
        )
        for dialect in DIALECTS
    ]
    made.append(
        Row(
            "kills-s3",
            f"{BUCKET_KILLS} kills of workers and trainers over {2 * JOBS} jobs, sqlite, files in a "
            "bucket",
            promise,
            partial(kill_at_random, "sqlite", most=BUCKET_KILLS, jobs=2 * JOBS, has_bucket=True),
        )
    )
    made.append(
        Row(
            "recovery",
            f"{RECOVERIES} kills of workers and trainers, with a slot for each job",
            f"the job is claimed again within {RECOVERY_SECONDS:.0f} s",
            _recovery,
        )
    )
    return made
