"""The bucket of all files is away, full, slow or read-only for a while."""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Literal, get_args

from chaos import books
from chaos.scoreboard import Result, Row
from chaos.stack import Stack, stack, until

Outage = Literal["away", "full", "slow", "read-only"]
OUTAGES: tuple[Outage, ...] = get_args(Outage)
SECONDS = 12.0
FEW_VOLUMES, MANY_VOLUMES = 12, 100
SLOW_BYTES_PER_SECOND = 50_000
"""A checkpoint of these rows takes 25 s then."""


def unusable_bucket(what: Outage, *, seconds: float = SECONDS) -> Result:
    """Make the bucket unusable while two jobs train and a worker has just got a third one."""
    volumes = FEW_VOLUMES if what == "full" else 0
    with stack(slots=("a", "b"), has_bucket=True, volumes=volumes) as installation:
        jobs = [installation.submit(n, steps=250, every=10, seconds=0.1) for n in range(3)]
        until(lambda: _all_have_checkpoints(installation), 60, "the first checkpoints")
        with _outage(installation, what):
            before = _steps(installation, jobs)
            installation.want_worker("late")
            time.sleep(seconds)
            during = _steps(installation, jobs) - before
        books.until_all_ended(installation, 240)
        found = books.close(installation)
    extra = found.attempts - found.jobs
    problems = [f"the outage ended {extra} attempts: {found.ends}"] if extra else []
    if during < 2 * seconds:
        problems.append(f"{during} steps were trained in {seconds:.0f} s")
    figures = {
        "seconds": seconds,
        "steps trained meanwhile": during,
        "jobs": found.jobs,
        "attempts": found.attempts,
        "lost": found.lost,
        "doubled": found.doubled,
        "unequal weights": found.unequal,
        "findings": len(found.findings),
    }
    return Result(found.is_clean and not problems, figures, [*problems, *found.findings])


def _all_have_checkpoints(installation: Stack) -> bool:
    found = books.running(installation)
    return len(found) == 2 and all(one.checkpoints for one in found)


def _steps(installation: Stack, jobs: list[str]) -> int:
    return sum(len(books.reported_steps(installation, job_id)) for job_id in jobs)


@contextlib.contextmanager
def _outage(installation: Stack, what: Outage) -> Iterator[None]:
    seaweed, network = installation.seaweed, installation.network
    assert seaweed is not None
    assert network is not None
    if what == "away":
        seaweed.kill()
        yield
        seaweed.start()
    elif what == "full":
        seaweed.fill()
        yield
        seaweed.kill()
        seaweed.volumes = MANY_VOLUMES
        seaweed.start()
    elif what == "slow":
        network.bytes_per_second = SLOW_BYTES_PER_SECOND
        yield
        network.bytes_per_second = None
    else:
        seaweed.allow_writes(are_allowed=False)
        yield
        seaweed.allow_writes(are_allowed=True)


def rows() -> list[Row]:
    """One row for each way in which a bucket is unusable."""
    return [
        Row(
            f"bucket-{what}",
            f"the bucket is {what} for {SECONDS:.0f} s",
            "training goes on, no attempt ends, nothing is lost",
            partial(unusable_bucket, what),
        )
        for what in OUTAGES
    ]
