"""The store on both databases: SQLite in a file, and a real PostgreSQL out of a wheel."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dar.settings import Settings
from fakes.postgres import _WHEEL, Postgres
from fakes.world import TTL, FakeClock, World
from service import migrate
from service.store import tables
from service.store.database import Database

assert _WHEEL is not None
assert _WHEEL.origin is not None


@pytest.fixture(scope="session")
def postgres(end_of_folder: Callable[[Path], ExitStack]) -> Postgres:
    # pytest's own folders are closed to the user that PostgreSQL runs as.
    folder = Path(tempfile.mkdtemp(prefix="dar-pg-"))
    folder.chmod(0o755)
    end = end_of_folder(Path(__file__).parent)
    end.callback(shutil.rmtree, folder, ignore_errors=True)
    server = Postgres(folder)
    end.callback(server.stop)
    server.wait()
    return server


@pytest.fixture(scope="session")
def postgres_database(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A migrated database. Each test leaves it empty, which takes a third of what a copy takes."""
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
def url(dialect: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a migrated database without any row."""
    if dialect == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "dar.db")
        yield f"sqlite:///{tmp_path / 'dar.db'}"
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    name: str = request.getfixturevalue("postgres_database")
    yield postgres.url(name)
    postgres.empty(name)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def database(url: str, clock: FakeClock) -> Iterator[Database]:
    opened = Database(url, clock=clock)
    yield opened
    opened.close()


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
