"""PostgreSQL: an engine whose statements end within a bounded time, also if the server is frozen.

A server that is stopped, swapping or behind a lost route answers nothing, and its kernel may still
acknowledge each packet. Neither ``statement_timeout``, which the server itself watches, nor
``tcp_user_timeout`` ends a wait for it. So each wait for an answer has a limit on this side too.
"""

import time
from collections.abc import Sequence
from typing import Any

import orjson
import psycopg
from psycopg.abc import RV, PQGen
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL

STATEMENT_SECONDS = 15
IDLE_IN_TRANSACTION_SECONDS = 30
CONNECT_SECONDS = 5
PING_SECONDS = 5.0
"""Limit of the ping before a connection is used again."""
REPLY_SECONDS = STATEMENT_SECONDS + 5.0
"""Limit of any other wait; the server has cancelled a slow statement before."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed when the server has not answered within a limit."""

    reply_seconds: float | None = None
    """The present limit; None: no limit."""

    def wait(self, gen: PQGen[RV], *arguments: Any, **options: Any) -> RV:  # noqa: ANN401 - those of psycopg are passed on
        """Wait for an answer of the server.

        Raises:
            psycopg.OperationalError: None came in time.
        """
        limit = self.reply_seconds
        if limit is not None and len(arguments) < 2:
            options.setdefault("timeout", limit)
        began = time.monotonic()
        try:
            return super().wait(gen, *arguments, **options)
        except psycopg.OperationalError:
            if limit is not None and time.monotonic() - began >= limit:
                self.close()  # an answer that comes later would be taken for that of another query
            raise


def make_engine(url: URL) -> Engine:
    """An engine for a PostgreSQL database."""
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        json_serializer=lambda value: orjson.dumps(value).decode(),
        json_deserializer=orjson.loads,
        hide_parameters=True,  # prompts and digests must not be logged
        pool_size=10,
        max_overflow=20,
        pool_timeout=10,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": CONNECT_SECONDS,
            "tcp_user_timeout": STATEMENT_SECONDS * 1000,
            "options": f"-c statement_timeout={STATEMENT_SECONDS}s "
            f"-c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_SECONDS}s",
        },
    )
    event.listen(engine, "do_connect", _connect)
    event.listen(engine, "checkout", _limit_statements)  # after the ping
    event.listen(engine, "checkin", _limit_ping)
    return engine


def _connect(
    _dialect: object, _record: object, arguments: Sequence[Any], options: dict[str, Any]
) -> BoundedConnection:
    connection = BoundedConnection.connect(*arguments, **options)
    connection.reply_seconds = REPLY_SECONDS
    return connection


def _limit_statements(connection: BoundedConnection, _record: object, _proxy: object) -> None:
    connection.reply_seconds = REPLY_SECONDS


def _limit_ping(connection: BoundedConnection | None, _record: object) -> None:
    if connection is not None:  # None: it was closed
        connection.reply_seconds = PING_SECONDS
