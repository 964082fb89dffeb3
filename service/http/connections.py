"""Connections of the service: how many there may be, and how long each may keep it waiting.

uvicorn limits only the time between two requests. Without further limits, connections that send
nothing, half a request or one byte a minute would stay open and use up the files of the process.
No client needs a key for that. Here every connection has a time limit, whatever it does:

- before a request has arrived: `HEADER_SECONDS`, and between two requests `IDLE_SECONDS`
- while its body arrives: `BODY_SECONDS` for the next bytes, at least `BODY_RATE` on average
- while the response is sent: `STALL_SECONDS` in which the client takes nothing

The number of connections follows from the limit on open files (`max_connections`). If there are too
many, the one that has waited longest for a request is closed for the new one.
"""

import asyncio
import resource
import time
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from dar.errors import RequestTimeoutError

HEADER_SECONDS = 20.0
"""For a request line and all headers, from the start of the connection or of the request."""
IDLE_SECONDS = 5
"""Between two requests on a connection."""
BODY_SECONDS = 60.0
"""For the next bytes of a body."""
BODY_RATE = 1024.0
"""Bytes per second; slower bodies are refused once they have kept a request waiting for
`BODY_SECONDS` more than that."""
STALL_SECONDS = 120.0
"""For a client to take some of a response."""
MAX_HEADER_BYTES = 64 * 1024
OTHER_FILES = 128
"""Files that are left for the database, the log, and requests to reward services."""
MOST_CONNECTIONS = 8192
"""However many files the process may open: each connection also costs memory."""
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
    b"retry-after: 1\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"
)
BUSY_BODY = (
    b'{"error":{"message":"the service has too many connections; try again in a moment",'
    b'"type":"server_error","param":null,"code":"service_unavailable","errors":[],'
    b'"request_id":null}}'
)


def raise_file_limit() -> int:
    """Raise the soft limit on open files to the hard one. Returns the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS reports a hard limit that the kernel does not grant
            return soft
    return hard


def max_connections(file_limit: int) -> int:
    """The most connections for a limit on open files: each may need a second file for its data."""
    if file_limit == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(8, min(MOST_CONNECTIONS, (file_limit - OTHER_FILES) // 2))


class ConnectionConfig(uvicorn.Config):
    """uvicorn's configuration with the limits of this module.

    h11 is used even if httptools is installed: httptools does not limit the size of headers.

    Args:
        app: The application.
        max_connections: See `max_connections`.
        **options: Passed on to uvicorn.
    """

    def __init__(self, app: ASGIApp, *, max_connections: int, **options: Any) -> None:  # noqa: ANN401 - passed on to uvicorn
        super().__init__(
            app,
            http=TimedProtocol,
            ws="none",
            timeout_keep_alive=IDLE_SECONDS,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            **options,
        )
        self.max_connections = max_connections
        self.without_request: dict[TimedProtocol, None] = {}
        """Connections that wait for a request, the longest waiting first."""


class TimedProtocol(H11Protocol):
    """uvicorn's protocol with time limits on everything that it waits for."""

    def __init__(
        self,
        config: ConnectionConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._max_connections = config.max_connections
        self._without_request = config.without_request
        self._served = self.app
        self.app = self._serve  # uvicorn calls it for every request
        self._requests = 0
        self._is_idle = False
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: any client may ask for WebSockets, and is answered over HTTP as before."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        """Take the connection, or close another one or this one if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._max_connections and not self._close_longest_waiting():
            self.transport.write(BUSY % (len(BUSY_BODY), BUSY_BODY))
            self.transport.close()
        self._wait_for_request(HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Give a request that has begun its time for the header."""
        if self._is_idle and self._requests == 0:
            self._is_idle = False
            self._wait_for_request(HEADER_SECONDS)
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Limit the time in which the client takes nothing of a response."""
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client takes the response."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        super().resume_writing()

    def give_way(self) -> None:
        """Close the connection, which waits for a request, for another one."""
        self._stop_waiting()
        self.transport.abort()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, during which the connection waits for none."""
        self._stop_waiting()
        self._requests += 1
        try:
            await self._served(scope, receive, send)
        finally:
            self._requests -= 1
            if self._requests == 0 and self in self.connections:
                self._is_idle = True
                # uvicorn closes an idle connection a second earlier, but waits until the client
                # has taken the response.
                self._wait_for_request(IDLE_SECONDS + 1)

    def _wait_for_request(self, seconds: float) -> None:
        self._stop_waiting()
        self._without_request[self] = None
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        self._without_request.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_longest_waiting(self) -> bool:
        other = next(iter(self._without_request), None)
        if other is None:
            return False
        other.give_way()
        return True


class BodyTimeouts:
    """Middleware that limits the time in which the body of a request arrives."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await self.app(scope, _TimedBody(receive), send)


class _TimedBody:
    """ASGI's ``receive`` with a time limit until the end of the body; later it may take long.

    Only time in which the application waits counts, so an application that is slow itself is no
    reason to refuse a request.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_over = False
        self._waited = 0.0
        self._bytes = 0

    async def __call__(self) -> Message:
        """The next message.

        Raises:
            RequestTimeoutError: The body does not arrive, or too slowly.
        """
        if self._is_over:
            return await self._receive()
        started = time.monotonic()
        allowed = BODY_SECONDS + self._bytes / BODY_RATE - self._waited
        try:
            async with asyncio.timeout(max(0.0, min(BODY_SECONDS, allowed))):
                message = await self._receive()
        except TimeoutError:
            self._is_over = True
            raise RequestTimeoutError(
                f"the body arrived too slowly: {self._bytes:,} bytes in {self._waited:.0f} s and "
                f"nothing in the last {time.monotonic() - started:.0f} s; send it again, at least "
                f"{BODY_RATE:,.0f} bytes a second"
            ) from None
        self._waited += time.monotonic() - started
        self._bytes += len(message.get("body", b""))
        self._is_over = not message.get("more_body", False)
        return message
