"""Transactions: all or nothing, hooks only after a commit, and a clock that is the database's."""

import subprocess
import sys
import threading
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError, StatementError

from dar.errors import ConfigurationError
from dar.settings import Settings
from service.store.database import Database, LockKey, is_outage
from service.store.tables import JobRow, ProjectRow


def test_a_block_that_raises_stores_nothing_and_runs_no_hook(database: Database) -> None:
    ran = []

    def fail() -> None:
        with database.write() as transaction:
            transaction.add(ProjectRow(id="proj-x", created_at=transaction.now))
            transaction.flush()
            transaction.after_commit(lambda: ran.append("hook"))
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    with database.read() as transaction:
        assert transaction.get(ProjectRow, "proj-x") is None
    assert ran == []


def test_a_hook_runs_when_others_can_see_what_was_stored(database: Database) -> None:
    seen = []

    def look() -> None:
        with database.read() as transaction:
            seen.append(transaction.get(ProjectRow, "proj-y") is not None)

    with database.write() as transaction:
        transaction.add(ProjectRow(id="proj-y", created_at=transaction.now))
        transaction.after_commit(look)
    assert seen == [True]


def test_a_reader_stores_nothing(database: Database) -> None:
    with database.read() as transaction:
        transaction.add(ProjectRow(id="proj-z", created_at=datetime.now(UTC)))
        transaction.flush()
    with database.read() as transaction:
        assert transaction.get(ProjectRow, "proj-z") is None


def test_instants_come_back_aware_and_exact(database: Database) -> None:
    instant = datetime(2026, 2, 3, 4, 5, 6, 789012, tzinfo=UTC)
    with database.write() as transaction:
        transaction.add(ProjectRow(id="proj-t", created_at=instant))
    with database.read() as transaction:
        project = transaction.scalars(
            select(ProjectRow).where(ProjectRow.created_at == instant)
        ).one()
    assert project.created_at == instant
    assert project.created_at.tzinfo is UTC


def test_a_naive_instant_never_reaches_the_database(database: Database) -> None:
    naive = datetime.now(UTC).replace(tzinfo=None)
    with database.write() as transaction:
        transaction.add(ProjectRow(id="proj-n", created_at=naive))
        with pytest.raises(StatementError, match="naive"):
            transaction.flush()
        transaction.rollback()


def test_many_writers_at_once_all_get_through(database: Database) -> None:
    def add(number: int) -> None:
        for index in range(10):
            with database.write() as transaction:
                row = ProjectRow(id=f"proj-{number}-{index}", created_at=transaction.now)
                transaction.add(row)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as transaction:
        assert len(transaction.scalars(select(ProjectRow.id)).all()) == 80


def test_without_a_clock_of_its_own_a_test_sees_the_databases(url: str) -> None:
    database = Database(url)
    with database.read() as transaction:
        assert abs((transaction.now - datetime.now(UTC)).total_seconds()) < 5
        assert transaction.now == transaction.now
    database.close()


@pytest.mark.parametrize("dialect", ["postgresql"], indirect=True)
def test_each_work_of_which_one_replica_has_charge_is_elected_by_itself(
    database: Database, url: str
) -> None:
    other = Database(url)
    with ExitStack() as held:
        won = [held.enter_context(database.elected(key)) for key in LockKey]
        lost = [held.enter_context(other.elected(key)) for key in LockKey]
        assert (set(won), set(lost)) == ({True}, {False})
    with other.elected(LockKey.SCRUBBER) as again:
        assert again
    other.close()


@pytest.mark.parametrize("dialect", ["postgresql"], indirect=True)
def test_a_deadlock_is_tried_again_and_both_get_through(database: Database) -> None:
    with database.write() as transaction:
        for name in "ab":
            transaction.add(ProjectRow(id=name, created_at=transaction.now))
    both_hold_one = threading.Barrier(2)
    tries = []

    def touch(first: str, second: str) -> None:
        def work(transaction: object) -> None:
            tries.append(first)
            is_first_try = tries.count(first) == 1
            for name in (first, second):
                statement = update(ProjectRow).where(ProjectRow.id == name)
                transaction.execute(statement.values(created_at=datetime.now(UTC)))  # type: ignore[attr-defined] # it is a Transaction
                if is_first_try and name == first:
                    both_hold_one.wait(10)

        database.transact(work)

    threads = [threading.Thread(target=touch, args=names) for names in ("ab", "ba")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tries) in (["a", "a", "b"], ["a", "b", "b"])


def test_a_wrong_statement_is_no_outage(database: Database) -> None:
    with pytest.raises(DBAPIError) as caught, database.read() as transaction:
        transaction.execute(text("SELECT * FROM nowhere"))
    assert not is_outage(caught.value)


def test_an_unreachable_database_is_an_outage() -> None:
    database = Database("postgresql+psycopg://nobody@127.0.0.1:1/none")
    with pytest.raises(DBAPIError) as caught:
        database.ping()
    assert is_outage(caught.value)
    database.close()


def test_a_status_that_nobody_knows_is_refused_by_the_database(world: object) -> None:
    job_id = world.submit()  # type: ignore[attr-defined] # it is the conftest's World
    with pytest.raises(DBAPIError), world.database.write() as transaction:  # type: ignore[attr-defined] # it is the conftest's World
        transaction.execute(update(JobRow).where(JobRow.id == job_id).values(status="sleeping"))


def test_what_a_failed_statement_held_is_not_told(database: Database) -> None:
    with pytest.raises(DBAPIError) as caught, database.read() as transaction:
        transaction.execute(text("SELECT * FROM nowhere WHERE a = :prompt"), {"prompt": "hush"})
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["a?b", "a?mode=memory", "a#b", "a%41b", "a%3Fb", "a b@c:d\u00fc"])
def test_the_database_lies_in_the_home_folder_whatever_that_is_called(
    tmp_path: Path, name: str
) -> None:
    home = tmp_path / name
    home.mkdir()
    database = Database(Settings(home=home).sqlalchemy_url)
    database.ping()
    database.close()
    assert [one.relative_to(home).name for one in home.glob("*.db")] == ["dar.db"]
    assert list(tmp_path.iterdir()) == [home]


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("not a database")
    file.chmod(0o644)
    before = file.stat()
    database = Database(f"sqlite:///{file}")
    with pytest.raises(ConfigurationError, match="is not an SQLite database"):
        database.wait(30)
    database.close()
    after = file.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert file.read_text() == "not a database"


@pytest.mark.parametrize("dialect", ["sqlite"], indirect=True)
def test_another_program_that_reads_the_database_harms_no_commit(
    database: Database, url: str
) -> None:
    """As a backup does: what is committed afterwards must be in the files, not in a deleted one."""
    file = url.removeprefix("sqlite:///")
    count = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
        "print(c.execute('SELECT count(*) FROM projects').fetchone()[0]); c.close()"
    )

    def projects_of_another_program() -> int:
        read = subprocess.run([sys.executable, "-c", count, file], check=True, capture_output=True)
        return int(read.stdout)

    before = projects_of_another_program()
    for number in range(1, 4):
        with database.write() as transaction:
            transaction.add(ProjectRow(id=f"proj-{number}", created_at=transaction.now))
        with database.read() as first, database.read() as second:  # the pool makes a connection
            first.execute(text("SELECT 1"))
            second.execute(text("SELECT 1"))
        assert projects_of_another_program() == before + number
    assert Path(f"{file}-wal").exists()
