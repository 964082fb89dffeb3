"""How the worker writes what it sends: JSON, with U+FFFD in place of NUL, which no text column of a database holds.

Models and reward services may well say a NUL, and so may a crash's log.
"""

from pydantic import BaseModel
from pydantic_core import to_json

NUL, REPLACEMENT = "\0", "\N{REPLACEMENT CHARACTER}"
_ESCAPED_NUL = b"\\u0000"


def encode(model: BaseModel) -> bytes:
    """``model`` as JSON without NUL, in its texts and in the names of what it holds."""
    content = model.model_dump_json().encode()
    if _ESCAPED_NUL not in content:
        return content
    return to_json(_without_nul(model.model_dump(mode="json")))


def _without_nul(value: object) -> object:
    if isinstance(value, str):
        return value.replace(NUL, REPLACEMENT)
    if isinstance(value, dict):
        return {_without_nul(key): _without_nul(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nul(item) for item in value]
    return value
