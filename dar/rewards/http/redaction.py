"""Secrets of a reward endpoint: which headers may carry them, and their removal from texts.

A service may return anything that it was sent, in an error page, a header or a sample's feedback.
Texts from a service pass through a `Redactor` before they reach a log, an error or the sample view.
"""

import base64
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote_plus
from weakref import WeakSet

from dar.errors import ConfigurationError
from dar.rewards.http.disguises import forms, readings, reduced

REDACTED = "[redacted]"
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
"""A header name (RFC 9110)."""
_FORBIDDEN = re.compile(
    r"host|content-.*|transfer-encoding|connection|keep-alive|proxy-.*|te|trailer|upgrade|expect"
    r"|accept|accept-encoding|user-agent|traceparent|webhook-.*|idempotency-key|x-dar-.*"
)
"""Headers that frame, sign or identify a request; only this client sets them."""
_SHAPES = re.compile(
    r"dar-(?:at|sk|wk)-[0-9A-Za-z]{8,40}-[\w-]{43}|whsec_[A-Za-z0-9+/=_-]{8,}|rwt_[A-Za-z0-9_-]{16,}|(?<=\bbearer )\S{6,}|(?<=\bbasic )\S{6,}"
    r"|\bsk-[A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{16,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}",
    re.IGNORECASE,
)
"""Texts that look like a secret of any party."""
SHORTEST = 4
"""Shorter values are not redacted, as they occur in many words."""
FRAGMENT = 8
"""So many characters of a secret in a row are redacted, from whichever part of it they are."""
_PROBE = 4
_STRIDE = FRAGMENT - _PROBE + 1
"""Every fragment contains a probe at a multiple of the stride, so the other places are skipped."""
HTTP_LOGGERS = (
    *(f"httpcore2.{name}" for name in ("connection", "http11", "http2", "proxy", "socks")),
    *(f"httpcore.{name}" for name in ("connection", "http11", "http2", "proxy", "socks")),
    *("httpx2", "httpx", "h11", "urllib3.connectionpool", "aiohttp.client"),
)
"""Loggers of HTTP libraries, whose lines may quote headers and bodies."""


def check_headers(headers: Mapping[str, str]) -> None:
    """Check the secret headers of an endpoint.

    Raises:
        ConfigurationError: A name is invalid, reserved or given twice, or a value contains
            characters that a header cannot carry. The message does not show a value.
    """
    names: dict[str, str] = {}
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name):
            raise ConfigurationError(f"{name[:64]!r} is not the name of a header")
        if _FORBIDDEN.fullmatch(name.lower()):
            raise ConfigurationError(f"header {name!r} is set by this client and cannot be given")
        known = names.setdefault(name.lower(), name)
        if known != name:
            raise ConfigurationError(
                f"{known!r} and {name!r} are the same header, as case does not count in names; give one"
            )
        if not value.isascii() or any(
            (ord(ch) < 0x20 and ch != "\t") or ch == "\x7f" for ch in value
        ):
            raise ConfigurationError(
                f"the value of header {name!r} contains a line break, a control character or a non-ASCII character"
            )
        if value != value.strip():
            raise ConfigurationError(f"the value of header {name!r} begins or ends with a space")


class Redactor:
    """Removes known secrets from texts: in any case, cut off, encoded, or spread out.

    `dar.rewards.http.disguises` says in which forms they are found.

    Args:
        secrets: Signing secrets.
        headers: Values of secret headers; a scheme like ``Bearer`` before a token stays readable.
        urls: URLs of the endpoint, or their parts after the host; the values of their queries are
            secrets.
    """

    def __init__(
        self, secrets: Iterable[str] = (), headers: Iterable[str] = (), *urls: str
    ) -> None:
        values: set[str] = set()
        for url in urls:
            pairs = url.partition("?")[2].split("&")
            values |= {pair.partition("=")[2] or pair for pair in pairs}
        values |= {unquote_plus(value) for value in values}
        for secret in secrets:
            values |= {secret, secret.removeprefix("whsec_")}
        for value in headers:
            words = value.split(" ")
            values.add(words[1] if len(words) == 2 else value)
            if len(words) == 2 and words[0].lower() == "basic":
                values |= _user_and_password(words[1])
        found = {form for value in values if len(value) >= SHORTEST for form in forms(value)}
        self._plain = _Needles({_lowered(form) for form in found})
        self._reduced = _Needles({reduced(form) for form in found})
        with _lock:
            _live.add(self)

    def __call__(self, text: str) -> str:
        """Remove secrets from ``text``."""
        parts: list[str] = []
        end = 0
        for start, stop in sorted(self._spans(text)):
            if start > end or not parts:
                parts += (text[end:start], REDACTED)
            end = max(end, stop)
        return _SHAPES.sub(REDACTED, "".join([*parts, text[end:]]))

    def in_json(self, value: Any) -> Any:  # noqa: ANN401 - a JSON value of any shape
        """Remove secrets from the strings and names of a JSON value."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, list):
            return [self.in_json(item) for item in value]
        if isinstance(value, dict):
            return {self(name): self.in_json(item) for name, item in value.items()}
        return value

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where secrets are in ``text``; spans may overlap."""
        for start, stop, _ in self._plain.spans(_lowered(text)):
            yield start, stop
        for reading in readings(text):
            places: list[tuple[int, int]] = []
            for start, stop, is_whole in self._reduced.spans(reading.text):
                places = places or reading.places()
                span = places[start][0], places[stop - 1][1]
                # A short secret may also be the end of one word and the start of the next.
                if not is_whole or span[1] - span[0] >= 2 * (stop - start) - 1:
                    yield span


class _Needles:
    """Texts that are searched for together.

    Args:
        forms: The texts, in lower case.
    """

    def __init__(self, forms: Iterable[str]) -> None:
        given = [form for form in forms if len(form) >= SHORTEST]
        self._short = tuple(form for form in given if len(form) < FRAGMENT)
        long = [form for form in given if len(form) >= FRAGMENT]
        self._fragments = _pieces(long, FRAGMENT)
        self._probes = _pieces(long, _PROBE)

    def spans(self, text: str) -> Iterator[tuple[int, int, bool]]:
        """Where they are in ``text``: start, end, and whether a short one is there as a whole."""
        for form in self._short:
            start = text.find(form)
            while start >= 0:
                yield start, start + len(form), True
                start = text.find(form, start + len(form))
        last = len(text) - FRAGMENT
        for at in range(0, len(text) - _PROBE + 1, _STRIDE):
            if text[at : at + _PROBE] not in self._probes:
                continue
            for start in range(max(0, at - _STRIDE + 1), min(at, last) + 1):
                if text[start : start + FRAGMENT] in self._fragments:
                    yield start, start + FRAGMENT, False


def _pieces(forms: Iterable[str], length: int) -> frozenset[str]:
    return frozenset(
        form[at : at + length] for form in forms for at in range(len(form) - length + 1)
    )


_live: "WeakSet[Redactor]" = WeakSet()
_lock = threading.Lock()


def redact_all(text: str) -> str:
    """Remove the secrets of every endpoint of this process from ``text``."""
    with _lock:
        redactors = list(_live)
    for redact in redactors:
        text = redact(text)
    return text


def _lowered(text: str) -> str:
    """``text`` in lower case, with as many characters as before."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := ch.lower()) == 1 else ch for ch in text)


def _user_and_password(encoded: str) -> set[str]:
    """What HTTP Basic authentication encodes; empty if it is something else."""
    try:
        decoded = base64.b64decode(encoded, validate=True).decode()
    except ValueError:
        return set()
    return {decoded, decoded.partition(":")[2]}


class RedactingFormatter(logging.Formatter):
    """Formats as another formatter does, tracebacks included, and removes secrets.

    Args:
        inner: Formats the records.
        redact: Removes the secrets.
    """

    def __init__(self, inner: logging.Formatter, redact: Redactor) -> None:
        super().__init__()
        self._inner = inner
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """See the base class."""
        return self._redact(self._inner.format(record))


class _WithoutSecrets(logging.Filter):
    """Removes secrets from the lines of HTTP libraries, and drops lines that list all headers."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text.startswith("receive_response_headers.complete"):
            return False
        record.msg, record.args = redact_all(text), None
        if record.exc_info:
            record.exc_text = redact_all(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        return True


_FILTER = _WithoutSecrets()


def filter_http_logs() -> None:
    """Install the filter on the loggers of HTTP libraries, unless it is installed."""
    for name in HTTP_LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)
