"""Workers and trainers are killed; the jobs go on from their newest checkpoints."""

import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

import psutil

from chaos import books
from chaos.books import Running
from chaos.scoreboard import Result, Row, percentile
from chaos.stack import Dialect, Stack, stack

SLOTS = ("a", "b", "c")
JOBS = 40
STEPS = 40
KILLS = 100
MOST_IN_A_ROW = 2
"""Kills of a job without a newer checkpoint; a third would make the job's own fault likely."""
RECOVERY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Kill:
    """A killed worker or trainer."""

    at: datetime
    victim: str
    attempt: Running


def _kills(dialect: Dialect, *, replicas: int = 1) -> Result:
    settings = {"dialect": dialect, "slots": SLOTS, "replicas": replicas}
    with stack(has_broker=True, **settings) as installation:
        for number in range(JOBS):
            installation.submit(number, steps=STEPS, every=4, seconds=0.05)
        kills = _kill_at_random(installation)
        books.until_all_ended(installation, 300)
        found = books.close(installation)
        waits = {
            victim: _recoveries(installation, kills, victim) for victim in ("worker", "trainer")
        }
    figures = {
        "worker kills": len([kill for kill in kills if kill.victim == "worker"]),
        "trainer kills": len([kill for kill in kills if kill.victim == "trainer"]),
        "jobs": found.jobs,
        "attempts": found.attempts,
        "lost": found.lost,
        "doubled": found.doubled,
        "poisoned": found.poisoned,
        "unequal weights": found.unequal,
        "findings": len(found.findings),
    }
    problems = list(found.findings)
    for victim, seconds in waits.items():
        figures |= {
            f"{victim} death to next claim p50": percentile(seconds, 0.5),
            f"{victim} p99": percentile(seconds, 0.99),
        }
    if found.ends.get("succeeded", 0) != JOBS:
        problems.append(f"attempts ended as {found.ends}")
    return Result(found.is_clean and len(kills) >= KILLS, figures, problems)


def _kill_at_random(installation: Stack) -> list[Kill]:
    chance = random.Random(2)
    kills: list[Kill] = []
    in_a_row: Counter[str] = Counter()
    give_up = time.monotonic() + 900
    while len(kills) < KILLS and time.monotonic() < give_up:
        time.sleep(chance.uniform(0.2, 1.0))
        attempts = books.running(installation)
        for attempt in attempts:
            if attempt.checkpoints:
                in_a_row[attempt.job_id] = 0
        victims = [one for one in attempts if in_a_row[one.job_id] < MOST_IN_A_ROW]
        if not attempts and not _are_jobs_left(installation):
            break
        if not victims:
            continue
        victim, kind = chance.choice(victims), chance.choice(("worker", "trainer"))
        if _kill(installation, victim, kind):
            kills.append(Kill(datetime.now(UTC), kind, victim))
            in_a_row[victim.job_id] += 1
    return kills


def _are_jobs_left(installation: Stack) -> bool:
    return bool(installation.api("GET", "/fine_tuning/jobs?status=queued&limit=1")["data"])


def _kill(installation: Stack, victim: Running, kind: str) -> bool:
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
    """One row for each database."""
    promise = "every job ends once, with the weights of an undisturbed run; none is poisoned"
    return [
        Row(
            f"kills-{dialect}",
            f"{KILLS} kills of workers and trainers over {JOBS} jobs, {dialect}",
            promise,
            lambda dialect=dialect: _kills(dialect),  # type: ignore[misc] # bound now
        )
        for dialect in ("sqlite", "postgresql")
    ]
