"""What an HTTP answer, or the lack of one, says about a reward service."""

import os
import socket
import ssl
from collections.abc import Iterator

import httpx2

from dar.protocol.rewards import MAX_RESPONSE_BYTES
from dar.rewards.asynchronous import Polled
from dar.rewards.retry import AttemptFailedError, parse_retry_after

QUOTED_BYTES = 512
"""Bytes of an error answer that are shown to the owner of the job."""
_TRANSIENT = frozenset({408, 425, 429})
_REFUSED = frozenset({400, 422})


async def read_answer(response: httpx2.Response) -> bytes:
    """The body of a 200, unless its headers or its size break the contract.

    Raises:
        AttemptFailedError: Kind ``contract``.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"", "identity"}:
        raise _contract("content_encoding", f"a body with content-encoding {encoding[:40]!r}")
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise _contract(
            "content_type",
            f"content-type {media_type[:80]!r} where application/json is due; "
            "a login page or a proxy may have answered",
        )
    length = response.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > MAX_RESPONSE_BYTES:
        raise _contract("size", f"a body of {length[:20]} bytes, over {MAX_RESPONSE_BYTES}")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_RESPONSE_BYTES:
            raise _contract("size", f"a body over {MAX_RESPONSE_BYTES} bytes")
    return bytes(body)


async def read_polled(response: httpx2.Response) -> Polled:
    """What the answer to a GET of a ``poll_url`` says.

    Raises:
        AttemptFailedError: It is neither a 200 nor a 202. What would be permanent concerns this one request, not the service.
    """
    if response.status_code == 200:
        return Polled(await read_answer(response))
    if response.status_code == 202:
        return Polled(None, parse_retry_after(response.headers.get("retry-after")))
    failure = await refusal_of(response)
    if failure.kind in {"permanent", "too_large"}:
        raise AttemptFailedError(
            "refused",
            failure.code,
            f"polling for the result: {failure.reason}",
            quote=failure.quote,
        )
    raise failure


def _contract(code: str, reason: str) -> AttemptFailedError:
    return AttemptFailedError("contract", f"contract.{code}", reason)


async def refusal_of(response: httpx2.Response) -> AttemptFailedError:
    """What an answer other than 200 means; reads the first bytes of its body."""
    status = response.status_code
    code, reason = f"http_{status}", f"HTTP {status}"
    quote = await _quote(response)
    if status in _TRANSIENT or status >= 500:
        after = parse_retry_after(response.headers.get("retry-after"))
        return AttemptFailedError("transient", code, reason, quote=quote, retry_after_seconds=after)
    if 200 <= status < 300:
        return _contract("status", f"{reason}, where only 200 carries rewards")
    if 300 <= status < 400:
        return AttemptFailedError(
            "permanent",
            "config.redirect",
            f"{reason}: redirects are not followed; use the address it leads to",
        )
    if status == 413:
        return AttemptFailedError("too_large", code, f"{reason}: the request is too large")
    if status in _REFUSED:
        return AttemptFailedError("refused", code, reason, quote=quote)
    return AttemptFailedError("permanent", code, reason, quote=quote)


async def _quote(response: httpx2.Response) -> str:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        return ""
    start = bytearray()
    async for chunk in response.aiter_raw():
        start += chunk
        if len(start) >= QUOTED_BYTES:
            break
    text = bytes(start[:QUOTED_BYTES]).decode("utf-8", "replace")
    return "".join(ch if ch.isprintable() else " " for ch in text).strip()


def failure_of(error: Exception) -> AttemptFailedError:
    """What a failure below HTTP means: certificates and impossible URLs are permanent, all else passes."""
    if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol):
        return AttemptFailedError("permanent", "config.url", f"not a usable URL: {error}")
    if isinstance(error, httpx2.ConnectTimeout):
        return AttemptFailedError("transient", "connect_timeout", "could not connect in time")
    if isinstance(error, httpx2.TimeoutException):
        return AttemptFailedError("transient", "timeout", "stopped answering")
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            reason = f"its certificate is not valid: {cause.verify_message}"
            return AttemptFailedError("permanent", "tls.certificate", reason)
        if isinstance(cause, socket.gaierror):
            reason = "its host name was not found"
            if cause.errno == socket.EAI_NONAME:
                return AttemptFailedError("name", "dns", reason)
            return AttemptFailedError("transient", "dns", reason)
        if isinstance(cause, ConnectionRefusedError):
            return AttemptFailedError("transient", "connect", "connection refused")
        if isinstance(cause, OSError) and cause.errno is not None:
            return AttemptFailedError("transient", "connect", os.strerror(cause.errno).lower())
    return AttemptFailedError("transient", "protocol", str(error) or "the connection broke")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that led to it, nearest first."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        cause = waiting.pop(0)
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        if isinstance(cause, BaseExceptionGroup):
            waiting.extend(cause.exceptions)
        waiting.extend([cause.__cause__, cause.__context__])
