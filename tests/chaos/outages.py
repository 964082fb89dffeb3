"""The broker, the database, the service or the disk is away for a while."""

import contextlib
import os
import signal
import subprocess
import time

import psutil

from chaos import books
from chaos.scoreboard import Result, Row
from chaos.stack import Stack, stack, until

TTL = 3.0
SLOTS = ("a", "b")


def _result(found: books.Books, problems: list[str], **figures: object) -> Result:
    figures |= {
        "jobs": found.jobs,
        "attempts": found.attempts,
        "lost": found.lost,
        "doubled": found.doubled,
        "poisoned": found.poisoned,
        "unequal weights": found.unequal,
        "findings": len(found.findings),
    }
    return Result(found.is_clean and not problems, dict(figures), [*problems, *found.findings])


def _extra_attempts(found: books.Books) -> list[str]:
    extra = found.attempts - found.jobs
    return [f"the outage ended {extra} attempts: {found.ends}"] if extra else []


def empty_broker(jobs: int = 22) -> Result:
    """Kill the broker, and start it without its messages."""
    with stack(slots=SLOTS, has_broker=True) as installation:
        for number in range(jobs):
            installation.submit(number, steps=20, every=5, seconds=0.05)
        until(lambda: books.running(installation), 60, "the first attempt")
        assert installation.valkey is not None
        installation.valkey.stop()
        installation.valkey.start()
        books.until_all_ended(installation, 180)
        found = books.close(installation)
    return _result(found, _extra_attempts(found), **{"broker restarts": 1})


def _killed_postgresql() -> Result:
    kills = 5
    with stack(dialect="postgresql", slots=SLOTS) as installation:
        for number in range(20):
            installation.submit(number, steps=30, every=5, seconds=0.1)
        assert installation.postgres is not None
        for _ in range(kills):
            until(lambda: books.running(installation), 60, "an attempt")
            time.sleep(1)
            installation.database.close()
            installation.postgres.kill()
            installation.postgres.start()
            installation.postgres.wait()
        books.until_all_ended(installation, 180)
        found = books.close(installation)
    return _result(found, _extra_attempts(found), **{"database kills": kills})


def _absent(what: str) -> Result:
    """Freeze the database or the service for three times the lease's TTL."""
    dialect = "postgresql" if what == "database" else "sqlite"
    with stack(
        dialect=dialect, slots=SLOTS, lease_ttl_seconds=TTL, heartbeat_seconds=0.5
    ) as installation:
        for number in range(6):
            installation.submit(number, steps=40, every=5, seconds=0.1)
        until(lambda: len(books.running(installation)) == len(SLOTS), 60, "two attempts")
        frozen = _processes_of(installation, what)
        for process in frozen:
            process.suspend()
        time.sleep(3 * TTL)
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        books.until_all_ended(installation, 240)
        found = books.close(installation)
    return _result(found, _extra_attempts(found), **{"seconds away": 3 * TTL, "TTL": TTL})


def _processes_of(installation: Stack, what: str) -> list[psutil.Process]:
    if what == "service":
        return [psutil.Process(installation.process("service-0").pid)]
    assert installation.postgres is not None
    main = psutil.Process(installation.postgres.process.pid)
    return [main, *main.children(recursive=True)]


def _full_disk() -> Result:
    """One of two workers has no room, from its start on."""
    if os.geteuid() != 0:
        return Result(False, {}, skipped="needs root, to mount a small disk")
    with stack(slots=("well",)) as installation:
        small = installation.home / "small"
        small.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "dar-chaos", str(small)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            return Result(False, {}, skipped="this machine allows no mounts")
        try:
            installation.want_worker("sick", work_dir=small)
            for number in range(12):
                installation.submit(number, steps=20, every=5, seconds=0.1)
            books.until_all_ended(installation, 240)
            found = books.close(installation)
            worker = installation.drop("worker-sick")
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        finally:
            subprocess.run(["umount", "-l", str(small)], check=False)
    return _result(found, [], **{"workers without room": 1})


def rows() -> list[Row]:
    """One row for each thing that may be away."""
    return [
        Row(
            "broker-restarted-empty",
            "the broker is killed and restarted empty while 20 jobs wait",
            "all jobs run, in one attempt each",
            empty_broker,
        ),
        Row(
            "postgresql-killed",
            "PostgreSQL is killed five times under load",
            "nothing is lost, and no attempt ends",
            _killed_postgresql,
        ),
        Row(
            "database-away",
            "the database is frozen for three times the lease's TTL",
            "no attempt ends",
            lambda: _absent("database"),
        ),
        Row(
            "service-away",
            "the service is frozen for three times the lease's TTL",
            "no attempt ends",
            lambda: _absent("service"),
        ),
        Row(
            "worker-without-room",
            "one of two workers has a full disk",
            "no job is harmed",
            _full_disk,
        ),
    ]
