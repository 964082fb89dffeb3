"""Where the time of one attempt goes: name, connection, first byte."""

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


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
