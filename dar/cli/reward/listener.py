"""A small HTTP listener for callbacks of a reward service on this machine, during its check."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator

from dar.protocol.rewards import MAX_RESPONSE_BYTES
from dar.rewards.probe.callbacks import ProbeInbox

SECONDS = 30.0
"""Time limit of one callback."""
STATUS = {
    "accepted": "200 OK",
    "duplicate": "200 OK",
    "refused": "401 Unauthorized",
    "conflict": "409 Conflict",
    "late": "410 Gone",
    "closed": "410 Gone",
    "invalid": "422 Unprocessable Content",
}
_REQUEST = re.compile(r"POST /([A-Za-z0-9_.:-]{1,64}) HTTP/1\.1")


@contextlib.asynccontextmanager
async def listening() -> AsyncIterator[ProbeInbox]:
    """An inbox with a listener on a free port of the loopback interface."""
    inbox: ProbeInbox | None = None

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert inbox is not None
        with contextlib.suppress(
            OSError,
            TimeoutError,
            ValueError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
        ):
            async with asyncio.timeout(SECONDS):
                await _answer(inbox, reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    inbox = ProbeInbox(f"http://127.0.0.1:{port}")
    async with server:
        yield inbox


async def _answer(
    inbox: ProbeInbox, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = [line.partition(":") for line in head[1:] if line]
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    request = _REQUEST.fullmatch(head[0])
    length = int(headers.get("content-length", "0"))
    if request is None or not 0 <= length <= MAX_RESPONSE_BYTES:
        await _send(writer, "404 Not Found", {"error": "POST a result with a content-length"})
        return
    body = await reader.readexactly(length)
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else ""
    outcome, error = inbox.receive(request[1], given, body)
    content: dict[str, str] = {"status": outcome}
    if error is not None:
        content["error"] = error.message
    await _send(writer, STATUS[outcome], content)


async def _send(writer: asyncio.StreamWriter, status: str, content: dict[str, str]) -> None:
    body = json.dumps(content).encode()
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
