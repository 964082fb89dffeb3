"""The database: its engine, its transactions and its clock. Only this module commits."""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from enum import IntEnum, unique
from pathlib import Path
from typing import Any, TypeVar, cast

import orjson
import stamina
from sqlalchemy import Connection, Engine, Table, create_engine, event, func, insert, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from dar.errors import ConfigurationError, ServiceUnavailableError
from dar.fault_points import fault_point
from dar.rewards.http.redaction import Redactor
from service.store.columns import Base

Result = TypeVar("Result")
Clock = Callable[[], datetime]

SQLITE_MAGIC = b"SQLite format 3\0"
"""How each of its files begins; one without tables may be empty."""
BUSY_SECONDS = 20
STALL_SECONDS = 2.0
"""Time after which a failure is a stall: requests that fail faster hold nothing up."""
_SERIALIZATION_FAILURE, _DEADLOCK = "40001", "40P01"
_opening = threading.Lock()
_opened: set[tuple[int, int]] = set()
"""Device and inode of each SQLite file to which this process has had a connection."""


@unique
class LockKey(IntEnum):
    """Advisory locks of PostgreSQL, one for each work that one process at a time may do."""

    MIGRATION = 0x0DA2_0001
    RECONCILER = 0x0DA2_0002
    SCRUBBER = 0x0DA2_0003
    RETENTION = 0x0DA2_0004
    API_KEYS = 0x0DA2_0005
    REWARD_WATCH = 0x0DA2_0006
    STORAGE_ID = 0x0DA2_0007


class Transaction(Session):
    """A unit of work: all of it is stored, or nothing."""

    def __init__(self, engine: Engine, clock: Clock | None, *, is_writing: bool) -> None:
        super().__init__(bind=engine, expire_on_commit=False, autoflush=False)
        self.hooks: list[Callable[[], None]] = []
        self.news: set[str] = set()
        """Jobs that have new events."""
        self._clock = clock
        self._now: datetime | None = None
        self.connection(execution_options={"dar_writing": is_writing})

    @property
    def is_postgresql(self) -> bool:
        """Whether the database is PostgreSQL; otherwise it is SQLite."""
        return self.get_bind().dialect.name == "postgresql"

    @property
    def now(self) -> datetime:
        """The time by the database's clock, the same throughout the transaction.

        Several replicas share one database, so leases are compared with its clock.
        """
        if self._now is None:
            if self._clock is not None:
                self._now = self._clock()
            elif self.is_postgresql:
                self._now = self.execute(select(func.clock_timestamp())).scalar_one()
            else:
                self._now = datetime.now(UTC)
        return self._now

    def insert_rows(self, table: type[Base], rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert rows without making objects of them, which would take as long again."""
        self.connection().execute(insert(cast("Table", table.__table__)), rows)

    def after_commit(self, hook: Callable[[], None]) -> None:
        """Run ``hook`` after a successful commit. It must not block or raise."""
        self.hooks.append(hook)


class DatabaseStalledError(PoolTimeoutError):
    """The database does not answer, and another request is trying it already."""


class _Gate:
    """Lets one request at a time try a database that has stalled; the others fail at once.

    Otherwise all threads would wait for a frozen database, and later requests for these threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._has_stalled = False
        self._is_tried = False

    @contextmanager
    def attempt(self) -> Iterator[Callable[[], None]]:
        """Try the database. Gives what to call as soon as it has answered.

        Raises:
            DatabaseStalledError: It has stalled, and another request is trying it.
        """
        with self._lock:
            is_trial = self._has_stalled
            if is_trial and self._is_tried:
                raise DatabaseStalledError("the database does not answer")
            self._is_tried = is_trial
        began = time.monotonic()
        try:
            yield self._open
        except DBAPIError as error:
            # With an SQLSTATE the server has answered: it has cancelled a slow statement.
            is_silent = is_outage(error) and getattr(error.orig, "sqlstate", None) is None
            if is_silent and time.monotonic() - began >= STALL_SECONDS:
                with self._lock:
                    self._has_stalled = True
            raise
        finally:
            if is_trial:
                with self._lock:
                    self._is_tried = False

    def _open(self) -> None:
        if self._has_stalled:
            with self._lock:
                self._has_stalled = False


class Database:
    """A SQLite or PostgreSQL database.

    Args:
        url: SQLAlchemy URL.
        clock: Replaces the database's clock in tests.

    Raises:
        ConfigurationError: The URL cannot be read.
    """

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        self.engine = _engine(url)
        self.listeners: list[Callable[[frozenset[str]], None]] = []
        """Called after a commit with the jobs that have new events. They must not block."""
        self._clock = clock
        # SQLite's busy handler is unfair: this lock cuts the p99 of 8 writers from 131 to 32 ms.
        self._writer = threading.Lock() if self.engine.dialect.name == "sqlite" else None
        # A SQLite file that is locked answers within `BUSY_SECONDS`, and readers are not held up.
        self._gate = _Gate() if self.engine.dialect.name == "postgresql" else None

    @property
    def is_postgresql(self) -> bool:
        """Whether it is PostgreSQL; otherwise it is SQLite."""
        return self.engine.dialect.name == "postgresql"

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A read transaction; it is never committed."""
        with self._transaction(is_writing=False) as transaction:
            yield transaction

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction that commits when the block ends, and rolls back when it raises."""
        with (
            self._writer or nullcontext(),
            self._transaction(is_writing=True) as transaction,
        ):
            yield transaction
            fault_point("service.committing")
            transaction.commit()
        fault_point("service.committed")
        for hook in transaction.hooks:
            hook()
        if transaction.news:
            for listener in self.listeners:
                listener(frozenset(transaction.news))

    @contextmanager
    def _transaction(self, *, is_writing: bool) -> Iterator[Transaction]:
        with (
            self._gate.attempt() if self._gate else nullcontext() as has_answered,
            Transaction(self.engine, self._clock, is_writing=is_writing) as transaction,
        ):
            if has_answered is not None:
                has_answered()  # the connection is new, or was pinged
            yield transaction

    def transact(self, work: Callable[[Transaction], Result]) -> Result:
        """Run ``work`` in `write`; retried when the database rolled it back because of a conflict.

        A failed commit is not retried: it may have been stored.
        """
        for attempt in stamina.retry_context(
            on=_was_rolled_back, attempts=4, timeout=5, wait_initial=0.02
        ):
            with attempt, self.write() as transaction:
                return work(transaction)
        raise AssertionError("unreachable: the last attempt returns or raises")

    @contextmanager
    def elected(self, key: LockKey) -> Iterator[bool]:
        """Yields whether this process may act for all replicas until the block ends."""
        if not self.is_postgresql:
            yield True
            return
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            won = connection.execute(select(func.pg_try_advisory_lock(key.value))).scalar_one()
            try:
                yield won
            finally:
                if won:
                    connection.execute(select(func.pg_advisory_unlock(key.value)))

    def ping(self) -> None:
        """Raise unless the database responds."""
        with self.read() as transaction:
            transaction.execute(text("SELECT 1"))

    def check_exists(self) -> None:
        """Raise if it is SQLite and has no file; a connection would make an empty one.

        Raises:
            ConfigurationError: It has none.
        """
        name = self.engine.url.database
        if not self.is_postgresql and name is not None and not Path(name).is_file():
            raise ConfigurationError(
                f"{Path(name).parent} has no database {Path(name).name}; give the home of an "
                "installation with --home or DAR_HOME"
            )

    def wait(self, seconds: float) -> None:
        """Wait for a database that is starting up or recovering.

        Raises:
            ServiceUnavailableError: It did not respond in time.
        """
        give_up = time.monotonic() + seconds
        while True:
            try:
                self.ping()
            except DBAPIError as error:
                if time.monotonic() >= give_up:
                    url = self.engine.url
                    secrets = (str(url.password or ""), *map(str, url.query.values()))
                    raise ServiceUnavailableError(
                        f"the database {_place(url)} did not answer within {seconds:.0f} s: "
                        f"{Redactor(secrets)(str(error.orig))}; check DAR_DATABASE_URL and that it "
                        "runs"
                    ) from None
                time.sleep(0.25)
            else:
                return

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def is_outage(error: BaseException) -> bool:
    """Whether ``error`` means that the database is unreachable, not that a statement is wrong."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, PoolTimeoutError)
    # SQLite raises one class for a locked file and for a missing table.
    is_wrong_statement = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
    is_of_connection = isinstance(error, InterfaceError | OperationalError)
    return error.connection_invalidated or (is_of_connection and not is_wrong_statement)


def _was_rolled_back(error: Exception) -> bool:
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state in {_SERIALIZATION_FAILURE, _DEADLOCK}


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "DAR_DATABASE_URL: cannot be read as a URL like "
            "postgresql+psycopg://user:password@host/name"
        ) from None
    if parsed.get_backend_name() == "sqlite":
        return _sqlite_engine(parsed, has_query="?" in url)
    if "@" in f"{parsed.host}{parsed.database}":
        raise ConfigurationError(
            "DAR_DATABASE_URL: an @ of the user name or the password must be written as %40"
        )
    from service.store.postgresql import (  # noqa: PLC0415 - with SQLite its driver would take memory for nothing
        make_engine,
    )

    return make_engine(parsed)


def _place(url: URL) -> str:
    """Where a database is. Its query is left out, as that may have a password."""
    if url.get_backend_name() == "sqlite":
        return f"sqlite:///{url.database}"
    port = "" if url.port is None else f":{url.port}"
    return f"{url.drivername}://{url.host or ''}{port}/{url.database or ''}"


def _sqlite_engine(url: URL, *, has_query: bool) -> Engine:
    if url.database in {None, "", ":memory:"} or url.query.get("mode") == "memory":
        raise ConfigurationError(
            "DAR_DATABASE_URL: a SQLite database must be a file, like sqlite:////srv/dar/dar.db"
        )
    if has_query:
        raise ConfigurationError(
            "DAR_DATABASE_URL: a SQLite database takes no options after a ?; a ? of its path must be "
            "written as %3F, and a % as %25"
        )
    engine = create_engine(
        url,
        json_serializer=_dumps,
        json_deserializer=orjson.loads,
        hide_parameters=True,
        pool_size=20,
        max_overflow=30,
        pool_timeout=10,
        connect_args={"isolation_level": None, "timeout": BUSY_SECONDS},
    )
    event.listen(engine, "do_connect", _keep_private)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _keep_private(_dialect: object, _record: object, arguments: Sequence[Any], _: object) -> None:
    """Let only the owner read the database. SQLite makes its other files with the same mode.

    A process that closes a file loses all its locks on it, also those of SQLite's connections. The
    next program that read the database would then delete the log of its newest commits. So the file
    is opened here only before this process has the first connection to it.
    """
    path = Path(arguments[0])
    if path.parent.is_dir() and not arguments[0].startswith((":memory:", "file:")):
        with _opening:
            if not path.exists():
                path.touch(mode=0o600)
            state = path.stat()
            if (state.st_dev, state.st_ino) not in _opened:
                _check_sqlite(path)
                _opened.add((state.st_dev, state.st_ino))
        for file in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
            with contextlib.suppress(FileNotFoundError, PermissionError):  # another user's file
                if file.stat().st_mode & 0o077:
                    file.chmod(0o600)


def _check_sqlite(path: Path) -> None:
    """Leave a file alone that is not a database.

    Raises:
        ConfigurationError: ``path`` is such a file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(SQLITE_MAGIC))
    except OSError:
        return  # SQLite says why, as of a database that is gone
    if start and start != SQLITE_MAGIC:
        raise ConfigurationError(
            f"DAR_DATABASE_URL names {path}, which is not an SQLite database; name a file that does "
            "not exist yet, or one that the service has made"
        )


def _prepare_sqlite(connection: Any, _record: object) -> None:  # noqa: ANN401 - SQLAlchemy passes sqlite3's own connection
    cursor = connection.cursor()
    # NORMAL may lose acknowledged commits when the power fails.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A reader that starts to write fails with SQLITE_BUSY_SNAPSHOT whatever the busy timeout is.
    is_writing = connection.get_execution_options().get("dar_writing", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")


def _dumps(value: object) -> str:
    return orjson.dumps(value).decode()
