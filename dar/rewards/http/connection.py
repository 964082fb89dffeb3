"""The network connection below the pool, and where the time of an attempt goes.

A request is sent in one write, and the check whether a connection can be reused is cheap. Measured
with 32 connections: the pool checks before each request whether every idle connection is readable,
which took a fifth of the client's time through the layers of the library's own stream. Head and
body in two writes are two packets and wake the server twice.
"""

import itertools
import re
import select
import socket
import ssl
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import httpcore2

from dar.protocol.rewards import MAX_RESPONSE_BYTES

FLUSH_BYTES = 256 * 1024
"""Bytes of a request that are buffered before they are sent."""
KEPT_BYTES = MAX_RESPONSE_BYTES + 1024**2
"""Bytes of an answer, its head and chunk sizes included, above which its connection is not
reused."""
COUNTED_CHUNKS = 1000
"""Chunks of an answer above which its connection is not reused, as counting them takes long."""
_BLANK_LINE = re.compile(rb"\n\r?\n")
_WITHOUT_BODY = frozenset({204, 304})


class HandshakeTimeoutError(httpcore2.ConnectTimeout):
    """A connection was accepted, but the TLS handshake did not end in time."""


class ResetAfterHandshakeError(httpcore2.ReadError):
    """A connection broke after the TLS handshake, before anything was received.

    With TLS 1.3 a server that requires a client certificate checks it at this point. If it closes
    at once, the alert that says so may be lost.
    """


class JoinedStream(httpcore2.AsyncNetworkStream):
    """Buffers what is written until something is read.

    Args:
        inner: The connection.
        is_secured: Whether it is encrypted.
    """

    def __init__(self, inner: httpcore2.AsyncNetworkStream, *, is_secured: bool = False) -> None:
        self._inner = inner
        self._is_silent = is_secured
        """Encrypted, and nothing was received yet."""
        self._unsent = bytearray()
        self._write_timeout: float | None = None
        self._answer = bytearray()
        self._poll: select.poll | None = None
        self._is_spoiled = False
        raw = inner.get_extra_info("socket")
        if isinstance(raw, socket.socket) or hasattr(raw, "fileno"):
            self._poll = select.poll()
            self._poll.register(raw.fileno(), select.POLLIN)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - part of the base class
        """Send what was written, then read."""
        try:
            await self._flush()
        except httpcore2.WriteError:
            # A server may answer and close before it has read everything; its answer counts.
            self._unsent.clear()
        try:
            received = await self._inner.read(max_bytes, timeout)
        except OSError as error:  # TLS, after the handshake: the library maps errors of it alone
            raise httpcore2.ReadError(str(error)) from error
        except httpcore2.ReadError as error:
            if self._is_silent:
                raise ResetAfterHandshakeError(str(error)) from error
            raise
        self._is_silent = False
        self._answer += received
        if len(self._answer) > KEPT_BYTES:
            self._is_spoiled = True
            self._answer.clear()
        return received

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - part of the base class
        """Buffer what is to be sent."""
        self._unsent += buffer
        self._write_timeout = timeout
        if len(self._unsent) >= FLUSH_BYTES:
            await self._flush()

    def end_answer(self, status: int, headers: Mapping[str, str]) -> None:
        """Keep the connection from being reused if the server sent more than the answer.

        The library would read the surplus as the answer to the next request. Most protocols repeat
        nothing of the request, so rewards of other samples could not be recognised as such.

        What the library has left in its buffer is private. So the length of the answer is computed
        from the received bytes, which the library has already validated. In case of doubt the
        connection is not reused.

        Args:
            status: Of the answer.
            headers: Of the answer; names in lower case.
        """
        if _length_of(self._answer, status, headers) != len(self._answer):
            self._is_spoiled = True
        self._answer.clear()

    async def aclose(self) -> None:
        """Close without sending what is buffered."""
        self._unsent.clear()
        self._answer.clear()
        self._poll = None
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - part of the base class
    ) -> httpcore2.AsyncNetworkStream:
        """The same connection, encrypted. It is closed if that fails.

        Raises:
            HandshakeTimeoutError: It took over ``timeout`` seconds.
        """
        try:
            inner = await self._inner.start_tls(ssl_context, server_hostname, timeout)
        except (
            BaseException
        ) as error:  # the library leaves a socket open when a time limit cancels this
            await self.aclose()
            if isinstance(error, httpcore2.ConnectTimeout):
                raise HandshakeTimeoutError(str(error)) from error
            raise
        return JoinedStream(inner, is_secured=True)

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - part of the base class
        """See the base class. The pool closes an idle connection that is readable."""
        if info == "is_readable" and self._is_spoiled:
            return True
        if info == "is_readable" and self._poll is not None:
            return bool(self._poll.poll(0))
        return self._inner.get_extra_info(info)

    async def _flush(self) -> None:
        if self._unsent:
            unsent, self._unsent = bytes(self._unsent), bytearray()
            try:
                await self._inner.write(unsent, self._write_timeout)
            except OSError as error:
                raise httpcore2.WriteError(str(error)) from error


def _length_of(received: bytearray, status: int, headers: Mapping[str, str]) -> int | None:
    """Bytes of the HTTP message at the start of ``received``; None: unknown."""
    head = _BLANK_LINE.search(received)
    if head is None:
        return None
    if status in _WITHOUT_BODY:
        return head.end()
    try:
        if "transfer-encoding" in headers:
            return _end_of_chunks(received, head.end())
        return head.end() + int(headers["content-length"])
    except (KeyError, ValueError):
        return None


def _end_of_chunks(received: bytearray, start: int) -> int:
    """Where a chunked body ends (RFC 9112, section 7.1), trailers included.

    Raises:
        ValueError: It does not end in ``received``, or has too many chunks to count them here.
    """
    for count in itertools.count():
        if count > COUNTED_CHUNKS:
            raise ValueError(f"over {COUNTED_CHUNKS} chunks")
        line_end = received.index(b"\n", start)
        size = int(received[start:line_end].partition(b";")[0], 16)
        start = line_end + 1 + size + len(b"\r\n")
        if size == 0:
            break
    return received.index(b"\r\n\r\n", line_end - 1) + len(b"\r\n\r\n")


@dataclass(slots=True)
class Timings:
    """Seconds from the start of an attempt; None: not reached, as on a reused connection."""

    started_at: float = field(default_factory=time.monotonic)
    has_dialled: bool = False
    """Whether a connection was opened for it."""
    dns_seconds: float | None = None
    """Time until the name was resolved and its addresses checked."""
    connect_seconds: float | None = None
    """Time until the connection was open, TLS included."""
    first_byte_seconds: float | None = None
    """Time until the head of the answer had arrived."""

    def begin(self) -> None:
        """Start an attempt, or start it again on a fresh connection."""
        self.started_at = time.monotonic()
        self.has_dialled = False
        self.dns_seconds = self.connect_seconds = self.first_byte_seconds = None

    def resolved(self) -> None:
        """Note that the addresses are known."""
        self.dns_seconds = time.monotonic() - self.started_at

    async def trace(self, name: str, info: Mapping[str, Any]) -> None:
        """The ``trace`` extension of the connection pool."""
        del info  # may hold headers
        if name in {"connection.connect_tcp.complete", "connection.start_tls.complete"}:
            self.connect_seconds = time.monotonic() - self.started_at
        elif name == "http11.receive_response_headers.complete":
            self.first_byte_seconds = time.monotonic() - self.started_at


CURRENT: ContextVar[Timings | None] = ContextVar("timings", default=None)
"""Timings of the attempt that this task makes."""
