"""Cells of a table, as files and data sets of many libraries give them."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any


def is_number(value: object) -> bool:
    """Whether it is a number, which a boolean is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_list(value: object) -> list[Any] | None:
    """A list; also of an array, as tables in other formats give them. None: it is no list."""
    if isinstance(value, str | bytes | Mapping):
        return None
    if isinstance(value, Sequence):
        return list(value)
    plain = getattr(value, "tolist", None)
    made = plain() if callable(plain) else None
    return made if isinstance(made, list) else None


def kind_of_value(value: object) -> str:
    """What a value is, in words."""
    names = {str: "a text", bool: "a boolean", type(None): "null"}
    if isinstance(value, Mapping):
        return "an object"
    items = as_list(value)
    if items is not None:
        return "a list" if items else "an empty list"
    return names.get(type(value), "a number")
