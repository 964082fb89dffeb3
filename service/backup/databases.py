"""Consistent copies of a database that is in use, and the files that such a copy refers to."""

import contextlib
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine, delete, func, inspect, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool

from dar.errors import ConfigurationError
from dar.protocol.checkpoints import MANIFEST_NAME
from dar.protocol.status import TERMINAL
from dar.rewards.http.redaction import Redactor
from dar.settings import Settings, environment
from service import migrate
from service.store.database import Database
from service.store.tables import CheckpointRow, FileRow, JobRow, StorageIdRow

FILES = {"sqlite": "dar.db", "postgresql": "database.dump"}
"""Kind of database -> name of its copy in a backup."""
STEP_PAGES = 4096
"""Pages that are copied at once, between which a cancellation is noticed."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a copy of a database says."""

    artifacts: Mapping[str, tuple[int, str]]
    """Size and digest of each file by its path in the artifacts folder."""
    set_aside: frozenset[str]
    """Those of checkpoints that are known to be damaged."""
    jobs: int
    unfinished_jobs: Sequence[str]
    storage_id: str | None
    """Mark of the installation's storage (`service.storage_owner`)."""


def kind_of(settings: Settings) -> str:
    """``sqlite`` or ``postgresql``."""
    return make_url(settings.sqlalchemy_url).get_backend_name()


def copy(settings: Settings, target: Path) -> Contents:
    """Copy the database as it is at one instant; returns what the copy refers to.

    Raises:
        ConfigurationError: There is no database, it has another schema than this code, or the tools
            of PostgreSQL are missing or have failed.
        ServiceUnavailableError: The database does not answer.
    """
    if kind_of(settings) == "sqlite":
        return _copy_sqlite(settings, target)
    _tool(settings, "pg_dump")
    database = Database(settings.sqlalchemy_url)
    try:
        database.wait(settings.database_wait_seconds)
        connected = database.engine.connect()
        with connected.execution_options(isolation_level="REPEATABLE READ") as connection:
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            snapshot = connection.execute(text("SELECT pg_export_snapshot()")).scalar_one()
            contents = _contents(connection)
            options = ("--format=custom", f"--snapshot={snapshot}", f"--file={target}")
            _run_tool(settings, "pg_dump", *options)
    finally:
        database.close()
    return contents


def contents(settings: Settings) -> Contents:
    """What the database refers to now.

    Raises:
        ConfigurationError: There is no database, or it has another schema than this code.
        ServiceUnavailableError: The database does not answer.
    """
    if kind_of(settings) == "sqlite":
        _check_there(sqlite_path(settings))
    database = Database(settings.sqlalchemy_url)
    try:
        database.wait(settings.database_wait_seconds)
        with database.engine.connect() as connection:
            if database.is_postgresql:
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            return _contents(connection)
    finally:
        database.close()


def restore_postgresql(settings: Settings, copied: Path) -> None:
    """Load a copy of a PostgreSQL database into an empty one.

    Raises:
        ConfigurationError: The tools of PostgreSQL are missing, or have failed.
    """
    _run_tool(settings, "pg_restore", "--single-transaction", "--exit-on-error", str(copied))


def forget_storage(url: str) -> None:
    """Let a restored installation get a storage of its own: the one backed up may go on."""
    engine = create_engine(url, poolclass=NullPool)
    if StorageIdRow.__tablename__ in inspect(engine).get_table_names():  # not in earlier backups
        with engine.begin() as connection:
            connection.execute(delete(StorageIdRow))


def check_empty(settings: Settings, kind: str) -> None:
    """Check that the settings name an empty database of the right kind.

    Raises:
        ConfigurationError: They do not.
        ServiceUnavailableError: The database does not answer.
    """
    is_postgresql = kind_of(settings) == "postgresql"
    if is_postgresql != (kind == "postgresql"):
        names = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
        where = "postgresql+psycopg://…" if kind == "postgresql" else "a file, or leave it out"
        raise ConfigurationError(
            f"this is a backup of {names[kind]}, so DAR_DATABASE_URL must name {where}"
        )
    if not is_postgresql:
        path = sqlite_path(settings)
        if path.exists():
            raise ConfigurationError(f"{path} exists; a backup is restored into an empty home only")
        return
    _tool(settings, "pg_restore")
    database = Database(settings.sqlalchemy_url)
    try:
        database.wait(settings.database_wait_seconds)
        tables = inspect(database.engine).get_table_names()
    finally:
        database.close()
    if tables:
        raise ConfigurationError(
            f"the database of DAR_DATABASE_URL has {len(tables)} tables; name an empty one, made with "
            "CREATE DATABASE"
        )


def sqlite_path(settings: Settings) -> Path:
    """The file of an SQLite database."""
    name = make_url(settings.sqlalchemy_url).database
    if not name:
        raise ConfigurationError(
            "DAR_DATABASE_URL: a SQLite database must be a file, like sqlite:////srv/dar/dar.db"
        )
    return Path(name)


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise ConfigurationError(
            f"{path.parent} has no database {path.name}; give the home of an installation with "
            "--home or DAR_HOME"
        )


def _copy_sqlite(settings: Settings, target: Path) -> Contents:
    source = sqlite_path(settings).resolve()
    _check_there(source)
    target.unlink(missing_ok=True)
    reader = sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True, timeout=20)
    writer = sqlite3.connect(target)
    with contextlib.closing(reader), contextlib.closing(writer):
        # A read transaction holds one state of the database, and its writers go on meanwhile.
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM sqlite_master").fetchone()
        reader.backup(writer, pages=STEP_PAGES, sleep=0)
        writer.execute("PRAGMA journal_mode=DELETE")
        found = writer.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise ConfigurationError(
            f"the database {source} is damaged ({found}); restore an earlier backup"
        )
    engine = create_engine(f"sqlite:///{target}", poolclass=NullPool)
    with engine.connect() as connection:
        return _contents(connection)


def _contents(connection: Connection) -> Contents:
    found, needed = MigrationContext.configure(connection).get_current_revision(), migrate.head()
    if found != needed:
        raise ConfigurationError(
            f"the database schema is at {found or 'nothing'}, this code needs {needed}; use the "
            "version that runs on it"
        )
    artifacts: dict[str, tuple[int, str]] = {}
    uploads = select(FileRow.id, FileRow.bytes, FileRow.sha256)
    for file_id, size, sha256 in connection.execute(uploads):
        artifacts[f"files/{file_id}"] = (size, sha256)
    available = select(
        CheckpointRow.job_id,
        CheckpointRow.attempt,
        CheckpointRow.step,
        CheckpointRow.manifest,
        CheckpointRow.manifest_bytes,
        CheckpointRow.manifest_sha256,
        CheckpointRow.damage.is_not(None),
    ).where(CheckpointRow.status == "available")
    set_aside: set[str] = set()
    for job_id, attempt, step, manifest, size, sha256, is_damaged in connection.execute(available):
        folder = f"checkpoints/{job_id}/attempt-{attempt}/step-{step}"
        files = {f"{folder}/{MANIFEST_NAME}": (size, sha256)}
        for file in manifest["files"]:
            files[f"{folder}/{file['name']}"] = (file["bytes"], file["sha256"])
        artifacts |= files
        set_aside |= files.keys() if is_damaged else set()
    jobs = connection.execute(select(func.count()).select_from(JobRow)).scalar_one()
    unfinished = select(JobRow.id).where(JobRow.status.not_in(list(TERMINAL))).order_by(JobRow.id)
    ids = list(connection.execute(unfinished).scalars())
    storage_id = connection.execute(select(StorageIdRow.value)).scalar_one_or_none()
    return Contents(artifacts, frozenset(set_aside), jobs, ids, storage_id)


def _tool(settings: Settings, name: str) -> str:
    """Path of a program of PostgreSQL.

    Raises:
        ConfigurationError: It is not there.
    """
    folder = settings.postgres_bin
    found = shutil.which(name, path=None if folder is None else str(folder))
    if found is None:
        where = "on PATH" if folder is None else f"in {folder}"
        raise ConfigurationError(
            f"a PostgreSQL database is backed up and restored with pg_dump and pg_restore, but there "
            f"is no {name} {where}; install PostgreSQL's client programs, or name their folder in "
            "DAR_POSTGRES_BIN"
        )
    return found


def _run_tool(settings: Settings, name: str, *options: str) -> None:
    url = make_url(settings.sqlalchemy_url)
    address, password = _address(url)
    command = [_tool(settings, name), f"--dbname={address}", "--no-owner", "--no-privileges"]
    ended = subprocess.run(
        [*command, *options],
        env=environment() | ({} if password is None else {"PGPASSWORD": password}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if ended.returncode != 0:
        said = ended.stderr.decode(errors="replace").strip().splitlines()
        hidden = Redactor(tuple(filter(None, (password, *map(str, url.query.values())))))
        raise ConfigurationError(
            f"{name} failed: {hidden(' '.join(said[-3:]))}; it must be of the server's version or a "
            "newer one"
        )


def _address(url: URL) -> tuple[str, str | None]:
    """The URL for PostgreSQL's programs without the password, which arguments would show."""
    query = dict(url.query)
    password = url.password or query.pop("password", None)
    plain = url.set(drivername="postgresql", password=None, query=query)
    return plain.render_as_string(hide_password=False), None if password is None else str(password)
