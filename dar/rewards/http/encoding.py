"""JSON as it is sent to reward services: every text and every integer has a way into it."""

import contextlib
import json
import re
from collections.abc import Mapping

import orjson

_SURROGATE = re.compile("[\ud800-\udfff]")


def to_json(content: object) -> bytes:
    """``content`` as JSON. Lone surrogates, which JSON cannot carry, become U+FFFD.

    Raises:
        TypeError: It holds a value that JSON has no word for.
    """
    with contextlib.suppress(orjson.JSONEncodeError):
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    readable = without_surrogates(content)
    with contextlib.suppress(orjson.JSONEncodeError):
        return orjson.dumps(readable, option=orjson.OPT_SERIALIZE_NUMPY)
    # orjson stops at integers of 64 bits, JSON does not.
    return json.dumps(readable, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def readable_text(text: str) -> str:
    """``text`` with U+FFFD for every lone surrogate, so that it has a form in UTF-8."""
    return _SURROGATE.sub("\ufffd", text)


def without_surrogates(value: object) -> object:
    """``value`` with U+FFFD for every lone surrogate in its texts, however deep they lie."""
    if isinstance(value, str):
        return readable_text(value)
    if isinstance(value, Mapping):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_surrogates(item) for item in value]
    return value
