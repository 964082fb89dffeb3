"""Storage of cached rewards: an SQLite file that processes of a host can share, or memory.

A cache may lose its content at any time, so no method fails: a value that cannot be read is
unknown, one that cannot be written is dropped, and a damaged file is moved away. SQLite does not
notice a flipped bit in a page, so each row has a digest, and a row that does not match it is
unknown too.
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
"""Contains the version of the tables below, so that a file with other tables is not opened."""
DAMAGED = ".damaged"
ROW_BYTES = 160
"""Bytes of a row besides its key and value: digest, times and two index entries."""
BUSY_SECONDS = 2.0
"""How long the store's thread waits for a write of another process."""
MAX_PENDING_USES = 1024
"""Uses of rows that are kept in memory before they are written."""
_AT_ONCE = 500
_DAMAGES = frozenset(
    {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}
)
"""Result codes of SQLite that persist. The first means that a statement does not fit the tables."""
_TABLES = """
CREATE TABLE IF NOT EXISTS rewards (
    key BLOB PRIMARY KEY, value BLOB NOT NULL, digest BLOB NOT NULL, bytes INTEGER NOT NULL,
    stored_at REAL NOT NULL, used_at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS rewards_used_at ON rewards (used_at);
CREATE TABLE IF NOT EXISTS total (id INTEGER PRIMARY KEY CHECK (id = 0), bytes INTEGER NOT NULL);
INSERT OR IGNORE INTO total VALUES (0, 0);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON rewards
BEGIN UPDATE total SET bytes = bytes + NEW.bytes; END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON rewards
BEGIN UPDATE total SET bytes = bytes - OLD.bytes; END;
"""
Found = TypeVar("Found")


class CacheStore:
    """Values by key; the least recently used are evicted.

    One thread does all work in order, so that the event loop never waits for a disk and every `get`
    sees the earlier `put`. The file is opened at the first use, and again after `aclose`.

    Args:
        folder: Folder of the file, created if missing; None: in memory.
        max_bytes: Limit of all rows, above which the least recently used are evicted.
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
        self._connection: sqlite3.Connection | None = None  # used by that thread alone
        self._used: dict[bytes, float] = {}
        self._has_warned = False

    async def get(self, keys: Sequence[bytes], max_age_seconds: float) -> dict[bytes, bytes]:
        """The known values.

        Args:
            keys: Distinct keys.
            max_age_seconds: Older values are unknown, and so are those from before the clock was
                set back, whose age is not known.
        """
        now = self._clock()

        def read(connection: sqlite3.Connection) -> dict[bytes, bytes]:
            found = _read(connection, keys, (now - max_age_seconds, now))
            self._used.update(dict.fromkeys(found, now))
            if len(self._used) >= MAX_PENDING_USES:
                self._write(connection, {}, now)
            return found

        return await asyncio.wrap_future(self._executor().submit(self._tried, read, {}))

    def put(self, values: Mapping[bytes, bytes]) -> None:
        """Store ``values`` in the background."""
        now = self._clock()
        if values:
            self._executor().submit(self._tried, lambda db: self._write(db, values, now), None)

    async def aclose(self) -> None:
        """Finish all writes and close the file. May be called again."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.wrap_future(thread.submit(self._close))
            thread.shutdown(wait=False)

    def _executor(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-cache")
        return self._thread

    # --- in the store's own thread ----------------------------------------------------------------

    def _tried(self, work: Callable[[sqlite3.Connection], Found], otherwise: Found) -> Found:
        """Call ``work``; return ``otherwise`` if the file is unusable.

        A damaged file is replaced once.
        """
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
            # Transactions are started and ended in SQL.
            self._connection = sqlite3.connect(name, timeout=BUSY_SECONDS, isolation_level=None)
            _begin_wal(self._connection)
            # NORMAL: a power loss costs the newest rows, never the file.
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
                "UPDATE rewards SET used_at = ? WHERE key = ?",
                [(at, key) for key, at in used.items()],
            )
            # Not OR REPLACE: it does not fire the delete trigger.
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
            self._tried(lambda db: self._write(db, {}, self._clock()), None)
        self._drop_connection()

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _set_aside(self, error: Exception) -> None:
        """Move the whole folder, as SQLite keeps further files beside the database."""
        if self._folder is None:
            return
        aside = self._folder.with_name(self._folder.name + DAMAGED)
        logger.warning(
            "cached rewards in %s are damaged (%s); they are moved to %s and requested again",
            self._folder,
            error,
            aside.name,
        )
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self._folder.rename(aside)
        except OSError as failure:
            self._warn(failure)

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            logger.warning(
                "rewards cannot be cached in %s: %s; they are requested again instead",
                self._folder or "memory",
                error,
            )
        self._has_warned = True


def _begin_wal(connection: sqlite3.Connection) -> None:
    """Turn on write-ahead logging.

    Waits for another process that opens the new file; SQLite does not.
    """
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
    connection: sqlite3.Connection, keys: Sequence[bytes], stored: tuple[float, float]
) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for start in range(0, len(keys), _AT_ONCE):
        part = keys[start : start + _AT_ONCE]
        places = ", ".join("?" * len(part))
        rows = connection.execute(
            "SELECT key, value, digest FROM rewards "  # noqa: S608 - only question marks are inserted
            f"WHERE stored_at > ? AND stored_at <= ? AND key IN ({places})",
            (*stored, *part),
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
