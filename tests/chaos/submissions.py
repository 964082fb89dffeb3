"""Services are killed while jobs are submitted."""

import random
import threading
import time
from functools import partial

from chaos import books
from chaos.scoreboard import Result, Row
from chaos.stack import DIALECTS, Dialect, Stack, stack
from chaos.submitter import Submitter

SUBMISSIONS = 1000
KILLS = 20


def submit_under_kills(
    dialect: Dialect,
    *,
    has_keys: bool,
    replicas: int = 1,
    submissions: int = SUBMISSIONS,
    kills: int = KILLS,
) -> Result:
    """Submit jobs while their services are killed; no worker runs."""
    with stack(dialect=dialect, replicas=replicas) as installation:
        submitter = Submitter(installation, has_keys=has_keys)
        killer = _ServiceKiller(installation, submitter, kills, submissions // (kills + 2))
        killer.start()
        submitter.run(submissions)
        killer.end()
        for replica in range(replicas):
            installation.until_ready(replica)
        found = books.close(installation, submitter.acknowledged, is_over=False)
    figures = {
        "submissions": submissions,
        "service kills": killer.kills,
        "retries": submitter.retries,
        "jobs": found.jobs,
        "lost": found.lost,
        "doubled": found.doubled,
        "findings": len(found.findings),
    }
    holds = found.is_clean and found.jobs == submissions and killer.kills >= kills
    return Result(holds, figures, found.findings)


class _ServiceKiller:
    """Kills a service each time ``between`` submissions were acknowledged since the last kill."""

    def __init__(self, installation: Stack, submitter: Submitter, most: int, between: int) -> None:
        self._most, self._between = most, between
        self._installation, self._submitter = installation, submitter
        self._random = random.Random(1)
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="killer")
        self.kills = 0

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._is_ending.set()
        self._thread.join()

    def _run(self) -> None:
        replicas = len(self._installation.ports)
        while self.kills < self._most and not self._is_ending.is_set():
            if len(self._submitter.acknowledged) < (self.kills + 1) * self._between:
                time.sleep(0.01)
                continue
            time.sleep(self._random.uniform(0, 0.05))  # at any instant of a request
            self._installation.kill(f"service-{self.kills % replicas}")
            self.kills += 1


def rows() -> list[Row]:
    """One row for each way to submit."""
    promise = "nothing acknowledged is lost, nothing is doubled"
    made = []
    for dialect in DIALECTS:
        for has_keys in (True, False):
            how = "keys" if has_keys else "counted-retries"
            made.append(
                Row(
                    f"submit-{dialect}-{how}",
                    f"{SUBMISSIONS:,} submissions, {KILLS} service kills, {dialect}, "
                    + ("with keys" if has_keys else "without keys"),
                    promise,
                    partial(submit_under_kills, dialect, has_keys=has_keys),
                )
            )
    made.append(
        Row(
            "submit-postgresql-two-replicas",
            f"{SUBMISSIONS:,} submissions to two services, {KILLS} kills, postgresql, with keys",
            promise,
            lambda: submit_under_kills("postgresql", has_keys=True, replicas=2),
        )
    )
    return made
