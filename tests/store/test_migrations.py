"""The schema: the same in code and in migrations, upgraded once however many processes start."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from dar.errors import ConfigurationError, ServiceUnavailableError
from dar.settings import Settings, environment
from service import migrate
from service.store.database import Database
from service.store.tables import Base


def test_migrations_make_the_tables_that_the_code_uses(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_checks_hold_on_every_table(database: Database) -> None:
    inspector = inspect(database.engine)
    for table in Base.metadata.sorted_tables:
        named = {c.name for c in table.constraints if type(c).__name__ == "CheckConstraint"}
        found = {check["name"] for check in inspector.get_check_constraints(table.name)}
        assert named == found, table.name


@pytest.fixture
def own(empty_url: str, tmp_path: Path) -> Iterator[Database]:
    """A migrated database whose schema the test may change."""
    opened = Database(empty_url)
    migrate.upgrade(Settings(home=tmp_path), opened)
    yield opened
    opened.close()


@pytest.mark.slow  # two processes on each database
def test_two_processes_that_start_at_once_migrate_once(empty_url: str, tmp_path: Path) -> None:
    settings = environment() | {"DAR_HOME": str(tmp_path / "home"), "DAR_DATABASE_URL": empty_url}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "service", "migrate"], env=settings, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    logs = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], logs
    database = Database(empty_url)
    assert migrate.current(database) == migrate.head()
    database.close()


def test_a_schema_newer_than_the_code_is_refused(own: Database, tmp_path: Path) -> None:
    with own.write() as transaction:
        transaction.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigurationError, match="newer than this code"):
        migrate.upgrade(Settings(home=tmp_path), own)


def test_without_leave_to_migrate_an_old_schema_is_refused(empty_url: str, tmp_path: Path) -> None:
    database = Database(empty_url)
    with pytest.raises(ConfigurationError, match="dar migrate"):
        migrate.upgrade(Settings(home=tmp_path, is_migrating=False), database)
    database.close()


def test_a_downgrade_leaves_nothing_behind(own: Database) -> None:
    with own.engine.connect() as connection:
        command.downgrade(migrate.config(connection), "base")
    assert set(inspect(own.engine).get_table_names()) == {"alembic_version"}


def test_a_database_that_never_answers_is_told_of_within_the_wait(tmp_path: Path) -> None:
    database = Database("postgresql+psycopg://nobody:geheim@127.0.0.1:1/none")
    with pytest.raises(ServiceUnavailableError, match="did not answer within") as caught:
        migrate.upgrade(Settings(home=tmp_path, database_wait_seconds=0.2), database)
    assert "geheim" not in caught.value.message
    database.close()
