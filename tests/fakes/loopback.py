"""HTTP servers in a thread of the test: one on bare sockets whose every answer a test decides, and
uvicorn for real apps.
"""

import contextlib
import json
import socket
import socketserver
import ssl
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import orjson
import uvicorn

HANG_SECONDS = 20.0
TLS_GREETING = b"\x16"


@dataclass
class Request:
    """One request, and the connection to answer it on."""

    method: str
    target: str
    headers: dict[str, str]
    """With names in lower case."""
    body: bytes
    connection: socket.socket
    server: "LoopbackServer"
    number: int
    """How many requests this path has had, this one included."""
    connection_number: int
    """Which connection of the server it came on, from 1."""
    keeps: bool = False
    """Whether the connection goes on."""

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @cached_property
    def content(self) -> dict[str, Any]:
        return dict(orjson.loads(self.body))

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def answer(
        self,
        body: bytes,
        status: int | str = 200,
        content_type: str = "application/json",
        *,
        copies: int = 1,
        **headers: str,
    ) -> None:
        """Send a well-framed answer; underscores in the names of headers become dashes."""
        given = {"content-type": content_type, "content-length": str(len(body))}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        first = f"HTTP/1.1 {status}" if isinstance(status, str) else f"HTTP/1.1 {status} Status"
        lines = [first, *(f"{name}: {value}" for name, value in given.items())]
        self.send(("\r\n".join([*lines, "", ""]).encode("latin-1") + body) * copies)
        self.keeps = given.get("connection") != "close"

    def json(self, content: object, status: int | str = 200, **headers: Any) -> None:
        """Answer with JSON, in which Python's NaN is written as it is."""
        self.answer(json.dumps(content).encode(), status, **headers)

    def hang(self) -> None:
        """Send nothing until the server is closed."""
        self.server.stopping.wait(HANG_SECONDS)

    def reset(self) -> None:
        """End the connection with RST."""
        self.keeps = False
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()


Manner = Callable[[Any], object]
"""What a server does with a request. (`Any`: servers of rewards give it requests that can do
more.)"""


class _Handler(socketserver.StreamRequestHandler):
    server: "_Listener"

    def setup(self) -> None:
        if self.server.owner.tls is not None:
            self.request = self.server.owner.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def handle(self) -> None:
        self.server.owner.serve(self)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        if self.server.owner.tls is not None:
            self.connection.close()  # the listener knows the socket below it alone


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, owner: "LoopbackServer", port: int) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what a manner raised; a client that left is no news."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class LoopbackServer:
    """Treats each request in the manner that is next in turn; the last manner stays."""

    request_type: ClassVar[type[Request]] = Request

    def __init__(self, *manners: Manner, path: str = "", tls: ssl.SSLContext | None = None) -> None:
        self.manners = list(manners)
        self.tls = tls
        self.requests: list[Any] = []
        self.counts: Counter[str] = Counter()
        """Requests by path."""
        self.connections = 0
        self.stopping = threading.Event()
        self._path = path
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listen(0)
        self.port: int = self._listener.server_address[1]

    @property
    def url(self) -> str:
        return self.at(self._path)

    def at(self, path: str) -> str:
        """The address of a path of this server."""
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}/{path}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.stopping.set()
        self.go_down()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def go_down(self) -> None:
        """Refuse connections from now on; the request under way is answered."""
        self._is_down = True
        self._listener.shutdown()
        self._listener.server_close()

    def come_back(self) -> None:
        """Listen again, at the same address."""
        self._listen(self.port)

    def _listen(self, port: int) -> None:
        self._is_down = False
        self._listener = _Listener(self, port)
        threading.Thread(target=self._listener.serve_forever, args=(0.01,), daemon=True).start()

    def serve(self, handler: _Handler) -> None:
        """Serve one connection."""
        with self._lock:
            self.connections += 1
            number = self.connections
            self._open.add(handler.connection)
        try:
            with contextlib.suppress(OSError):
                while self._serve_one(handler, number) and not self._is_down:
                    pass
        finally:
            with self._lock:
                self._open.discard(handler.connection)

    def _serve_one(self, handler: _Handler, connection_number: int) -> bool:
        if handler.rfile.peek(1).startswith(TLS_GREETING):
            return False
        words = handler.rfile.readline().decode("latin-1").split()
        if len(words) != 3:  # no HTTP, or the end
            return False
        headers = {}
        while line := handler.rfile.readline().decode("latin-1").strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        size = int(headers.get("content-length", 0))
        body = handler.rfile.read(size)
        if len(body) < size:
            return False
        method, target, _ = words
        path = urlsplit(target).path
        with self._lock:
            self.counts[path] += 1
            request = self.request_type(
                method,
                target,
                headers,
                body,
                handler.connection,
                self,
                self.counts[path],
                connection_number,
            )
            self.requests.append(request)
            behave = self.manners.pop(0) if len(self.manners) > 1 else self.manners[0]
        behave(request)
        return request.keeps


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address at which uvicorn serves an ASGI application in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()
