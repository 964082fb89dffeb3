"""JSON log lines on stderr, each with the id of its request."""

import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.tracebacks import ExceptionDictTransformer

from dar.protocol.ids import new_id
from service.http import errors

log = structlog.get_logger()
_SANE_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")


def configure(level: str) -> None:
    """Log JSON lines to stderr from ``level`` up, those of the standard library included."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # No local variables: they hold keys, tokens and prompts.
        structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
    ]
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processor=structlog.processors.JSONRenderer(), foreign_pre_chain=shared
        )
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    # httpx2 logs every URL, and the URL of a reward service may contain a token.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.INFO))


class RequestMiddleware:
    """Gives every request an id and a log line, and renders unexpected exceptions.

    Args:
        app: The application.
        count: Called with the status and the seconds of each response.
    """

    def __init__(self, app: ASGIApp, count: Callable[[int, float], None]) -> None:
        self.app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = scope["dar_request_id"] = _incoming_id(scope) or new_id("req-")
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_id)
            except ClientDisconnect:
                log.debug("client left", method=scope["method"], path=scope["path"])
            except Exception:
                # Outermost frame of a request: the client gets a response in any case.
                log.exception("unhandled error", method=scope["method"], path=scope["path"])
                if status == 0:
                    await errors.internal_error(request_id)(scope, receive, send_with_id)
            seconds = time.perf_counter() - started
            if status:
                self._count(status, seconds)
            milliseconds = round(seconds * 1000, 1)
            log.debug(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                milliseconds=milliseconds,
            )


def _incoming_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value.decode())
    return None
