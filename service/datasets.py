"""Reading an uploaded training file row by row: JSONL of prompts, with any further columns.

All that is wrong is found in one pass over the file (the first `MAX_PROBLEMS` are told), which is copied and hashed in
the same pass and never held in memory.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dar.errors import InvalidRequestError, Problem
from dar.protocol.spec import JobSpec

MAX_PROBLEMS = 50
MAX_ROW_BYTES = 4 * 1024**2
MAX_COLUMNS = 256
ROLES = ("system", "user", "assistant", "tool")
OWN_SAMPLES = ("completion", "completions", "chosen", "rejected")
"""Columns of data sets for other methods: this one samples its own completions."""


class _RowError(Exception):
    """A row that cannot be used, and why."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_row") -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


@dataclass(slots=True)
class Dataset:
    """What was found in a file.

    Attributes:
        num_rows: Rows, all of them prompts.
        bytes: Size of the file.
        sha256: Its digest, in hex.
        columns: By name, the ``first`` row (from 1) that has the column and the first one where it is ``missing``
            or null; None when no row lacks it.
    """

    num_rows: int = 0
    bytes: int = 0
    sha256: str = ""
    columns: dict[str, dict[str, int | None]] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one more row."""
        self.num_rows += 1
        for name in row:
            if name not in self.columns:
                missing = 1 if self.num_rows > 1 else None
                self.columns[name] = {"first": self.num_rows, "missing": missing}
        for name, seen in self.columns.items():
            if seen["missing"] is None and row.get(name) is None:
                seen["missing"] = self.num_rows
        if len(self.columns) > MAX_COLUMNS:
            raise _RowError(f"the file has more than {MAX_COLUMNS} different columns")


def store(source: BinaryIO, target: Path) -> Dataset:
    """Copy an upload to ``target``, durably, while checking every row.

    Raises:
        InvalidRequestError: A row cannot be used, or there is none; ``target`` is removed.
    """
    found, problems, digest = Dataset(), list[Problem](), hashlib.sha256()
    with target.open("wb") as copy:
        blank_at: int | None = None
        for number, line in enumerate(_lines(source), start=1):
            copy.write(line)
            digest.update(line)
            found.bytes += len(line)
            if not line.strip():
                blank_at = blank_at or number
                continue
            if blank_at is not None:
                problems.append(_problem(blank_at, _RowError("the row is blank; remove it")))
                blank_at = None
            try:
                found.add(_row(line))
            except _RowError as error:
                problems.append(_problem(number, error))
            if len(problems) >= MAX_PROBLEMS:
                break
        copy.flush()
        os.fsync(copy.fileno())
    found.sha256 = digest.hexdigest()
    if not problems and found.num_rows == 0:
        problems.append(
            Problem("the file has no rows; send one JSON object per line", "file", "empty_file")
        )
    if problems:
        target.unlink()
        raise _invalid_file(problems)
    return found


def common_columns(columns: Mapping[str, Mapping[str, int | None]]) -> list[str]:
    """Names of the columns that every row has."""
    return sorted(name for name, seen in columns.items() if seen["missing"] is None)


def check_for(spec: JobSpec, columns: Mapping[str, Mapping[str, int | None]]) -> list[Problem]:
    """What keeps a file from serving a job: by column, with the first row that is wrong."""
    problems = [
        Problem(
            f"row {columns[name]['first']} has the column {name!r}, but DAR samples its own completions; "
            "send a file of prompts, or rename the column",
            "training_file",
            "unexpected_column",
            columns[name]["first"],
        )
        for name in OWN_SAMPLES
        if name in columns
    ]
    components = [] if spec.dar.rewards is None else spec.dar.rewards.components
    for index, component in enumerate(components):
        path = f"method.dar.rewards.components[{index}].columns"
        for position, name in enumerate(component.columns or ()):
            row = columns[name]["missing"] if name in columns else 1
            if row is not None:
                there = ", ".join(common_columns(columns))
                message = f"row {row} of the training file has no value for {name!r}; every row has: {there}"
                problems.append(Problem(message, f"{path}[{position}]", "missing_column", row))
    return problems


def _invalid_file(problems: list[Problem]) -> InvalidRequestError:
    first = problems[0]
    where = f"row {first.row}: " if first.row is not None else ""
    shown = f"at least {len(problems)}" if len(problems) >= MAX_PROBLEMS else str(len(problems))
    count = f" ({shown} rows are wrong, see errors)" if len(problems) > 1 else ""
    return InvalidRequestError(
        f"{where}{first.message}{count}; nothing was stored",
        param="file",
        code="invalid_training_file",
        problems=problems,
    )


def _problem(number: int, error: _RowError) -> Problem:
    return Problem(error.message, error.param, error.code, number)


def _lines(source: BinaryIO) -> Iterator[bytes]:
    while line := source.readline(MAX_ROW_BYTES + 1):
        yield line


def _row(line: bytes) -> Mapping[str, Any]:
    if len(line) > MAX_ROW_BYTES:
        raise _RowError(f"the row is longer than {MAX_ROW_BYTES:,} bytes")
    row = _parse(line)
    if not isinstance(row, dict):
        raise _RowError(f"the row must be a JSON object, but it is {_kind(row)}")
    if "prompt" not in row:
        there = ", ".join(list(row)[:10]) or "none"
        raise _RowError(f"the row has no 'prompt'; its columns: {there}", "prompt", "missing")
    _check_prompt(row["prompt"])
    return row


def _parse(line: bytes) -> object:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RowError(
            f"byte {error.start + 1} is not UTF-8; save the file as UTF-8", code="not_utf8"
        ) from None
    if text.startswith("\ufeff"):
        raise _RowError(
            "the file starts with a byte order mark; save it without one", code="not_json"
        )
    try:
        row: object = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except json.JSONDecodeError as error:
        raise _RowError(
            f"not JSON: {error.msg} at character {error.pos + 1}", code="not_json"
        ) from None
    except RecursionError:
        raise _RowError("the row is nested too deeply", code="not_json") from None
    except ValueError as error:  # an integer of thousands of digits
        raise _RowError(f"not usable JSON: {error}", code="not_json") from None
    if "\\u" in text or "\\U" in text:
        _check_surrogates(row)
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise _RowError(f"the key {double!r} occurs twice", double, "duplicate_key")
    return row


def _no_constant(word: str) -> None:
    raise _RowError(f"{word} is not JSON; leave the value out or send null", code="finite_number")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in {float("inf"), float("-inf")}:
        raise _RowError(f"{digits} is too large for a number", code="finite_number")
    return value


def _check_surrogates(row: object) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _RowError(
            "a \\u escape is half of a character (a lone surrogate)", code="not_utf8"
        ) from None


def _check_prompt(prompt: object) -> None:
    if isinstance(prompt, str):
        if not prompt:
            raise _RowError("the prompt is empty", "prompt")
        return
    if not isinstance(prompt, list) or not prompt:
        raise _RowError(
            f"the prompt must be a text or a list of messages, but it is {_kind(prompt)}", "prompt"
        )
    for index, message in enumerate(prompt):
        _check_message(message, f"prompt[{index}]")


def _check_message(message: object, path: str) -> None:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise _RowError("a message is an object with exactly 'role' and 'content'", path)
    if message["role"] not in ROLES:
        raise _RowError(f"the role must be one of {', '.join(ROLES)}", f"{path}.role")
    if not isinstance(message["content"], str) or not message["content"]:
        raise _RowError("the content must be a text that is not empty", f"{path}.content")


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a boolean",
        type(None): "null",
    }
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")
