"""Upgrades the database schema when the service starts; safe with several processes at once."""

import fcntl
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text

from dar.disk import OTHER_FOLDER_HINT, make_folder
from dar.errors import ConfigurationError
from dar.settings import Settings
from service.store.database import Database, LockKey


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, built in code so that an installed service can migrate."""
    made = Config()
    made.set_main_option("script_location", str(files("migrations")).replace("%", "%%"))
    made.attributes["connection"] = connection
    return made


@functools.cache
def head() -> str:
    """The revision that this code needs. Alembic executes every migration to find it."""
    revision = ScriptDirectory.from_config(config()).get_current_head()
    assert revision is not None
    return revision


def current(database: Database) -> str | None:
    """The revision of the database; None if it is empty."""
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def upgrade(settings: Settings, database: Database) -> None:
    """Wait for the database and upgrade its schema.

    Raises:
        ServiceUnavailableError: The database does not respond.
        ConfigurationError: The schema is newer than this code, or older with ``is_migrating`` off,
            or the home folder cannot be used.
    """
    make_folder(settings.home, f"{OTHER_FOLDER_HINT} DAR_HOME")
    with _file_lock(settings.home / "migrate.lock", is_needed=not database.is_postgresql):
        database.wait(settings.database_wait_seconds)
        with _locked_connection(database) as connection:
            found = MigrationContext.configure(connection).get_current_revision()
            connection.rollback()  # Alembic commits only a transaction that it began itself
            if found == head():
                return
            _check_known(found)
            if not settings.is_migrating:
                raise ConfigurationError(
                    f"the database schema is at {found or 'nothing'}, this code needs {head()}; "
                    "run 'dar migrate', or leave DAR_IS_MIGRATING on"
                )
            command.upgrade(config(connection), "head")


def check_current(database: Database) -> None:
    """Raise unless the database has exactly the schema of this code.

    Raises:
        ConfigurationError: It has another one, or none.
    """
    if (found := current(database)) != head():
        raise ConfigurationError(
            f"the database schema is at {found or 'nothing'}, and this code needs {head()}; run "
            "the version that made it, or 'dar migrate'"
        )


def knows(revision: str) -> bool:
    """Whether this code can upgrade a schema of this revision."""
    try:
        return ScriptDirectory.from_config(config()).get_revision(revision) is not None
    except CommandError:
        return False


def _check_known(revision: str | None) -> None:
    if revision is not None and not knows(revision):
        raise ConfigurationError(
            f"the database schema is at {revision}, which is newer than this code; start the "
            "version that made it, or restore a backup"
        )


@contextmanager
def _locked_connection(database: Database) -> Iterator[Connection]:
    with database.engine.connect() as connection:
        if not database.is_postgresql:
            yield connection
            return
        # The migration of the process that has the lock may exceed the usual time limits.
        driver_connection = connection.connection.driver_connection
        assert driver_connection is not None
        driver_connection.reply_seconds = None
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LockKey.MIGRATION.value})
        connection.commit()
        try:
            yield connection
        finally:
            connection.rollback()
            connection.execute(
                text("SELECT pg_advisory_unlock(:key)"), {"key": LockKey.MIGRATION.value}
            )
            connection.execute(text("RESET statement_timeout"))
            connection.commit()


@contextmanager
def _file_lock(path: Path, *, is_needed: bool) -> Iterator[None]:
    if not is_needed:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
