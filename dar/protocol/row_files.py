"""Rows in order: those of a data set in memory, and those of a JSON Lines file.

Upload, `dar.DARTrainer` and ``dar train`` all read rows through here, so each accepts the same rows
and rejects a row with the same words.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from dar.errors import InvalidRequestError, Problem
from dar.protocol.row_values import (
    MAX_COLUMNS,
    MAX_NAME,
    check_name,
    check_values,
    column_too_deep,
    column_with_long_integer,
    is_broken,
    long_integer,
    too_deep,
)
from dar.protocol.rows import (
    OfflineRow,
    Row,
    RowError,
    check_format,
    completions_of,
    form_of,
    kind_of_value,
)

ALL_NULL = (
    "every reward is null, which means that it is missing, so there is nothing to train on; fill "
    "in 'reward' or 'rewards', or send prompts alone with a reward source"
)
MAX_PROBLEMS = 50
"""Most problems of a file that are reported; reading stops there."""
WHITESPACE = (" ", "\t", "\r", "\n")
"""What may stand between the parts of JSON."""
MAX_ROW_BYTES = 4 * 1024**2
"""Longest line of a file."""


class OfflineRewards:
    """Whether rows with completions have rewards to train on; every row of a data set is added."""

    def __init__(self) -> None:
        self._rows = 0
        self._scored = 0
        self._single = 0
        self._has_pair = False

    def add(self, row: OfflineRow) -> None:
        scored = sum(reward is not None for reward in row.rewards)
        self._rows += 1
        self._scored += scored
        self._single += scored if len(row.rewards) == 1 else 0
        self._has_pair = self._has_pair or scored > 1

    @property
    def are_null(self) -> bool:
        """Whether there are rows, and none of them has a reward."""
        return self._rows > 0 and self._scored == 0

    @property
    def are_comparable(self) -> bool:
        """Whether a completion can be compared with another one.

        It is compared with those of its row; the single ones of different rows, with each other.
        """
        return self._has_pair or self._single > 1


class RowChecker:
    """Checks the rows of one data set in order: each alone, and its format against the first."""

    def __init__(self) -> None:
        self.rewards = OfflineRewards()
        self._names: set[str] = set()
        self._first_number: int | None = None
        self._first_completions: list[str] = []
        self._first_form: tuple[str, ...] = ()

    def check(self, row: object, number: int) -> None:
        """Check the next row.

        Args:
            row: The row.
            number: Its number, from 1.

        Raises:
            RowError: It cannot be used, or has another format than the first row.
        """
        if not isinstance(row, Mapping):
            raise _no_object(row)
        self._check_names(row)
        check_values(row)
        if self._first_number is not None:
            self._compare_completions(row)
        found = check_format(row)
        form = form_of(row)
        if self._first_number is None:
            self._first_number, self._first_form = number, form
            self._first_completions = completions_of(row)
        elif form != self._first_form:
            raise RowError(
                f"the row has {', '.join(form)}, but row {self._first_number} has "
                f"{', '.join(self._first_form)}: keep to one format",
                code="mixed_format",
            )
        if found is not None:
            self.rewards.add(found)

    def lacks(self, problems: list[Problem]) -> list[Problem]:
        """What all rows together lack; ``problems`` are those of single rows."""
        if problems or not self.rewards.are_null:
            return []
        return [Problem(ALL_NULL, "file", "no_rewards")]

    def _check_names(self, row: Row) -> None:
        if row.keys() <= self._names:
            return
        if len(row) <= MAX_COLUMNS:  # names of a larger row are not even collected
            new = [name for name in row if name not in self._names]
            for name in new:
                check_name(name)
            if len(self._names) + len(new) <= MAX_COLUMNS:
                self._names.update(new)
                return
        raise RowError(
            f"the data set has more than {MAX_COLUMNS} different columns; put what belongs "
            "together into one column, as an object",
            code="too_many_columns",
        )

    def _compare_completions(self, row: Row) -> None:
        """Compare whether there are completions, before anything is said about their format."""
        given, first = completions_of(row), self._first_completions
        if given and not first:
            raise RowError(
                f"the row has the column {given[0]!r}, but row {self._first_number} has no "
                "completions: remove the column, or keep to one format",
                given[0],
                "mixed_format",
            )
        if first and not given:
            raise RowError(
                f"the row has no completions, but row {self._first_number} has {first[0]!r}: "
                "keep to one format",
                first[0],
                "mixed_format",
            )


def lines_of(source: BinaryIO) -> Iterator[bytes]:
    """The lines of a file. Of one that is too long, only the beginning is read into memory."""
    while line := source.readline(MAX_ROW_BYTES + 1):
        yield line
        while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            line = source.readline(MAX_ROW_BYTES + 1)


def read_lines(lines: Iterable[bytes], problems: list[Problem]) -> Iterator[dict[str, Any]]:
    """The rows of JSON Lines that can be used.

    Args:
        lines: Lines with their ends.
        problems: Gets a problem for each other line; reading stops after `MAX_PROBLEMS`.
    """
    checker = RowChecker()
    blank_at: int | None = None
    number = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            blank_at = blank_at or number
            continue
        if blank_at is not None:
            problems.append(_problem(blank_at, RowError("the row is blank; remove it")))
            blank_at = None
        try:
            row = parse_row(line)
            checker.check(row, number)
        except RowError as error:
            problems.append(_problem(number, error))
        else:
            yield row
        if len(problems) >= MAX_PROBLEMS:
            return
    if number == 0 or blank_at == 1:
        problems.append(
            Problem("the file has no rows; give one JSON object per line", "file", "empty_file")
        )
    problems += checker.lacks(problems)


def read_array(text: bytes, problems: list[Problem]) -> Iterator[dict[str, Any]]:
    """The rows of a JSON array that can be used; see `read_lines`."""
    checker = RowChecker()
    try:
        rows = _parsed(text)
    except RowError as error:
        number = _unreadable_item(text)
        problems.append(Problem(error.message, error.param, error.error_code, number))
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        try:
            checker.check(row, number)
        except RowError as error:
            problems.append(_problem(number, error))
        else:
            yield row
        if len(problems) >= MAX_PROBLEMS:
            return
    if rows == []:
        problems.append(Problem("the file has no rows", "file", "empty_file"))
    problems += checker.lacks(problems)


def _unreadable_item(content: bytes) -> int | None:
    """Number of the first item of a JSON array that cannot be read; None: no item is at fault."""
    text = content.decode("utf-8", "replace")
    place, number = text.find("[") + 1, 1
    try:
        while True:
            _, place = _DECODER.raw_decode(text, _after_space(text, place))
            place = _after_space(text, place)
            if text[place : place + 1] != ",":
                return None
            place, number = place + 1, number + 1
    except (RowError, ValueError, RecursionError):
        return number


def _after_space(text: str, place: int) -> int:
    while text[place : place + 1] in WHITESPACE:
        place += 1
    return place


def parse_row(line: bytes) -> dict[str, Any]:
    """A line of JSON Lines as a row, which is not checked.

    Raises:
        RowError: It is not a JSON object.
    """
    if len(line) > MAX_ROW_BYTES:
        raise RowError(f"the row is longer than {MAX_ROW_BYTES:,} bytes", code="row_too_long")
    row = _parsed(line)
    if not isinstance(row, dict):
        raise _no_object(row)
    return row


def invalid_file(
    problems: list[Problem], *, name: str = "", param: str = "file", end: str = ""
) -> InvalidRequestError:
    """The error about a file with problems.

    Args:
        problems: All that were found.
        name: Name of the file, if the message needs it.
        param: The parameter that named the file.
        end: Last part of the message.
    """
    first = problems[0]
    places = [name] if name else []
    if first.row is not None:
        places.append(f"row {first.row}")
    shown = f"at least {len(problems)}" if len(problems) >= MAX_PROBLEMS else str(len(problems))
    count = f" ({shown} rows are wrong, see errors)" if len(problems) > 1 else ""
    where = ", ".join(places)
    return InvalidRequestError(
        f"{where}{': ' if where else ''}{first.message}{count}{end}",
        param=param,
        code="invalid_training_file",
        problems=problems,
    )


def _no_object(row: object) -> RowError:
    return RowError(
        f"the row must be an object with its columns, but it is {kind_of_value(row)}; give one "
        "object per row",
        code="not_an_object",
    )


def _problem(number: int, error: RowError) -> Problem:
    return Problem(error.message, error.param, error.error_code, number)


def _parsed(content: bytes) -> object:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            f"byte {error.start + 1} is not UTF-8; save the file as UTF-8", code="not_utf8"
        ) from None
    if text.startswith("\ufeff"):
        raise RowError(
            "the file starts with a byte order mark; save it as UTF-8 without one", code="not_json"
        )
    try:
        value: object = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RowError(
            f"not JSON: {error.msg} at character {error.pos + 1}", code="not_json"
        ) from None
    except RecursionError:
        raise too_deep(column_too_deep(text)) from None
    except ValueError:  # int() refuses thousands of digits
        raise long_integer(column_with_long_integer(text)) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            shown = f"{name[:80]!r}{'…' if len(name) > 80 else ''}"
            is_sane = len(name) <= MAX_NAME and not is_broken(name)
            raise RowError(
                f"the key {shown} occurs twice; remove one",
                name if is_sane else None,
                "duplicate_key",
            )
        seen.add(name)
    raise AssertionError("a dictionary is smaller only if a key is repeated")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in {float("inf"), float("-inf")}:
        raise RowError(
            f"{digits[:40]}{'…' if len(digits) > 40 else ''} is too large for a number",
            code="finite_number",
        )
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite)
"""One for all rows: to make one takes longer than to parse a short row."""
