"""Secrets of a reward endpoint: which headers may carry them, and their removal from texts.

A service may return anything that it was sent, in an error page, a header or a sample's feedback.
Texts from a service pass through a `Redactor` before they reach a log, an error or the sample view.

A secret is searched for in every form that a program may encode it to, and in readings of a text:
its letters and digits alone, first as they are, then with its escapes decoded. So a secret is found
in UTF-16, one letter a line, with invisible characters in it, as character references or in
full-width letters. Not covered is what only a program can read back: encryption, compression, base
85, or letters in another order than forwards or backwards.
"""

import base64
import html
import json
import logging
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any
from urllib.parse import quote, unquote_plus
from weakref import WeakSet

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
    r"dar-(?:at|sk|wk)-[0-9A-Za-z]{8,40}-[\w-]{43}|whsec_[A-Za-z0-9+/=_-]{8,}|rwt_[A-Za-z0-9_-]{16,}|(?<=\bbearer )\S{6,}|(?<=\bbasic )\S{6,}"
    r"|\bsk-[A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{16,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}",
    re.IGNORECASE,
)
"""Texts that look like a secret of any party."""
_OWN_KEY = re.compile(r"dar-(?:at|sk|wk)-[0-9A-Za-z]{8,40}-([\w-]{43})", re.ASCII)
"""A key of this product. Before its random part stands an id, which is no secret: other ids of the
same time begin like it."""
SHORTEST = 4
"""Shorter values are not redacted, as they occur in many words."""
FRAGMENT = 8
"""So many characters of a secret in a row are redacted, from whichever part of it they are."""
_PROBE = 4
_STRIDE = FRAGMENT - _PROBE + 1
"""Every fragment contains a probe at a multiple of the stride, so the other places are skipped."""
ROUNDS = 3
"""Escapes within escapes are decoded this often."""
_OTHER = re.compile(r"[^a-z0-9]+")
_ESCAPE = re.compile(
    r"(?-i:\\U(?P<u3>[0-9a-fA-F]{8}))|%u(?P<u1>[0-9a-f]{4})|%(?P<x1>[0-9a-f]{2})|\\u\{?(?P<u2>[0-9a-f]{4})\}?|\\x(?P<x2>[0-9a-f]{2})"
    r"|0x(?P<x3>[0-9a-f]{2})|=(?P<x4>[0-9a-f]{2})|\\(?P<octal>[0-7]{3})|\\(?P<control>[abefnrtv0])"
    r"|(?P<entity>&#x?[0-9a-f]{1,8};?|&[a-z0-9]{2,31};)|(?P<markup><[^<>]{1,80}>|[\x1b\x9b\s]\[[0-9;]{0,16}[a-z])",
    re.IGNORECASE,
)
"""Escapes of URLs, JSON, C, quoted-printable, HTML; and tags and colours, which show nothing."""
_MAY_HOLD_ESCAPES = re.compile(r"[%\\&<=\x1b\x9b]|0x|\s\[", re.IGNORECASE)
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
            characters that a header cannot carry. The message does not show a value, also where it
            was written into the name.
    """
    names: dict[str, str] = {}
    for name, value in headers.items():
        check_header_name(name)
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


def check_header_name(name: str) -> None:
    """Check that ``name`` can be the name of a header.

    Raises:
        ConfigurationError: It cannot. The message shows at most what stands before a colon.
    """
    if _TOKEN.fullmatch(name):
        return
    before, colon, _ = name.partition(":")
    if colon and _TOKEN.fullmatch(before):
        raise ConfigurationError(
            f"the name of the header {before[:32]!r} has a colon; its value does not belong there"
        )
    raise ConfigurationError(
        "the name of a header is empty, longer than 128 characters, or has a space or another "
        "character that no name has; write only letters, digits and hyphens"
    )


class Redactor:
    """Removes known secrets from texts: in any case, cut off, encoded, or spread out.

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
        values = {own[1] if (own := _OWN_KEY.fullmatch(value)) else value for value in values}
        found = {form for value in values if len(value) >= SHORTEST for form in _forms(value)}
        self._plain = _Needles({_lowered(form) for form in found})
        self._reduced = _Needles({_reduced(form) for form in found})
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
        for reading in _readings(text):
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
        self._long = tuple(form for form in given if len(form) >= FRAGMENT)

    # Most needles are never searched for, and their pieces are thousands.

    @cached_property
    def _fragments(self) -> frozenset[str]:
        return _pieces(self._long, FRAGMENT)

    @cached_property
    def _probes(self) -> frozenset[str]:
        return _pieces(self._long, _PROBE)

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


def _forms(value: str) -> set[str]:
    """``value``, and what becomes of it when it is encoded or made a name."""
    raw = value.encode()
    return {
        value,
        value[::-1],
        quote(value, safe=""),
        quote(value),
        html.escape(value),
        value.replace("/", "\\/"),
        json.dumps(value)[1:-1],
        repr(value)[1:-1],
        re.sub(r"[^A-Za-z0-9_.-]", "_", value),
        re.sub(r"[^a-z0-9_]", "_", value.lower()),
        raw.hex(),
        " ".join(map(str, raw)),
        *(form for shift in range(3) for form in _base64(raw, shift)),
        *(_base32(raw, shift) for shift in range(5)),
    }


def _base64(raw: bytes, shift: int) -> tuple[str, str]:
    """The part of an encoded text that is certain where ``raw`` is in it, after ``shift`` bytes."""
    encoded = base64.b64encode(bytes(shift) + raw)
    start = (0, 2, 3)[shift]
    certain = encoded[start : -4 if (shift + len(raw)) % 3 else None].decode()
    tail = encoded[len(encoded) - 4 :].rstrip(b"=").decode()
    whole = certain if (shift + len(raw)) % 3 == 0 else certain + tail[:-1]
    return whole, whole.replace("+", "-").replace("/", "_")


def _base32(raw: bytes, shift: int) -> str:
    """The same in base 32: a letter holds five bits."""
    encoded = base64.b32encode(bytes(shift) + raw).decode()
    return encoded[-(-8 * shift // 5) : 8 * (shift + len(raw)) // 5]


def _reduced(text: str) -> str:
    """The ASCII letters and digits of ``text`` in lower case, whatever their width or style."""
    plain = text if text.isascii() else unicodedata.normalize("NFKD", text)
    return _OTHER.sub("", plain.lower())


class _Reading:
    """A text in letters and digits alone.

    Args:
        stages: The text, then what it is after each round of decoding.
    """

    def __init__(self, stages: tuple[str, ...]) -> None:
        self._stages = stages
        self.text = _reduced(stages[-1])

    def places(self) -> list[tuple[int, int]]:
        """Where each letter of `text` comes from in the first stage: start and end."""
        places = [(at, at + 1) for at in range(len(self._stages[0]))]
        for stage in self._stages[:-1]:
            places = _places_after(stage, places)
        last = self._stages[-1]
        letters = zip(last, places, strict=True)
        if last.isascii():
            return [place for letter, place in letters if letter.isalnum()]
        return [place for letter, place in letters for _ in _reduced(letter)]


def _readings(text: str) -> Iterator[_Reading]:
    """The readings of ``text``, beginning with the text as it is."""
    stages: tuple[str, ...] = (text,)
    yield _Reading(stages)
    for _ in range(ROUNDS):
        if not _MAY_HOLD_ESCAPES.search(stages[-1]):
            return
        decoded = _ESCAPE.sub(_decoded, stages[-1])
        if decoded == stages[-1]:
            return
        stages = (*stages, decoded)
        yield _Reading(stages)


def _places_after(stage: str, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Places of the characters of ``stage`` once its escapes are decoded."""
    found: list[tuple[int, int]] = []
    end = 0
    for match in _ESCAPE.finditer(stage):
        found += places[end : match.start()]
        whole = (places[match.start()][0], places[match.end() - 1][1])
        found += [whole] * len(_decoded(match))
        end = match.end()
    return found + places[end:]


def _decoded(match: re.Match[str]) -> str:
    kind, digits = match.lastgroup, match[match.lastgroup or 0]
    if kind == "markup":
        return ""
    if kind == "control":
        return " "
    if kind == "entity":
        return html.unescape(digits if digits.endswith(";") else f"{digits};")
    number = int(digits, 8 if kind == "octal" else 16)
    return chr(number) if number < 0x110000 else " "


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
