"""Forms that a service may give to a secret, and texts without what may stand between its letters.

`forms` lists what becomes of a value when a program encodes it. `readings` turns a text back: every
reading is the text in letters and digits alone, first as it is, then with its escapes decoded. So a
secret is found in UTF-16, one letter a line, with invisible characters in it, as character
references or in full-width letters. Not covered is what only a program can read back: encryption,
compression, base 85, or letters in another order than forwards or backwards.
"""

import base64
import html
import json
import re
import unicodedata
from collections.abc import Iterator
from urllib.parse import quote

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


def forms(value: str) -> set[str]:
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


def reduced(text: str) -> str:
    """The ASCII letters and digits of ``text`` in lower case, whatever their width or style."""
    plain = text if text.isascii() else unicodedata.normalize("NFKD", text)
    return _OTHER.sub("", plain.lower())


class Reading:
    """A text in letters and digits alone.

    Args:
        stages: The text, then what it is after each round of decoding.
    """

    def __init__(self, stages: tuple[str, ...]) -> None:
        self._stages = stages
        self.text = reduced(stages[-1])

    def places(self) -> list[tuple[int, int]]:
        """Where each letter of `text` comes from in the first stage: start and end."""
        places = [(at, at + 1) for at in range(len(self._stages[0]))]
        for stage in self._stages[:-1]:
            places = _places_after(stage, places)
        last = self._stages[-1]
        letters = zip(last, places, strict=True)
        if last.isascii():
            return [place for letter, place in letters if letter.isalnum()]
        return [place for letter, place in letters for _ in reduced(letter)]


def readings(text: str) -> Iterator[Reading]:
    """The readings of ``text``, beginning with the text as it is."""
    stages = (text,)
    yield Reading(stages)
    for _ in range(ROUNDS):
        if not _MAY_HOLD_ESCAPES.search(stages[-1]):
            return
        decoded = _ESCAPE.sub(_decoded, stages[-1])
        if decoded == stages[-1]:
            return
        stages = (*stages, decoded)
        yield Reading(stages)


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
