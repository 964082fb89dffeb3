"""The columns that a row of any format may have: their names, texts, numbers and depth.

What is refused here could not be tokenized, sent to a reward service or stored later.
"""

import math
import re
from collections.abc import Iterator, Mapping

from dar.protocol.rows import (
    ARGUMENTS,
    KINDS,
    REWARD_COLUMNS,
    Row,
    RowError,
    completions_of,
    kind_of_value,
)

MAX_COLUMNS = 256
"""Most columns of a data set."""
MAX_NAME = 256
"""Longest name of a column, in characters."""
MAX_DEPTH = 64
"""Most lists and objects inside each other in a column; parsers of reward services have limits."""
MAX_DIGITS = 4300
"""Most digits of an integer; Python parses no more."""
RESERVED = frozenset(ARGUMENTS) - KINDS.keys()
"""Names that no column may have. Completions have rules of their own."""
READ_ONE_BY_ONE = frozenset({"prompt_ids", "completion_ids", "behavior_logps"})
"""Columns of numbers that are checked where they are read."""
_MAX_BITS = int(MAX_DIGITS * math.log2(10))
_TEXT = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_PIECE = re.compile(
    rf"(?P<key>{_TEXT}(?=\s*:))|{_TEXT}|[\[\]{{}}]|\d{{{MAX_DIGITS + 1},}}(?![.eE])"
)
"""What `_pieces` looks at in JSON: keys, other texts, brackets, and integers that are too long."""


def check_values(row: Row) -> None:
    """Check the values of a row, whatever its format.

    Raises:
        RowError: A column has a value that cannot be used.
    """
    is_offline = bool(completions_of(row))
    for name, value in row.items():
        if value is None or (isinstance(value, str) and value.isascii()):
            continue  # nearly all
        # Where completions are given, a reward may be NaN or infinite: then it is missing.
        if name not in READ_ONE_BY_ONE and not (is_offline and name in REWARD_COLUMNS):
            check_value(value, name)


def check_name(name: object) -> None:
    """Check the name of a column.

    Raises:
        RowError: It is not a text, too long or reserved, or cannot be stored.
    """
    if not isinstance(name, str):
        raise RowError(f"the name of a column must be a text, but it is {kind_of_value(name)}")
    if len(name) > MAX_NAME:
        raise RowError(
            f"the name of the column {name[:40]!r}… has {len(name):,} characters, but may have "
            f"{MAX_NAME}; shorten it",
            code="name_too_long",
        )
    if "\0" in name or is_broken(name):
        raise RowError(
            f"the name of the column {name!r} holds NUL or half of a character (a lone "
            "surrogate); rename it",
            code="not_utf8",
        )
    if name in RESERVED:
        hint = " (to 'prompt', if it is the prompt)" if name == "prompts" else ""
        raise RowError(
            f"the column {name!r} has the name of an argument that reward functions get, which "
            f"would replace it; rename the column{hint}",
            name,
            "reserved_column",
        )


def check_value(value: object, name: str) -> None:
    """Check a value and everything in it.

    Args:
        value: The value.
        name: Its column, for the error.

    Raises:
        RowError: It is nested too deeply, a text in it is not Unicode, or a number is not finite
            or has too many digits.
    """
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if isinstance(one, str):
            if is_broken(one):
                raise RowError(
                    f"the column {name!r} holds half of a character (a lone surrogate, like "
                    "\\ud83d), which is not text; replace it",
                    name,
                    "not_utf8",
                )
        elif isinstance(one, float):
            if not math.isfinite(one):
                raise RowError(
                    f"the column {name!r} holds {one}, which JSON cannot carry; send null instead",
                    name,
                    "finite_number",
                )
        elif isinstance(one, int):
            if one.bit_length() > _MAX_BITS:
                raise long_integer(name)
        elif isinstance(one, Mapping | list | tuple):
            if depth == MAX_DEPTH:
                raise too_deep(name)
            items = [*one.keys(), *one.values()] if isinstance(one, Mapping) else one
            waiting += [(item, depth + 1) for item in items]


def is_broken(text: str) -> bool:
    """Whether a text holds a lone surrogate, which no encoding can carry."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def too_deep(name: str | None) -> RowError:
    """The error about a value that is nested too deeply; ``name`` is its column, if known."""
    return RowError(
        f"{_subject(name)} is nested over {MAX_DEPTH} levels deep; flatten it", name, "too_deep"
    )


def long_integer(name: str | None) -> RowError:
    """The error about an integer with too many digits; ``name`` is its column, if known."""
    return RowError(
        f"{_subject(name)} holds an integer of over {MAX_DIGITS:,} digits; send it as a text",
        name,
        "integer_too_large",
    )


def _subject(name: str | None) -> str:
    return "the row" if name is None else f"the column {name!r}"


def column_too_deep(text: str) -> str | None:
    """The column of a JSON object that is nested too deeply; None: not found."""
    return next((key for key, depth, _ in _pieces(text) if depth > MAX_DEPTH + 1), None)


def column_with_long_integer(text: str) -> str | None:
    """The column of a JSON object that holds an integer with too many digits; None: not found."""
    return next((key for key, _, piece in _pieces(text) if piece.isdigit()), None)


def _pieces(text: str) -> Iterator[tuple[str | None, int, str]]:
    """Brackets and long integers of a JSON object, with their column and depth.

    A parser that has failed does not say in which column. This reads the text once more.
    """
    key: str | None = None
    depth = 0
    for found in _PIECE.finditer(text):
        piece = found.group()
        if depth == 1 and found["key"] is not None:
            key = piece[1:-1] if len(piece) <= MAX_NAME else None
        if piece[0] != '"':
            depth += (piece in "[{") - (piece in "]}")
            yield key, depth, piece
