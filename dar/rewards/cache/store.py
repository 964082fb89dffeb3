"""Where remembered rewards lie: an SQLite file that several processes of a host may share, or memory.

A cache may lose what it holds at any time, so nothing here is an error for its user: what cannot be read counts as unknown, what
cannot be written is left out, and a damaged file is set aside. Each row carries a digest, as SQLite does not notice a flipped bit
in a page: a row that fails it is unknown too, never another number.
"""

import asyncio
import contextlib
import hashlib
import logging
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

MAX_BYTES = 256 * 1024**2
FILE = "rewards.v1.sqlite3"
"""The number is that of the tables below: a file of other tables is not opened."""
DAMAGED = ".damaged"
ROW_BYTES = 160
"""What a row takes in the file beside its key and value: digest, times, and its place in two indexes."""
BUSY_SECONDS = 2.0
"""How long another process's write is waited for, in the store's own thread."""
MOST_NOTED = 1024
"""Uses that are noted in memory until they are written."""
_AT_ONCE = 500
_DAMAGES = frozenset(
    {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}
)
"""Result codes of SQLite that no later try changes. The first is that of a statement that does not fit the tables."""
_TABLES = """
CREATE TABLE IF NOT EXISTS rewards (
    key BLOB PRIMARY KEY, value BLOB NOT NULL, digest BLOB NOT NULL, bytes INTEGER NOT NULL,
    stored_at REAL NOT NULL, used_at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS rewards_used_at ON rewards (used_at);
CREATE TABLE IF NOT EXISTS total (id INTEGER PRIMARY KEY CHECK (id = 0), bytes INTEGER NOT NULL);
INSERT OR IGNORE INTO total VALUES (0, 0);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON rewards BEGIN UPDATE total SET bytes = bytes + NEW.bytes; END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON rewards BEGIN UPDATE total SET bytes = bytes - OLD.bytes; END;
"""
Found = TypeVar("Found")


class CacheStore:
    """Values by key, the least recently used of which make room for others.

    All work is done by one thread of its own, in the order in which it was asked for: the event loop never waits for a disk, and
    what was put before is found after. The file is opened at the first use, and again after `aclose`.

    Args:
        folder: Holds the file; it is made. None: in memory.
        max_bytes: Bytes of all rows, above which the least recently used go.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = lambda: datetime.now(UTC).timestamp(),
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._clock = clock
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None  # of that thread
        self._used: dict[bytes, float] = {}
        self._is_troubled = False

    async def get(self, keys: Sequence[bytes], max_age_seconds: float) -> dict[bytes, bytes]:
        """The values of those keys that are known.

        Args:
            keys: Distinct keys.
            max_age_seconds: Older values count as unknown.
        """
        now = self._clock()

        def read(connection: sqlite3.Connection) -> dict[bytes, bytes]:
            found = _read(connection, keys, now - max_age_seconds)
            self._used.update(dict.fromkeys(found, now))
            if len(self._used) >= MOST_NOTED:
                self._write(connection, {}, now)
            return found

        return await asyncio.wrap_future(self._executor().submit(self._tried, read, {}))

    def put(self, values: Mapping[bytes, bytes]) -> None:
        """Remember ``values``, some time soon."""
        now = self._clock()
        if values:
            self._executor().submit(
                self._tried, lambda found: self._write(found, values, now), None
            )

    async def aclose(self) -> None:
        """Write what is still to be written and close the file; may be called again."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.wrap_future(thread.submit(self._close))
            thread.shutdown(wait=False)

    def _executor(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-cache")
        return self._thread

    # --- in the store's own thread ---------------------------------------------------------------------------------------

    def _tried(self, work: Callable[[sqlite3.Connection], Found], otherwise: Found) -> Found:
        """What ``work`` gives; ``otherwise`` where the file cannot be used. A damaged file gets one successor."""
        for is_last in (False, True):
            try:
                return work(self._opened())
            except (sqlite3.Error, OSError) as error:
                self._drop_connection()
                if is_last or not _is_damage(error):
                    self._warn(error)
                    return otherwise
                self._set_aside(error)
        return otherwise

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            name = ":memory:" if self._folder is None else str(self._folder / FILE)
            # Transactions are begun and ended in SQL.
            self._connection = sqlite3.connect(name, timeout=BUSY_SECONDS, isolation_level=None)
            _begin_wal(self._connection)
            # Without it a power loss costs the newest rows, never the file.
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.executescript(_TABLES)
        return self._connection

    def _write(
        self, connection: sqlite3.Connection, values: Mapping[bytes, bytes], now: float
    ) -> None:
        rows = [
            (key, value, _digest(key, value), len(key) + len(value) + ROW_BYTES, now, now)
            for key, value in values.items()
        ]
        used, self._used = self._used, {}
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.executemany(
                "UPDATE rewards SET used_at = ? WHERE key = ?", [(at, key) for key, at in used.items()]
            )  # fmt: skip
            # Not OR REPLACE: that would not fire the trigger.
            connection.executemany("DELETE FROM rewards WHERE key = ?", [(row[0],) for row in rows])
            connection.executemany("INSERT INTO rewards VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._make_room(connection)
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def _make_room(self, connection: sqlite3.Connection) -> None:
        while True:
            [(total,)] = connection.execute("SELECT bytes FROM total").fetchall() or [(0,)]
            if total <= self._max_bytes:
                return
            oldest = connection.execute(
                "SELECT rowid, bytes FROM rewards ORDER BY used_at, rowid LIMIT ?", (_AT_ONCE,)
            ).fetchall()
            if not oldest:
                connection.execute("UPDATE total SET bytes = 0")
                return
            surplus, going = total - self._max_bytes, []
            for row_id, size in oldest:
                if surplus <= 0:
                    break
                going.append((row_id,))
                surplus -= size
            connection.executemany("DELETE FROM rewards WHERE rowid = ?", going)

    def _close(self) -> None:
        if self._used:
            self._tried(lambda found: self._write(found, {}, self._clock()), None)
        self._drop_connection()

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _set_aside(self, error: Exception) -> None:
        """Move the whole folder, as the file belongs together with those that SQLite keeps beside it."""
        if self._folder is None:
            return
        aside = self._folder.with_name(self._folder.name + DAMAGED)
        logger.warning(
            "remembered rewards in %s are damaged (%s); they are set aside as %s and asked for again",
            self._folder, error, aside.name,
        )  # fmt: skip
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self._folder.rename(aside)
        except OSError as failure:
            self._warn(failure)

    def _warn(self, error: Exception) -> None:
        if not self._is_troubled:
            logger.warning(
                "rewards cannot be remembered in %s: %s; services are asked again instead",
                self._folder or "memory", error,
            )  # fmt: skip
        self._is_troubled = True


def _begin_wal(connection: sqlite3.Connection) -> None:
    """Readers and a writer side by side. Another process that opens the same new file is waited for: SQLite itself does not."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _read(
    connection: sqlite3.Connection, keys: Sequence[bytes], oldest: float
) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for start in range(0, len(keys), _AT_ONCE):
        part = keys[start : start + _AT_ONCE]
        places = ", ".join("?" * len(part))
        rows = connection.execute(
            f"SELECT key, value, digest FROM rewards WHERE stored_at > ? AND key IN ({places})",  # noqa: S608 - question marks alone
            (oldest, *part),
        )
        found.update(
            (key, value)
            for key, value, digest in rows
            if isinstance(value, bytes) and digest == _digest(key, value)
        )
    return found


def _digest(key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(value, key=key[:64], digest_size=16).digest()


def _is_damage(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(code, int) and code & 0xFF in _DAMAGES
