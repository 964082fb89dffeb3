"""Checks of uploaded files: JSONL of prompts, or of completions with rewards, and other columns.

One pass over the file finds all problems (the first `MAX_PROBLEMS` are reported), copies it and
hashes it. The file is never held in memory.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dar.errors import InvalidRequestError, Problem
from dar.protocol.reward_spec import RewardComponent
from dar.protocol.rows import (
    ALL_NULL,
    KINDS,
    REWARD_COLUMNS,
    OfflineRewards,
    RowError,
    kind_of,
    kind_of_value,
    read_offline,
    read_prompt,
)
from dar.protocol.spec import JobSpec
from dar.rewards.builtins.registry import make_builtin
from dar.rewards.from_spec import PATH

MAX_PROBLEMS = 50
MAX_ROW_BYTES = 4 * 1024**2
MAX_COLUMNS = 256
ROLES = ("system", "user", "assistant", "tool")
CONVERSATIONS = ("prompt", "completion", "completions", "chosen", "rejected")
"""Columns that may contain messages."""
CHATS = ("prompt", "chosen")
"""Columns that hold a conversation in every row of conversations, whatever its format."""
FileParam = Literal["training_file", "validation_file"]
Columns = Mapping[str, Mapping[str, int | None]]
"""See `Dataset.columns`."""


@dataclass(slots=True)
class Dataset:
    """Facts about a file.

    Attributes:
        num_rows: Number of rows. Each is a prompt, with or without completions.
        bytes: Size of the file.
        sha256: Its digest, in hex.
        columns: By name, the ``first`` row (from 1) with a value, the first row where the column is
            ``missing`` or null, and the first row where it is ``absent``; None if there is no such
            row. If it holds conversations, also the first row with a ``chat``.
        rewards: The rewards of rows with completions.
    """

    num_rows: int = 0
    bytes: int = 0
    sha256: str = ""
    columns: dict[str, dict[str, int | None]] = field(default_factory=dict)
    rewards: OfflineRewards = field(default_factory=OfflineRewards)

    def add(self, row: Mapping[str, Any]) -> None:
        self.num_rows += 1
        for name in row:
            if name not in self.columns:
                missing = 1 if self.num_rows > 1 else None
                self.columns[name] = {"first": None, "missing": missing, "absent": missing}
        for name, seen in self.columns.items():
            is_there = row.get(name) is not None
            for place, is_so in (
                ("first", is_there),
                ("missing", not is_there),
                ("absent", name not in row),
            ):
                if is_so and seen[place] is None:
                    seen[place] = self.num_rows
        for name in CHATS:
            if isinstance(row.get(name), list):
                self.columns[name].setdefault("chat", self.num_rows)
        if len(self.columns) > MAX_COLUMNS:
            raise RowError(f"the file has more than {MAX_COLUMNS} different columns")


def store(source: BinaryIO, target: Path) -> Dataset:
    """Copy an upload to ``target``, durably, and check every row.

    Raises:
        InvalidRequestError: A row is invalid, or the file has no rows; ``target`` is removed.
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
                problems.append(_problem(blank_at, RowError("the row is blank; remove it")))
                blank_at = None
            try:
                row = _row(line)
                _check_content(row, found.rewards)
                found.add(row)
            except RowError as error:
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
    if not problems and found.rewards.are_null:
        problems.append(Problem(ALL_NULL, "file", "no_rewards"))
    if problems:
        target.unlink()
        raise _invalid_file(problems)
    return found


def common_columns(columns: Columns) -> list[str]:
    """Names of the columns that every row has."""
    return sorted(name for name, seen in columns.items() if seen["missing"] is None)


def first_chat(columns: Columns) -> int | None:
    """The first row that holds a conversation; None if no row does."""
    rows = (columns[name].get("chat") for name in CHATS if name in columns)
    return min((row for row in rows if row is not None), default=None)


def check_for(spec: JobSpec, columns: Columns, param: FileParam = "training_file") -> list[Problem]:
    """Why a file cannot be used for a job: problems by column, each with the first such row.

    Args:
        spec: Spec of the job.
        columns: Columns of the file.
        param: Which of the job's files it is.
    """
    if spec.dar.rewards is None:
        return _offline_problems(columns, param)
    return [
        *_completions(columns, param),
        *_missing_columns(spec.dar.rewards.components, columns, param),
    ]


def _completions(columns: Columns, param: FileParam) -> list[Problem]:
    return [
        Problem(
            f"row {columns[name]['first']} of the {_words(param)} has the column {name!r}, but a "
            "job with rewards samples its own completions; send a file of prompts, rename the "
            "column, or leave the rewards out to train on what the file holds",
            param,
            "unexpected_column",
            columns[name]["first"],
        )
        for name in _filled(KINDS, columns)
    ]


def _missing_columns(
    components: Iterable[RewardComponent], columns: Columns, param: FileParam
) -> Iterator[Problem]:
    for index, component in enumerate(components):
        for place, name in _columns_of(component):
            row = columns[name]["missing"] if name in columns else 1
            # A builtin skips a prompt without a value. Without the column it would skip all.
            if row is None or (component.kind == "builtin" and name in columns):
                continue
            path = f"{PATH}.components[{index}].{place}"
            there = ", ".join(common_columns(columns))
            yield Problem(
                f"row {row} of the {_words(param)} has no value for {name!r}; every row has: "
                f"{there}",
                path if param == "training_file" else param,
                "missing_column",
                row,
            )


def _columns_of(component: RewardComponent) -> list[tuple[str, str]]:
    """The columns that a component reads, each with its path below the component.

    Raises:
        InvalidRequestError: A builtin has invalid parameters.
    """
    if component.kind == "builtin":
        return [
            ("params.column", name)
            for name in make_builtin(component.fn or "", component.params).columns
        ]
    return [(f"columns[{place}]", name) for place, name in enumerate(component.columns or ())]


def _offline_problems(columns: Columns, param: FileParam) -> list[Problem]:
    """Why a file cannot be trained on offline. Each row alone was checked at the upload."""
    completions, rewards = _filled(KINDS, columns), [n for n in REWARD_COLUMNS if n in columns]
    if not completions:
        lack = "no completions, but a job without rewards trains on what the file holds"
        advice = (
            "send 'completions' with 'rewards', or 'chosen' with 'rejected', or give the job "
            "rewards"
        )
        return [_offline_problem(param, 1, f"{lack}: {advice}")]
    if not rewards and any(KINDS[name] != "preferences" for name in completions):
        return [
            _offline_problem(
                param, 1, "completions but no rewards: add 'rewards', or give the job some"
            )
        ]
    places = dict.fromkeys((*completions, *_filled(["behavior_logps"], columns)), "missing")
    places |= dict.fromkeys(rewards, "absent")  # null means that a reward is missing
    return [
        _offline_problem(
            param, row, f"no {name!r}, but others have it: keep to one format", "mixed_format"
        )
        for name, place in places.items()
        if (row := columns[name].get(place)) is not None
    ]


def _filled(names: Iterable[str], columns: Columns) -> list[str]:
    """Those of ``names`` that have a value in some row."""
    return [name for name in names if name in columns and columns[name]["first"] is not None]


def _offline_problem(
    param: FileParam, row: int, what: str, code: str = "missing_column"
) -> Problem:
    return Problem(f"row {row} of the {_words(param)} has {what}", param, code, row)


def _words(param: FileParam) -> str:
    return param.replace("_", " ")


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


def _problem(number: int, error: RowError) -> Problem:
    return Problem(error.message, error.param, error.error_code, number)


def _lines(source: BinaryIO) -> Iterator[bytes]:
    while line := source.readline(MAX_ROW_BYTES + 1):
        yield line


def _row(line: bytes) -> Mapping[str, Any]:
    if len(line) > MAX_ROW_BYTES:
        raise RowError(f"the row is longer than {MAX_ROW_BYTES:,} bytes")
    row = _parse(line)
    if not isinstance(row, dict):
        raise RowError(f"the row must be a JSON object, but it is {kind_of_value(row)}")
    return row


def _parse(line: bytes) -> object:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            f"byte {error.start + 1} is not UTF-8; save the file as UTF-8", code="not_utf8"
        ) from None
    if text.startswith("\ufeff"):
        raise RowError(
            "the file starts with a byte order mark; save it without one", code="not_json"
        )
    try:
        row: object = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except json.JSONDecodeError as error:
        raise RowError(
            f"not JSON: {error.msg} at character {error.pos + 1}", code="not_json"
        ) from None
    except RecursionError:
        raise RowError("the row is nested too deeply", code="not_json") from None
    except ValueError as error:  # an integer of thousands of digits
        raise RowError(f"not usable JSON: {error}", code="not_json") from None
    if "\\u" in text or "\\U" in text:
        _check_surrogates(row)
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise RowError(f"the key {double!r} occurs twice", double, "duplicate_key")
    return row


def _no_constant(word: str) -> None:
    raise RowError(f"{word} is not JSON; leave the value out or send null", code="finite_number")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in {float("inf"), float("-inf")}:
        raise RowError(f"{digits} is too large for a number", code="finite_number")
    return value


def _check_surrogates(row: object) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(
            "a \\u escape is half of a character (a lone surrogate)", code="not_utf8"
        ) from None


def _check_content(row: Mapping[str, Any], rewards: OfflineRewards) -> None:
    """Apply the trainer's rules, and check that texts are not empty and messages are plain."""
    if kind_of(row) == "prompts":
        if read_prompt(row) == "":
            raise RowError("the prompt is empty", "prompt")
    elif any(name in row for name in REWARD_COLUMNS) or kind_of(row) == "preferences":
        rewards.add(read_offline(row))
    else:  # `check_for` reports missing rewards, once it is known which job uses the file
        read_offline({**row, "rewards": None})
    for name in CONVERSATIONS:
        for path, message in _messages(row.get(name), name):
            _check_message(message, path)


def _messages(value: object, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All messages in a column with their paths; the column is a conversation or a list of them."""
    if isinstance(value, dict):
        yield path, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _messages(item, f"{path}[{index}]")


def _check_message(message: Mapping[str, Any], path: str) -> None:
    if set(message) != {"role", "content"}:
        raise RowError("a message is an object with exactly 'role' and 'content'", path)
    if message["role"] not in ROLES:
        raise RowError(f"the role must be one of {', '.join(ROLES)}", f"{path}.role")
    if not isinstance(message["content"], str) or not message["content"]:
        raise RowError("the content must be a text that is not empty", f"{path}.content")
