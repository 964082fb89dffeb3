"""Workers are frozen for longer than their lease, and continue when another has their job."""

import contextlib
import itertools
import random
import signal
import time
from collections.abc import Callable
from functools import partial

import psutil

from chaos import books
from chaos.books import Running
from chaos.scoreboard import Result, Row
from chaos.stack import DIALECTS, SERVICE, UNFENCED, Dialect, Stack, stack, until

SLOTS = ("a", "b", "c")
JOBS = 24
"""Jobs at the start. More follow if these end before all freezes are done."""
FREEZES = 15
TTL = 2.0


def freeze_at_random(
    dialect: Dialect, *, is_fenced: bool, most: int = FREEZES, jobs: int = JOBS
) -> Result:
    """Freeze workers until a successor has their job, then let them continue."""
    with stack(
        dialect=dialect,
        slots=SLOTS,
        service=SERVICE if is_fenced else UNFENCED,
        lease_ttl_seconds=TTL,
        heartbeat_seconds=0.3,
    ) as installation:
        numbers = itertools.count()

        def submit() -> None:
            installation.submit(next(numbers), steps=30, every=3, seconds=0.1)

        for _ in range(jobs):
            submit()
        frozen = _freeze_some(installation, most, submit)
        with contextlib.suppress(TimeoutError):
            books.until_all_ended(installation, 180 if is_fenced else 30)
        _until_zombies_left(installation)
        found = books.close(installation)
    figures = {
        "freezes": frozen,
        "jobs": found.jobs,
        "attempts": found.attempts,
        "lost": found.lost,
        "doubled": found.doubled,
        "unequal weights": found.unequal,
        "findings": len(found.findings),
    }
    if is_fenced:
        return Result(found.is_clean and frozen >= most, figures, found.findings)
    problems = [] if found.findings else ["nothing was found, so the suite would miss a lost fence"]
    return Result(bool(found.findings or found.doubled), figures, problems)


def _freeze_some(installation: Stack, most: int, submit: Callable[[], None]) -> int:
    chance = random.Random(3)
    done = 0
    give_up = time.monotonic() + 300
    while done < most and time.monotonic() < give_up:
        time.sleep(chance.uniform(0.1, 0.5))
        victims = [one for one in books.running(installation) if one.checkpoints]
        if not victims:
            if books.have_all_ended(installation):
                submit()
            continue
        _freeze(installation, chance.choice(victims))
        done += 1
    return done


def _freeze(installation: Stack, victim: Running) -> None:
    """Stop worker and trainer until another attempt runs the job, then let them continue."""
    worker = installation.process(f"worker-{victim.slot}")
    trainers = installation.trainers(victim.slot)
    worker.send_signal(signal.SIGSTOP)
    for trainer in trainers:
        with contextlib.suppress(psutil.NoSuchProcess):
            trainer.suspend()

    def is_taken() -> bool:
        return books.next_start(installation, victim.job_id, victim.attempt) is not None or (
            installation.job(victim.job_id)["status"] == "succeeded"
        )

    with contextlib.suppress(TimeoutError):
        until(is_taken, 10 * TTL, "a successor")
    worker.send_signal(signal.SIGCONT)
    for trainer in trainers:
        with contextlib.suppress(psutil.NoSuchProcess):
            trainer.resume()


def _until_zombies_left(installation: Stack) -> None:
    with contextlib.suppress(TimeoutError):
        until(lambda: not installation.trainers(), 20, "the end of all trainers")


def rows() -> list[Row]:
    """The fence on each database, and a service without it."""
    made = [
        Row(
            f"freezes-{dialect}",
            f"{FREEZES} workers frozen beyond their lease of {TTL:.0f} s, {dialect}",
            "the successor finishes alone, and the late one is turned away",
            partial(freeze_at_random, dialect, is_fenced=True),
        )
        for dialect in DIALECTS
    ]
    made.append(
        Row(
            "freezes-without-fence",
            "the same on a service whose fence is switched off",
            "the auditor finds something, so the rows above can fail",
            lambda: freeze_at_random("sqlite", is_fenced=False),
        )
    )
    return made
