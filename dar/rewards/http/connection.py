"""A connection that sends a request's head and body in one piece, and tells cheaply whether its other end has closed it.

Measured with 32 connections: the pool asks every idle one before each request whether it is readable, which took a fifth of the
client's time through the layers of the library's own stream; head and body in two writes are two packets and two wake-ups.
"""

import select
import socket
import ssl
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import httpcore2

FLUSH_BYTES = 256 * 1024
"""What is collected at most before it is sent."""


class JoinedStream(httpcore2.AsyncNetworkStream):
    """Collects what is written until something is read.

    Args:
        inner: The connection.
    """

    def __init__(self, inner: httpcore2.AsyncNetworkStream) -> None:
        self._inner = inner
        self._unsent = bytearray()
        self._write_timeout: float | None = None
        self._poll: select.poll | None = None
        self._is_spoiled = False
        raw = inner.get_extra_info("socket")
        if isinstance(raw, socket.socket) or hasattr(raw, "fileno"):
            self._poll = select.poll()
            self._poll.register(raw.fileno(), select.POLLIN)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - the base class has it
        """What has come in; sends first what was written."""
        try:
            await self._flush()
        except httpcore2.WriteError:
            # A server may answer and close before it has read everything: what it said is what counts.
            self._unsent.clear()
        return await self._inner.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - the base class has it
        """Note what is to be sent."""
        self._unsent += buffer
        self._write_timeout = timeout
        if len(self._unsent) >= FLUSH_BYTES:
            await self._flush()

    def spoil(self) -> None:
        """Let no further request use the connection: the pool takes it for closed by its other end."""
        self._is_spoiled = True

    async def aclose(self) -> None:
        """Close; what was not sent never is."""
        self._unsent.clear()
        self._poll = None
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the base class has it
    ) -> httpcore2.AsyncNetworkStream:
        """The same connection, encrypted."""
        return JoinedStream(await self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - the base class has it
        """See the base class."""
        if info == "is_readable" and self._is_spoiled:
            return True
        if info == "is_readable" and self._poll is not None:
            return bool(self._poll.poll(0))
        return self._inner.get_extra_info(info)

    async def _flush(self) -> None:
        if self._unsent:
            unsent, self._unsent = bytes(self._unsent), bytearray()
            await self._inner.write(unsent, self._write_timeout)


@dataclass(slots=True)
class Timings:
    """Of one attempt, in seconds from its beginning; None: that did not happen, as on a connection that was kept alive."""

    started_at: float = field(default_factory=time.monotonic)
    has_dialled: bool = False
    """Whether a connection was opened for it."""
    dns_seconds: float | None = None
    """Until the name was resolved and its addresses checked."""
    connect_seconds: float | None = None
    """Until the connection was open, TLS included."""
    first_byte_seconds: float | None = None
    """Until the head of the answer was there."""

    def begin(self) -> None:
        """The attempt begins, or begins once more on a fresh connection."""
        self.started_at = time.monotonic()
        self.has_dialled = False
        self.dns_seconds = self.connect_seconds = self.first_byte_seconds = None

    def dials(self) -> None:
        """A connection is being opened."""
        self.has_dialled = True

    def resolved(self) -> None:
        """The addresses are known."""
        self.dns_seconds = time.monotonic() - self.started_at

    async def trace(self, name: str, info: Mapping[str, Any]) -> None:
        """The ``trace`` extension of the connection pool. What it is told beside the name may hold headers and is not looked at."""
        del info
        if name in {"connection.connect_tcp.complete", "connection.start_tls.complete"}:
            self.connect_seconds = time.monotonic() - self.started_at
        elif name == "http11.receive_response_headers.complete":
            self.first_byte_seconds = time.monotonic() - self.started_at


CURRENT: ContextVar[Timings | None] = ContextVar("timings", default=None)
"""Of the attempt that this task makes."""
