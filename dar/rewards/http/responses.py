"""Classifies HTTP answers, and failures without an answer, as an `Answer` or an attempt failure."""

import asyncio
import codecs
import logging
import os
import re
import socket
import ssl
import traceback
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import httpcore2

from dar.errors import DARError
from dar.protocol.rewards import MAX_RESPONSE_BYTES, SampleResult, one_line, plain_code
from dar.rewards.base import Failed, RewardResult, Scored, Skipped
from dar.rewards.http.connection import HandshakeTimeoutError, ResetAfterHandshakeError
from dar.rewards.http.egress import EgressDeniedError
from dar.rewards.http.retry import AttemptFailedError, FailureKind, parse_retry_after

logger = logging.getLogger(__name__)
START = "start_of_body"
CLIENT_FAULT = "client_fault"
"""Code of a failure that is this client's own."""
LARGE_BYTES = 256 * 1024
"""Larger bodies are decoded in a thread."""
READ_BYTES = 4096
"""Bytes read of an error answer."""
CHUNKS_IN_A_ROW = 64
"""Chunks of an answer that are read before other requests have a turn: about a millisecond."""
QUOTED = 512
"""Characters of an error answer shown to the owner of the job."""
QUOTE_SECONDS = 2.0
"""Time limit of reading them."""
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
"""Byte order marks, the longer ones first."""
_ENDS = frozenset({"content-length", "transfer-encoding"})
"""Headers by which the end of a body is known. Otherwise it ends with the connection, and one that
broke looks as if the answer were complete. No other JSON than a number is still JSON if its end is
missing."""
_NUMBER = re.compile(rb"[ \t\n\r]*[-0-9]")
_TRANSIENT = frozenset({408, 425, 429})
_REFUSED = frozenset({400, 422})
_NO_SUCH_NAME = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})
_LOOK_UPS = {
    socket.EAI_AGAIN: "the name server did not answer in time, or cannot answer for now",
    socket.EAI_FAIL: "the name server reported a failure",
    socket.EAI_MEMORY: "the resolver has no memory left",
}
"""Why a name is not known to exist or not, by the resolver's error."""
_OLD_TLS = frozenset(
    {
        *("UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "NO_PROTOCOLS_AVAILABLE"),
        *("VERSION_TOO_LOW", "UNSUPPORTED_SSL_VERSION"),
    }
)
_NOT_TLS = frozenset(
    {
        *("WRONG_VERSION_NUMBER", "WRONG_SSL_VERSION", "UNKNOWN_PROTOCOL", "BAD_RECORD_TYPE"),
        *("HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_TOO_SMALL"),
        *("ENCRYPTED_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "UNEXPECTED_RECORD"),
        "UNEXPECTED_EOF_WHILE_READING",
    }
)
"""OpenSSL's reasons for an answer to a handshake that a server without TLS would give."""
_REFUSED_TLS = frozenset(
    {
        *("DH_KEY_TOO_SMALL", "EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"),
        *("MODULUS_TOO_SMALL", "MODULUS_TOO_LARGE", "KEY_SIZE_TOO_SMALL", "BAD_DH_VALUE"),
        *("CHECK_PUBKEY_TOO_SMALL", "INSUFFICIENT_SECURITY", "WRONG_SIGNATURE_TYPE"),
        *("LEGACY_SIGALG_DISALLOWED_OR_UNSUPPORTED", "UNSAFE_LEGACY_RENEGOTIATION_DISABLED"),
        *("UNSUPPORTED_ELLIPTIC_CURVE", "WRONG_CURVE", "ILLEGAL_POINT_COMPRESSION"),
        *("UNKNOWN_CIPHER_RETURNED", "WRONG_CIPHER_RETURNED", "UNKNOWN_KEY_EXCHANGE_TYPE"),
        *("NO_SUITABLE_KEY_SHARE", "NO_SUITABLE_GROUPS", "NO_SUITABLE_SIGNATURE_ALGORITHM"),
    }
)
"""OpenSSL's reasons for keys and algorithms of a server that are too weak or not known here."""
_ALERT = re.compile(r"(?:(?:SSLV3|TLSV1|TLSV13)_ALERT|TLSV1|TLSV13)_(?P<alert>[A-Z_]+)")
"""OpenSSL's names for what a server gave as its reason to end a TLS connection."""
_MAYBE_CERTIFICATE = "; it may require a client certificate, and none is sent"
_HINTS = {
    **dict.fromkeys(
        ("HANDSHAKE_FAILURE", "ACCESS_DENIED", "UNKNOWN_CA", "BAD_CERTIFICATE"), _MAYBE_CERTIFICATE
    ),
    **dict.fromkeys(("CERTIFICATE_UNKNOWN", "UNSUPPORTED_CERTIFICATE"), _MAYBE_CERTIFICATE),
    "UNRECOGNIZED_NAME": "; it serves other host names than this one",
}
"""What an alert usually means. Alerts about a certificate are about the client's."""


Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Answer:
    """A usable answer: a 200 with JSON, or a 202."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case; values of a repeated name are joined by commas."""
    body: bytes


class Incoming:
    """An answer whose body has not been read.

    Args:
        response: From the connection pool.
    """

    def __init__(self, response: httpcore2.Response) -> None:
        self.status = response.status
        self._response = response
        self.headers: dict[str, str] = {}
        self.media_types: list[str] = []
        """Of each ``content-type`` header, in lower case; a proxy may add a second one."""
        for raw_name, raw_value in response.headers:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
            known = self.headers.get(name)
            self.headers[name] = value if known is None else f"{known}, {value}"
            if name == "content-type":
                self.media_types.append(value.partition(";")[0].strip().lower())

    @property
    def kept(self) -> dict[str, bytes]:
        """What readers of this answer keep for each other: its stream can be read only once."""
        return cast("dict[str, bytes]", self._response.extensions)

    @property
    def encoding(self) -> str:
        """Content encoding; ``identity``: not compressed."""
        return self.headers.get("content-encoding", "").strip().lower() or "identity"

    def chunks(self) -> "aclosing[AsyncGenerator[bytes]]":
        """The body in chunks.

        Leaving the context ends the reading, without waiting for the collector.
        """
        return aclosing(self._unhurried())

    async def _unhurried(self) -> AsyncGenerator[bytes]:
        """The body in chunks; other tasks have a turn between them.

        The library waits only for bytes, and one read may hold thousands of tiny chunks.
        """
        count = 0
        async with aclosing(self._response.aiter_stream()) as chunks:
            async for chunk in chunks:
                yield chunk
                count += 1
                if count % CHUNKS_IN_A_ROW == 0:
                    await asyncio.sleep(0)


async def read_answer(incoming: Incoming) -> Answer:
    """Read a 200 or 202 completely.

    Raises:
        AttemptFailedError: Kind ``contract``: headers or size break the contract.
    """
    headers = incoming.headers
    if incoming.encoding != "identity":
        raise _contract(
            "content_encoding",
            f"content-encoding {incoming.encoding[:40]!r}, but the request asks for an answer that "
            "is not compressed",
        )
    media_type = ", ".join(incoming.media_types)
    is_json = bool(media_type) and all(map(_is_json, incoming.media_types))
    if not is_json and incoming.status == 200:
        is_page = "html" in media_type
        raise AttemptFailedError(
            "contract",
            "contract.content_type",
            f"content-type {media_type[:80]!r}, but application/json is required"
            + ("; a login page or a proxy may have answered" if is_page else ""),
            quote=await _quote(incoming),
            status=200,
        )
    length = headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > MAX_RESPONSE_BYTES:
        raise _contract("size", f"a body of {length[:20]} bytes, over {MAX_RESPONSE_BYTES}")
    body = bytearray()
    async with incoming.chunks() as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > MAX_RESPONSE_BYTES:
                raise _contract("size", f"a body over {MAX_RESPONSE_BYTES} bytes")
    if incoming.status == 200 and not _ENDS & headers.keys() and _NUMBER.match(body):
        raise _contract(
            "unframed",
            "the answer is a number, and neither content-length nor chunks say where it ends, so "
            "some of its digits may be lost",
        )
    return Answer(incoming.status, headers, bytes(body))


def _is_json(media_type: str) -> bool:
    return media_type == "application/json" or media_type.endswith("+json")


async def decoded(decode: Callable[[bytes], list[Result]], body: bytes) -> list[Result]:
    """Decode a body; a large one in a thread, so that other requests need not wait for it."""
    if len(body) <= LARGE_BYTES:
        return decode(body)
    return await asyncio.to_thread(decode, body)


def as_result(result: SampleResult) -> RewardResult:
    """A result of ``dar.reward.v1`` in the types of the trainer."""
    if result.error is not None:
        code = f"service.{result.error.code}"
        message = result.error.message or "the reward service could not score the sample"
        return Failed(code, message, is_transient=result.error.retryable)
    if result.reward is None:
        return Skipped(result.reason)
    return Scored(result.reward, dict(result.components), result.feedback)


def without_secrets(
    failure: AttemptFailedError, redact: Callable[[str], str]
) -> AttemptFailedError:
    """Remove secrets from the texts of ``failure``, then limit their length."""
    failure.reason = redact(failure.reason)
    failure.args = (failure.reason,)
    failure.quote = redact(failure.quote)[:QUOTED]
    return failure


def redacted(result: RewardResult, redact: Callable[[str], str]) -> RewardResult:
    """Remove secrets from the texts of a result, which are shown to users."""
    if isinstance(result, Scored):
        feedback = None if result.feedback is None else redact(result.feedback)
        return replace(result, feedback=feedback, components=_redacted_parts(result, redact))
    if isinstance(result, Skipped):
        return result if result.reason is None else Skipped(redact(result.reason))
    return Failed(plain_code(redact(result.code)), redact(result.message), result.is_transient)


def _redacted_parts(result: Scored, redact: Callable[[str], str]) -> Mapping[str, float]:
    return {
        name if redact(name) == name else f"redacted_{place}": value
        for place, (name, value) in enumerate(result.components.items(), start=1)
    }


def _contract(code: str, reason: str, status: int = 200) -> AttemptFailedError:
    return AttemptFailedError("contract", f"contract.{code}", reason, status=status)


async def refusal_of(incoming: Incoming) -> AttemptFailedError:
    """The failure for another status than 200 or 202; reads the start of the body."""
    status = incoming.status
    code, reason = f"http_{status}", f"HTTP {status}"
    quote = await _quote(incoming)
    if status in _TRANSIENT or status >= 500:
        after = parse_retry_after(incoming.headers.get("retry-after"))
        return AttemptFailedError(
            "transient", code, reason, quote=quote, retry_after_seconds=after, status=status
        )
    if 200 <= status < 300:
        return _contract("status", f"{reason}, but only a 200 carries rewards", status)
    if 300 <= status < 400:
        reason = f"{reason}: redirects are not followed; use the address it leads to"
        return AttemptFailedError("permanent", "config.redirect", reason, status=status)
    if status == 413:
        reason = f"{reason}: the request is too large"
        return AttemptFailedError("too_large", code, reason, status=status)
    kind: FailureKind = "refused" if status in _REFUSED else "permanent"
    return AttemptFailedError(kind, code, reason, quote=quote, status=status)


async def _quote(incoming: Incoming) -> str:
    if incoming.encoding != "identity":
        return ""
    return quotable(await start_of(incoming))


def quotable(body: bytes) -> str:
    """The start of a body as one line of text; secrets are not removed.

    A byte order mark names its encoding; without one it is read as UTF-8.
    """
    marks = (mark for mark in _MARKS if body.startswith(mark))
    encoding = _MARKS.get(next(marks, b""), "utf-8")
    return one_line(body[:READ_BYTES].decode(encoding, "replace")).strip()


async def start_of(incoming: Incoming) -> bytes:
    """The start of a body, as far as it comes soon; a repetition returns the same."""
    if (known := incoming.kept.get(START)) is not None:
        return known
    start = bytearray()
    # The status decides; a body that stalls or breaks does not change the failure.
    with suppress(
        TimeoutError, httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.ReadTimeout
    ):
        async with asyncio.timeout(QUOTE_SECONDS), incoming.chunks() as chunks:
            async for chunk in chunks:
                start += chunk
                if len(start) >= READ_BYTES:
                    break
    incoming.kept[START] = bytes(start[:READ_BYTES])
    return incoming.kept[START]


@contextmanager
def own_faults(redact: Callable[[str], str]) -> Iterator[None]:
    """Turn an exception that nobody foresaw into a failure of the request whose answer caused it.

    Args:
        redact: Removes secrets from the traceback, which is logged.

    Raises:
        AttemptFailedError: `CLIENT_FAULT`.
    """
    try:
        yield
    except (AttemptFailedError, DARError):
        raise
    except Exception as error:  # noqa: BLE001 - outermost frame of an answer: others must go on
        lines = redact("".join(traceback.format_exception(error)))
        logger.error("a fault of the reward client, not of the reward service:\n%s", lines)  # noqa: TRY400 - the traceback is logged without secrets
        reason = (
            f"DAR failed to handle its answer ({type(error).__name__}), which is a fault of DAR and "
            "not of the service; the log has the details"
        )
        raise AttemptFailedError("contract", CLIENT_FAULT, reason) from None


def failure_of(error: Exception) -> AttemptFailedError:
    """The failure for an error below HTTP.

    Only blocked addresses and TLS problems are permanent.
    """
    if isinstance(error, EgressDeniedError):
        return AttemptFailedError("permanent", "egress_denied", str(error))
    if isinstance(error, HandshakeTimeoutError):
        reason = "connected, but the TLS handshake did not end in time"
        return AttemptFailedError("transient", "tls.timeout", reason)
    if isinstance(error, ResetAfterHandshakeError):
        reason = "it broke the connection right after the TLS handshake" + _MAYBE_CERTIFICATE
        return AttemptFailedError("transient", "tls.broken", reason)
    if isinstance(error, httpcore2.ConnectTimeout):
        return AttemptFailedError("transient", "connect_timeout", "could not connect in time")
    if isinstance(error, httpcore2.TimeoutException):
        return AttemptFailedError("transient", "timeout", "stopped answering")
    for cause in _causes(error):
        found = _failure_of_cause(cause, is_handshake=isinstance(error, httpcore2.ConnectError))
        if found is not None:
            return found
    # The error's text may contain what was received.
    return AttemptFailedError(
        "transient",
        "protocol",
        "the connection broke, or the server does not speak HTTP",
        quote=one_line(str(error)),
    )


def _failure_of_cause(cause: BaseException, *, is_handshake: bool) -> AttemptFailedError | None:
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = f"its certificate is not valid: {cause.verify_message}"
        return AttemptFailedError("permanent", "tls.certificate", reason)
    if isinstance(cause, ssl.SSLError) and cause.reason in _OLD_TLS:
        reason = "it does not support TLS 1.2 or newer"
        return AttemptFailedError("permanent", "tls.version", reason)
    if isinstance(cause, ssl.SSLError):
        return _failure_of_tls(cause.reason or "", is_handshake=is_handshake)
    if isinstance(cause, socket.gaierror):
        return _failure_of_look_up(cause)
    if isinstance(cause, UnicodeError):  # a name that cannot be written for DNS
        return AttemptFailedError("name", "dns", "its host name was not found")
    if isinstance(cause, ConnectionRefusedError):
        return AttemptFailedError("transient", "connect", "connection refused")
    if isinstance(cause, OSError) and cause.errno is not None:
        return AttemptFailedError("transient", "connect", os.strerror(cause.errno).lower())
    return None


def _failure_of_look_up(error: socket.gaierror) -> AttemptFailedError:
    if error.errno in _NO_SUCH_NAME:
        return AttemptFailedError("name", "dns", "its host name was not found")
    why = _LOOK_UPS.get(error.errno or 0, "the resolver failed")
    reason = f"its host name could not be looked up: {why}"
    return AttemptFailedError("transient", "dns", reason)


def _failure_of_tls(name: str, *, is_handshake: bool) -> AttemptFailedError:
    """The failure for OpenSSL's ``name`` of an error.

    The number of such an error is OpenSSL's own, so `os.strerror` would mislead.
    """
    found = _ALERT.fullmatch(name)
    alert = "" if found is None else found["alert"]
    if alert == "CERTIFICATE_REQUIRED":
        reason = "it requires a client certificate, and none is sent"
        return AttemptFailedError("permanent", "tls.client_certificate", reason)
    if alert:
        words = alert.replace("_", " ").lower()
        reason = f"it ended the TLS connection with the alert {words!r}{_HINTS.get(alert, '')}"
        return AttemptFailedError("transient", "tls.alert", reason)
    words = name.replace("_", " ").lower()
    if name in _REFUSED_TLS:
        reason = f"its TLS is too weak for this machine, or unknown to it: OpenSSL says {words!r}"
        return AttemptFailedError("permanent", "tls.weak", reason)
    if not is_handshake:
        reason = "the TLS connection broke: what arrived is damaged, or is not TLS"
        return AttemptFailedError("transient", "tls.broken", reason)
    if name in _NOT_TLS:
        reason = "the TLS connection failed; a server without TLS may listen there"
        return AttemptFailedError("transient", "protocol", reason)
    reason = "the TLS handshake failed" + (f": OpenSSL says {words!r}" if words else "")
    return AttemptFailedError("transient", "tls.broken", reason)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes and contexts, nearest first."""
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
