"""How soon a cancelled or drained job leaves its slot, and what a drain costs."""

import random
import signal
import time
from functools import partial

from chaos import books
from chaos.scoreboard import Result, Row, percentile
from chaos.stack import Stack, stack, until

CANCELS = 40
DRAINS = 20
CANCEL_SECONDS = 2.0
DRAIN_SECONDS = 30.0


def _cancels(*, has_broker: bool) -> Result:
    """Cancel jobs at random instants: in the queue, while they start, train or publish."""
    chance = random.Random(4)
    seconds: list[float] = []
    with stack(slots=("a",), has_broker=has_broker, cancel_seconds=30.0) as installation:
        for number in range(CANCELS):
            job_id = installation.submit(number, steps=1000, every=2, seconds=0.05)
            time.sleep(chance.uniform(0, 3))
            start = time.monotonic()
            installation.api("POST", f"/fine_tuning/jobs/{job_id}/cancel")
            until(lambda: _is_free(installation, job_id), 60, "a free slot")  # noqa: B023 - called at once
            seconds.append(time.monotonic() - start)
        found = books.close(installation, is_over=False)
    p99 = percentile(seconds, 0.99)
    figures = {
        "cancels": CANCELS,
        "seconds until the slot is free, p50": percentile(seconds, 0.5),
        "p99": p99,
        "findings": len(found.findings),
    }
    return Result(p99 <= CANCEL_SECONDS and not found.findings, figures, found.findings)


def _is_free(installation: Stack, job_id: str) -> bool:
    return installation.job(job_id)["status"] == "cancelled" and not installation.trainers("a")


def _drains() -> Result:
    """Stop the worker with SIGTERM at random instants; its successor goes on."""
    chance = random.Random(5)
    seconds: list[float] = []
    with stack(slots=("a",), has_broker=True) as installation:
        job_id = installation.submit(0, steps=400, every=1000, seconds=0.05)
        for _ in range(DRAINS):
            until(lambda: books.running(installation), 60, "an attempt")
            time.sleep(chance.uniform(0, 2))
            if installation.job(job_id)["status"] == "succeeded":
                break
            worker = installation.process("worker-a")
            start = time.monotonic()
            worker.send_signal(signal.SIGTERM)
            worker.wait()
            seconds.append(time.monotonic() - start)
        books.until_all_ended(installation, 120)
        found = books.close(installation)
        again = _steps_done_again(installation, job_id)
    p99 = percentile(seconds, 0.99)
    figures = {
        "drains": len(seconds),
        "seconds until the worker has left, p50": percentile(seconds, 0.5),
        "p99": p99,
        "steps done again": again,
        "unequal weights": found.unequal,
        "findings": len(found.findings),
    }
    holds = found.is_clean and p99 <= DRAIN_SECONDS and again == 0
    return Result(holds, figures, found.findings)


def _steps_done_again(installation: Stack, job_id: str) -> int:
    steps = books.reported_steps(installation, job_id)
    return len(steps) - len(set(steps))


def rows() -> list[Row]:
    """Cancellations with and without a broker, and drains."""
    made = [
        Row(
            f"cancel-{'with' if has_broker else 'without'}-broker",
            f"{CANCELS} jobs cancelled at random instants, "
            + ("with a broker" if has_broker else "without a broker"),
            f"the slot is free within {CANCEL_SECONDS:.0f} s (p99)",
            partial(_cancels, has_broker=has_broker),
        )
        for has_broker in (True, False)
    ]
    made.append(
        Row(
            "drain",
            f"a worker stopped by SIGTERM {DRAINS} times in one job",
            f"99 % leave within {DRAIN_SECONDS:.0f} s, and no step is done again",
            _drains,
        )
    )
    return made
