"""Client of the artifact store: sends and fetches files by signed URLs, without the service.

It uses Python's own HTTP client, which reads into large buffers: 1 MiB at a time takes half of the
processor time of httpx2, and arrives in two thirds of the time.
"""

import contextlib
import hashlib
import http.client
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dar.client.transport import LOOPBACK
from dar.errors import CheckpointError, ConflictError, ServiceUnavailableError
from dar.protocol.worker import FULL_CODES, DirectPart
from dar.settings import unusable_surroundings
from worker.api import GaveUpError

CHUNK_BYTES = 1024**2
PARTS_AT_ONCE = 4
LOOK_SECONDS = 0.1
"""How often the end of a transfer checks whether to give up."""
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 60.0
"""How long the store may neither take nor send a byte."""
GONE = frozenset({404, 410, 416})
FALSE_DIGEST = frozenset({"BadDigest", "XAmzContentChecksumMismatch", "InvalidDigest"})
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")


@dataclass(frozen=True, slots=True)
class PartDigests:
    """Digests of a file, computed in one pass."""

    sha256: str
    parts: list[str]


def digests_of(path: Path, part_bytes: int, give_up: Callable[[], bool]) -> PartDigests:
    """Digests of a file and of its parts, in hex.

    Raises:
        GaveUpError: ``give_up`` returned True.
    """
    whole, parts = hashlib.sha256(), list[str]()
    with path.open("rb") as file:
        while True:
            part, left = hashlib.sha256(), part_bytes
            while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                if give_up():
                    raise GaveUpError(path.name)
                part.update(chunk)
                whole.update(chunk)
                left -= len(chunk)
            if left == part_bytes and parts:
                break
            parts.append(part.hexdigest())
            if left:
                break
    return PartDigests(whole.hexdigest(), parts)


class _Connection(http.client.HTTPConnection):
    """A connection that reads the response to a request that could not be sent to its end.

    A store may refuse a request after its headers, and read no more of it.
    """

    def connect(self) -> None:
        self.timeout = CONNECT_SECONDS
        super().connect()
        self.sock.settimeout(SILENCE_SECONDS)

    def request(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - passed on as they are
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().request(*args, **options)


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """The same over TLS."""


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)


class _SecureHandler(urllib.request.HTTPSHandler):
    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, request, context=self._tls)


class StoreClient:
    """Requests to the store. No key is sent: the URLs are signed.

    Args:
        give_up: Polled during a transfer; once it returns True, the transfer ends.
    """

    def __init__(self, give_up: Callable[[], bool]) -> None:
        self._give_up = give_up

    def put(self, path: Path, part: DirectPart) -> None:
        """Send a part of a file.

        Raises:
            ConflictError: The content has another digest than the URL says (``checksum_mismatch``).
            ServiceUnavailableError: The store refuses it or does not answer (``storage_full``,
                ``storage_unavailable``). The URL may have expired.
            GaveUpError: ``give_up`` returned True.
        """
        headers = {
            **part.headers,
            "content-length": str(part.bytes),
            "content-type": "application/octet-stream",
        }
        content = self._content(path, part.offset, part.bytes)
        with self._send("PUT", part.url, headers, content) as response, _asking(part.url):
            response.read()

    def put_all(self, folder: Path, parts: Sequence[DirectPart]) -> None:
        """Send parts of files in ``folder``, several at once, until one fails.

        Raises:
            ConflictError: See `put`.
            ServiceUnavailableError: See `put`.
            GaveUpError: ``give_up`` returned True.
        """
        waiting, errors = deque(parts), deque[Exception]()

        def work() -> None:
            while waiting and not errors:
                with contextlib.suppress(IndexError):  # another thread has taken the last one
                    part = waiting.popleft()
                    try:
                        self.put(folder / part.name, part)
                    except Exception as error:  # noqa: BLE001 - the calling thread raises it again
                        errors.append(error)

        count = min(PARTS_AT_ONCE, len(parts))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(LOOK_SECONDS)
                if self._give_up():  # a silent store would hold the thread for long
                    raise GaveUpError("upload to the artifact store")
        if errors:
            raise errors[0]

    def get(self, url: str, offset: int, take: Callable[[Iterable[bytes]], None]) -> None:
        """Stream an object from ``offset`` on into ``take``, whose exceptions pass through.

        Raises:
            ConflictError: The store has no such object, or only a part of it (``content_damaged``).
            ServiceUnavailableError: See `put`.
        """
        headers = {"range": f"bytes={offset}-"} if offset else {}
        with self._send("GET", url, headers) as response:
            if offset and response.status != HTTPStatus.PARTIAL_CONTENT:
                raise _unavailable(url, "ignored a byte range")
            left = int(response.headers["content-length"] or 0)

            def read() -> bytes:
                with _asking(url):
                    return response.read(CHUNK_BYTES)

            def chunks() -> Iterator[bytes]:
                nonlocal left
                while chunk := read():
                    left -= len(chunk)
                    yield chunk

            take(chunks())
            if left > 0:  # the library takes a cut connection for the end
                raise _unavailable(url, f"ended a response {left:,} bytes too early")

    def _content(self, path: Path, offset: int, size: int) -> Iterator[bytes]:
        try:
            with path.open("rb") as file:
                file.seek(offset)
                while size and (chunk := file.read(min(size, CHUNK_BYTES))):
                    if self._give_up():
                        raise GaveUpError(path.name)
                    size -= len(chunk)
                    yield chunk
        except OSError as error:
            raise CheckpointError(
                f"{path.name} cannot be read on the worker's disk: {error.strerror}"
            ) from error

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: Iterable[bytes] | None = None,
    ) -> http.client.HTTPResponse:
        if urlsplit(url).scheme not in {"http", "https"}:
            raise _unavailable(url, "has a URL that is not of the web")
        request = urllib.request.Request(  # noqa: S310 - its scheme was checked
            url, data=content, headers=dict(headers), method=method
        )
        with _asking(url):
            try:
                response: http.client.HTTPResponse = self._opener(url).open(request)
            except urllib.error.HTTPError as error:
                with error:
                    raise _failure(url, method, error) from None
            return response

    def _opener(self, url: str) -> urllib.request.OpenerDirector:
        return self._direct if urlsplit(url).hostname in LOOPBACK else self._through_proxies

    @cached_property
    def _direct(self) -> urllib.request.OpenerDirector:
        """For loopback addresses, which no proxy can reach."""
        return _opener_with(urllib.request.ProxyHandler({}))

    @cached_property
    def _through_proxies(self) -> urllib.request.OpenerDirector:
        return _opener_with(urllib.request.ProxyHandler())


@contextlib.contextmanager
def _asking(url: str) -> Iterator[None]:
    """Turn errors of the connection into `ServiceUnavailableError`."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        # The library's text may hold the URL, which is a secret.
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        why = cause.strerror if isinstance(cause, OSError) else None
        raise _unavailable(url, f"does not answer: {why or type(cause).__name__}") from None


def _opener_with(proxies: urllib.request.ProxyHandler) -> urllib.request.OpenerDirector:
    try:
        return urllib.request.build_opener(proxies, _Handler, _SecureHandler)
    except (OSError, ValueError) as error:
        raise unusable_surroundings(error) from None


def _failure(
    url: str, method: str, error: urllib.error.HTTPError
) -> ConflictError | ServiceUnavailableError:
    status = error.code
    found = _CODE.search(error.read(4096).decode("utf-8", "replace"))
    code = "" if found is None else found[1]
    if status == HTTPStatus.BAD_REQUEST and code in FALSE_DIGEST:
        return ConflictError(
            "a part arrived altered at the artifact store; it is sent again",
            code="checksum_mismatch",
        )
    if status in GONE and method == "GET":
        return ConflictError(
            f"the artifact store has no such object, or only a part of it ({status} {code})",
            code="content_damaged",
        )
    is_full = status == HTTPStatus.INSUFFICIENT_STORAGE or code in FULL_CODES
    return _unavailable(url, f"answers {status} {code}".rstrip(), is_full=is_full)


def _unavailable(url: str, why: str, *, is_full: bool = False) -> ServiceUnavailableError:
    host = urlsplit(url).netloc.rpartition("@")[2]
    return ServiceUnavailableError(
        f"the artifact store at {host} {why}",
        code="storage_full" if is_full else "storage_unavailable",
    )
