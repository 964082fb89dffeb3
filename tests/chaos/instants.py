"""Workers and services are killed at the instants that `dar.fault_points` marks."""

from functools import partial

from chaos import books
from chaos.scoreboard import Result, Row
from chaos.stack import DIALECTS, Dialect, Stack, stack, until
from dar.fault_points import INSTANTS, arm

STRIKES = 3
"""How often each instant is armed."""
OF_TRAINERS = "checkpoint."
"""Instants that a scripted trainer does not pass: `chaos.training` arms them."""
OF_BUCKETS = {"worker.parts_stored"}


def strike_instants(
    dialect: Dialect, *, strikes: int = STRIKES, has_bucket: bool = False
) -> Result:
    """Arm one instant after the other while jobs run."""
    left_out = set() if has_bucket else OF_BUCKETS
    instants = [name for name in INSTANTS if not (name.startswith(OF_TRAINERS) or name in left_out)]
    never: list[str] = []
    with stack(
        dialect=dialect, slots=("a", "b"), has_faults=True, has_bucket=has_bucket
    ) as installation:
        number = 0
        for instant in instants * strikes:
            for _ in range(2):
                installation.submit(number, steps=12, every=3, seconds=0.05)
                number += 1
            arm(installation.faults, instant)
            if not _has_struck(installation, instant):
                never.append(instant)
            # The next strike must not hit the same job before it has a newer checkpoint.
            books.until_all_ended(installation, 120)
        found = books.close(installation)
    figures = {
        "instants": len(instants),
        "kills": len(instants) * strikes - len(never),
        "jobs": found.jobs,
        "attempts": found.attempts,
        "lost": found.lost,
        "doubled": found.doubled,
        "poisoned": found.poisoned,
        "unequal weights": found.unequal,
        "findings": len(found.findings),
    }
    problems = [f"{instant} was never reached" for instant in never] + found.findings
    return Result(found.is_clean and not never, figures, problems)


def _has_struck(installation: Stack, instant: str) -> bool:
    try:
        until(lambda: not (installation.faults / instant).exists(), 60, instant)
    except TimeoutError:
        return False
    return True


def rows() -> list[Row]:
    """One row for each database, and one with a bucket."""
    title = "workers and services killed at the worst instants of their work"
    promise = "every job ends once, with the weights of an undisturbed run; none is poisoned"
    made = [
        Row(
            f"instants-{dialect}", f"{title}, {dialect}", promise, partial(strike_instants, dialect)
        )
        for dialect in DIALECTS
    ]
    made.append(
        Row(
            "instants-s3",
            f"{title}, sqlite, files in a bucket",
            promise,
            partial(strike_instants, "sqlite", has_bucket=True),
        )
    )
    return made
