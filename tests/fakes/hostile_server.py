"""A reward service that misbehaves, on raw sockets; what it does is in ``hostile_behaviours.py``.

Also a program: it prints its URL and serves until killed. ``/fine`` is the path that conforms; a path that ends in ``?first=N``
misbehaves N times and then conforms. ``GET /log`` answers with what was received, for tests whose server is another process.
"""

import asyncio
import contextlib
import json
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import orjson

from fakes.hostile_behaviours import BEHAVIOURS
from fakes.hostile_exchange import Exchange


@dataclass
class HostileServer:
    """A running server; ``url(path)`` is the address of a behaviour."""

    port: int
    scheme: str = "http"
    requests: list[Exchange] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    connections: int = 0

    def url(self, path: str) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/{path}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = self.connections
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._one(reader, writer, connection):
                pass
        writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await writer.wait_closed()

    async def _one(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int
    ) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        headers = {}
        for line in head[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        target = urlsplit(head[0].split()[1])
        name, _, argument = target.path[1:].partition("/")
        self.counts[target.path] = number = self.counts.get(target.path, 0) + 1
        exchange = Exchange(
            target.path, unquote(argument), headers, body, reader, writer, number, connection
        )
        if name == "log":
            await exchange.answer(orjson.dumps(self.log()))
            return True
        self.requests.append(exchange)
        first = int(parse_qs(target.query).get("first", ["0"])[0])
        await BEHAVIOURS["fine" if first and number > first else name](exchange)
        return exchange.keeps

    def log(self) -> list[dict[str, Any]]:
        """What was received."""
        return [
            {
                "path": item.path,
                "headers": item.headers,
                "body": item.body.decode("utf-8", "replace"),
            }
            for item in self.requests
        ]


@contextlib.asynccontextmanager
async def hostile_server(tls: ssl.SSLContext | None = None) -> AsyncIterator[HostileServer]:
    """A server in this event loop."""
    hostile = HostileServer(0, "http" if tls is None else "https")
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        task.add_done_callback(handlers.discard)
        await hostile.handle(reader, writer)

    # The client says no goodbye in TLS; asyncio would wait 30 s for it.
    more: dict[str, Any] = {} if tls is None else {"ssl_shutdown_timeout": 0.2}
    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls, backlog=128, **more)
    hostile.port = server.sockets[0].getsockname()[1]
    try:
        yield hostile
    finally:
        server.close()
        waiting = list(handlers)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await server.wait_closed()


@contextlib.contextmanager
def hostile_server_in_thread(tls: ssl.SSLContext | None = None) -> Iterator[HostileServer]:
    """A server in a thread, for tests that have no event loop of their own or look at the one they have."""
    started = threading.Event()
    found: list[tuple[HostileServer, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        async with hostile_server(tls) as server:
            stop = asyncio.Event()
            found.append((server, asyncio.get_running_loop(), stop))
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    started.wait()
    server, loop, stop = found[0]
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _main() -> None:
    async with hostile_server() as server:
        sys.stdout.write(json.dumps({"url": server.url("")}) + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
