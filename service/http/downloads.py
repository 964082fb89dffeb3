"""Sending files: whole or one byte range, with a digest as ETag, so that downloads can resume.

A file of this machine is sent by the web server's own means. An object of a bucket is streamed, or
the client is redirected to a signed URL of it.
"""

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dar.errors import ConflictError, RangeNotSatisfiableError
from service.http import errors
from service.storage.storage import CHUNK_BYTES, DirectTransfers, Storage

_ONE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)


ANSWERS: dict[int | str, dict[str, Any]] = {
    206: {"description": "The range that was asked for."},
    302: {"description": "The content is at the signed URL in `location`, for a limited time."},
    304: {"description": "The client has the file already (`if-none-match`)."},
    **errors.may_answer(409, 416),
}
"""Responses of a download besides 200."""


class _Download(FileResponse):
    chunk_size = CHUNK_BYTES  # 1,400 MB/s instead of 330 at Starlette's 64 KiB

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file. A range in another unit than bytes is ignored (RFC 9110)."""
        if _range_of(Headers(scope=scope)) is None:
            kept = [item for item in scope["headers"] if item[0] != b"range"]
            scope = {**scope, "headers": kept}
        await super().__call__(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Content:
    """What is sent."""

    size: int
    sha256: str
    """In hex."""
    filename: str
    """Name under which a browser saves it."""

    @property
    def headers(self) -> dict[str, str]:
        return {
            "etag": f'"{self.sha256}"',
            "repr-digest": f"sha-256=:{base64.b64encode(bytes.fromhex(self.sha256)).decode()}:",
            "x-content-type-options": "nosniff",
            "cache-control": "private, no-transform",
        }


def send(
    request: Request,
    storage: Storage,
    key: str,
    content: Content,
    *,
    transfers: DirectTransfers | None = None,
) -> Response:
    """The response with a stored object.

    Args:
        request: Its ``Range``, ``If-Range`` and ``If-None-Match`` headers are honoured.
        storage: Where the object is.
        key: The object.
        content: What it must contain.
        transfers: Signs the URL that a GET is redirected to; None: the content is sent.

    Raises:
        ConflictError: The object is missing or has another size (``content_damaged``).
        ServiceUnavailableError: The storage does not answer.
    """
    path = storage.path(key)
    if path is not None:
        return send_file(request, path, content)
    here = storage.size(key)
    if here is None:
        storage.check_mounted()
    _check_size(here, content)
    if (answer := _without_content(request, content)) is not None:
        return answer
    if transfers is not None and request.method == "GET":
        headers = {**content.headers, "cache-control": "no-store"}
        return RedirectResponse(transfers.download_url(key, content.filename), 302, headers)
    first, end = _bounds(_wanted(request, content), content.size)
    headers = {
        **content.headers,
        "accept-ranges": "bytes",
        "content-length": str(end - first),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(content.filename, safe='')}",
    }
    status = 200
    if (first, end) != (0, content.size) or _wanted(request, content) is not None:
        status = 206
        headers["content-range"] = f"bytes {first}-{end - 1}/{content.size}"
    chunks = iter(()) if request.method == "HEAD" else storage.read(key, first, end)
    return StreamingResponse(chunks, status, headers, media_type="application/octet-stream")


def send_file(request: Request, path: Path, content: Content) -> Response:
    """The response with a file of this machine; see `send`."""
    is_there = path.is_file() and not path.is_symlink()
    _check_size(path.stat().st_size if is_there else None, content)
    return _without_content(request, content) or _Download(
        path,
        headers=content.headers,
        media_type="application/octet-stream",
        filename=content.filename,
    )


def _check_size(here: int | None, content: Content) -> None:
    if here != content.size:
        what = "its content is missing"
        if here is not None:
            what = f"it has {here:,} of {content.size:,} bytes"
        raise damaged_content(content.filename, what)


def damaged_content(filename: str, what: str) -> ConflictError:
    """The error about an object that is not as it was stored."""
    return ConflictError(
        f"{filename!r} is damaged in the artifact store: {what}; ask the operator to restore it "
        "from a backup",
        code="content_damaged",
    )


def _without_content(request: Request, content: Content) -> Response | None:
    """The response to a client that has the content, or asks for a range outside of it."""
    headers = content.headers
    if headers["etag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    wanted = _wanted(request, content)
    if wanted is not None and not _is_satisfiable(wanted, content.size):
        error = RangeNotSatisfiableError(
            f"range {wanted[:100]!r} does not fit a file of {content.size} bytes; send one like "
            "'bytes=0-99'"
        )
        id_ = errors.request_id(request)
        return errors.render(error, id_, {"content-range": f"bytes */{content.size}"})
    return None


def _wanted(request: Request, content: Content) -> str | None:
    """The range of a request that applies to the content."""
    etag = content.headers["etag"]
    is_current = request.headers.get("if-range", etag) == etag
    return _range_of(request.headers) if is_current else None


def _bounds(wanted: str | None, size: int) -> tuple[int, int]:
    """First byte, and the byte after the last, of a range that can be satisfied."""
    match = None if wanted is None else _ONE_RANGE.fullmatch(wanted.strip())
    if match is None:
        return 0, size
    if not match[1]:
        return max(0, size - int(match[2])), size
    return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size


def _range_of(headers: Headers) -> str | None:
    wanted = headers.get("range")
    return wanted if wanted is not None and wanted.lower().startswith("bytes=") else None


def _is_satisfiable(wanted: str, size: int) -> bool:
    match = _ONE_RANGE.fullmatch(wanted.strip())
    if match is None or not (match[1] or match[2]):
        return False
    first, last = match[1], match[2]
    if not first:
        return int(last) > 0 and size > 0
    return int(first) < size and (not last or int(first) <= int(last))
