"""Services are killed while jobs are submitted."""

import random
import threading
import time

from chaos import books
from chaos.scoreboard import Result, Row
from chaos.stack import Dialect, Stack, stack
from chaos.submitter import Submitter

SUBMISSIONS = 1000
KILLS = 20


def _submissions(dialect: Dialect, *, has_keys: bool, replicas: int = 1) -> Result:
    with stack(dialect=dialect, replicas=replicas) as installation:
        submitter = Submitter(installation, has_keys=has_keys)
        killer = _ServiceKiller(installation, submitter)
        killer.start()
        submitter.run(SUBMISSIONS)
        killer.end()
        for replica in range(replicas):
            installation.until_ready(replica)
        found = books.close(installation, submitter.acknowledged, is_over=False)
    figures = {
        "submissions": SUBMISSIONS,
        "service kills": killer.kills,
        "retries": submitter.retries,
        "jobs": found.jobs,
        "lost": found.lost,
        "doubled": found.doubled,
        "findings": len(found.findings),
    }
    holds = found.is_clean and found.jobs == SUBMISSIONS and killer.kills >= KILLS
    return Result(holds, figures, found.findings)


class _ServiceKiller:
    """Kills a service each time some submissions were acknowledged since the last kill."""

    def __init__(self, installation: Stack, submitter: Submitter) -> None:
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
        between = SUBMISSIONS // (KILLS + 2)
        replicas = len(self._installation.ports)
        while self.kills < KILLS and not self._is_ending.is_set():
            if len(self._submitter.acknowledged) < (self.kills + 1) * between:
                time.sleep(0.01)
                continue
            time.sleep(self._random.uniform(0, 0.05))  # at any instant of a request
            self._installation.kill(f"service-{self.kills % replicas}")
            self.kills += 1


def rows() -> list[Row]:
    """One row for each way to submit."""
    promise = "nothing acknowledged is lost, nothing is doubled"
    made = []
    for dialect in ("sqlite", "postgresql"):
        for has_keys in (True, False):
            how = "keys" if has_keys else "counted-retries"
            made.append(
                Row(
                    f"submit-{dialect}-{how}",
                    f"{SUBMISSIONS:,} submissions, {KILLS} service kills, {dialect}, "
                    + ("with keys" if has_keys else "without keys"),
                    promise,
                    lambda dialect=dialect, has_keys=has_keys: _submissions(  # type: ignore[misc] # bound now
                        dialect, has_keys=has_keys
                    ),
                )
            )
    made.append(
        Row(
            "submit-postgresql-two-replicas",
            f"{SUBMISSIONS:,} submissions to two services, {KILLS} kills, postgresql, with keys",
            promise,
            lambda: _submissions("postgresql", has_keys=True, replicas=2),
        )
    )
    return made
