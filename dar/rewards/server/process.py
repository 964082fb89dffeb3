"""A reward server as a process: bound before its URL is printed, stopped without losing work."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from dar.errors import ConfigurationError
from dar.rewards.server.endpoint import FunctionEndpoint
from dar.setting_kinds import host_and_port

KEEP_ALIVE_SECONDS = 75
"""Longer than the client keeps idle connections, so that it closes first."""
LAST_SECONDS = 2
"""Most seconds for open connections after everything else has ended."""
BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        host: Address or name of this machine.
        port: 0 takes a free one.

    Raises:
        ConfigurationError: The port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"the reward server cannot listen on {host_and_port(host, port)}: {reason}; "
            "choose another port or host"
        ) from None


def address(listener: socket.socket, host: str) -> str:
    """``http://host:port`` of a socket, with a name that other machines can use."""
    port = listener.getsockname()[1]
    name = socket.gethostname() if host in {"0.0.0.0", "::", ""} else host  # noqa: S104 - chosen by the user
    return f"http://{host_and_port(name, port)}"


def run(app: Starlette, listener: socket.socket, url: str) -> None:
    """Serve until Ctrl-C or SIGTERM, then drain the endpoint; a second signal stops at once.

    Args:
        app: The application.
        listener: The socket from `bind`.
        url: The URL, for the log.
    """
    config = uvicorn.Config(
        app,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    endpoint = getattr(app.state, "reward_endpoint", None)
    # uvicorn does not log the address of a given socket.
    logging.getLogger("uvicorn.error").info("Reward server at %s (Ctrl-C stops it)", url)
    _Server(config, endpoint).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Responds to requests while it drains, and exits with 0.

    uvicorn would close the listener at the first signal, so that promised results could not be
    fetched and new requests would get no 503; and it would raise the signal again at the end.
    """

    def __init__(self, config: uvicorn.Config, endpoint: FunctionEndpoint | None) -> None:
        super().__init__(config)
        self._endpoint = endpoint
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        self._loop = asyncio.get_running_loop()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - signature of a signal handler
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._endpoint is None or self._draining is not None:
            self.force_exit = self.should_exit = True
            if self._draining is not None:
                self._draining.cancel()
            return
        self._draining = asyncio.create_task(self._drain(self._endpoint))

    async def _drain(self, endpoint: FunctionEndpoint) -> None:
        await endpoint.drained()
        self.should_exit = True
