"""Secrets of a reward endpoint: which headers may carry them, and their removal from texts.

A service may return anything that it was sent, in an error page, a header or a sample's feedback.
Texts from a service pass through a `Redactor` before they reach a log, an error or the sample view.
"""

import base64
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from dar.errors import ConfigurationError

REDACTED = "[redacted]"
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
"""A header name (RFC 9110)."""
_FORBIDDEN = re.compile(
    r"host|content-.*|transfer-encoding|connection|keep-alive|proxy-.*|te|trailer|upgrade|expect"
    r"|accept|accept-encoding|user-agent|traceparent|webhook-.*|idempotency-key|x-dar-.*"
)
"""Headers that frame, sign or identify a request; only this client sets them."""
_SHAPES = re.compile(
    r"whsec_[A-Za-z0-9+/=_-]{8,}|rwt_[A-Za-z0-9_-]{16,}|(?<=\bbearer )\S{6,}|(?<=\bbasic )\S{6,}",
    re.IGNORECASE,
)
"""Texts that look like a secret of any party."""
SHORTEST = 4
"""Shorter values are not redacted, as they occur in many words."""
_HEAD = 8
"""A secret cut off after this many characters is still redacted."""


def check_headers(headers: Mapping[str, str]) -> None:
    """Check the secret headers of an endpoint.

    Raises:
        ConfigurationError: A name is invalid or reserved, or a value contains characters that a
            header cannot carry. The message does not show a value.
    """
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name):
            raise ConfigurationError(f"{name[:64]!r} is not the name of a header")
        if _FORBIDDEN.fullmatch(name.lower()):
            raise ConfigurationError(f"header {name!r} is set by this client and cannot be given")
        if not value.isascii() or any(
            (ord(ch) < 0x20 and ch != "\t") or ch == "\x7f" for ch in value
        ):
            raise ConfigurationError(
                f"the value of header {name!r} contains a line break, a control character or a non-ASCII character"
            )
        if value != value.strip():
            raise ConfigurationError(f"the value of header {name!r} begins or ends with a space")


class Redactor:
    """Removes known secrets from texts, also when cut off or base64-, URL- or JSON-encoded.

    Args:
        secrets: Signing secrets.
        headers: Values of secret headers; a scheme like ``Bearer`` before a token stays readable.
        url: URL of the endpoint, or its part after the host; the values of its query are secrets.
    """

    def __init__(
        self, secrets: Iterable[str] = (), headers: Iterable[str] = (), url: str = ""
    ) -> None:
        pairs = url.partition("?")[2].split("&")
        values = {pair.partition("=")[2] or pair for pair in pairs}
        for secret in secrets:
            values |= {secret, secret.removeprefix("whsec_")}
        for value in headers:
            words = value.split(" ")
            values.add(words[1] if len(words) == 2 else value)
        forms = {form for value in values if len(value) >= SHORTEST for form in _forms(value)}
        self._forms = tuple(forms)

    def __call__(self, text: str) -> str:
        """Remove secrets from ``text``."""
        spans = sorted(span for form in self._forms for span in _spans(text, form))
        parts: list[str] = []
        end = 0
        for start, stop in spans:
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


def _forms(value: str) -> set[str]:
    encoded = base64.b64encode(value.encode()).decode()
    return {
        value,
        quote(value, safe=""),
        quote(value),
        value.replace("/", "\\/"),
        json.dumps(value)[1:-1],
        encoded.rstrip("="),
    }


def _spans(text: str, secret: str) -> Iterator[tuple[int, int]]:
    """Occurrences of ``secret``, or of at least its first `_HEAD` characters, in ``text``."""
    head = secret[:_HEAD]
    start = text.find(head)
    while start >= 0:
        end = start + len(head)
        while end < len(text) and end - start < len(secret) and text[end] == secret[end - start]:
            end += 1
        yield start, end
        start = text.find(head, end)


class _NoHeaders(logging.Filter):
    """Keeps headers of answers, which may repeat sent secrets, out of the HTTP library's log."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("receive_response_headers.complete")


def silence_header_logs() -> None:
    """Install the filter, unless it is installed."""
    log = logging.getLogger("httpcore2.http11")
    if not any(isinstance(known, _NoHeaders) for known in log.filters):
        log.addFilter(_NoHeaders())
