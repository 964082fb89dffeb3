"""Checks of uploaded files: JSONL of prompts, or of completions with rewards, and other columns.

One pass over the file finds all problems (the first `MAX_PROBLEMS` of `dar.protocol.row_files` are
reported) and hashes it. The file is never held in memory.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dar.errors import Problem
from dar.protocol.reward_spec import RewardComponent
from dar.protocol.row_files import invalid_file, lines_of, parse_row, read_lines
from dar.protocol.rows import KINDS, REWARD_COLUMNS
from dar.protocol.spec import JobSpec
from dar.rewards.builtins.registry import make_builtin
from dar.rewards.from_spec import PATH

CHATS = ("prompt", "chosen")
"""Columns that hold a conversation in every row of conversations, whatever its format."""
MOST_LISTED = 50
MOST_SCANNED = 64 * 1024**2
"""Most rows that a dry run lists, and most bytes of the file that it reads for that."""
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
    """

    num_rows: int = 0
    bytes: int = 0
    sha256: str = ""
    columns: dict[str, dict[str, int | None]] = field(default_factory=dict)
    _never_absent: set[str] = field(default_factory=set)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row. It takes time for its own columns only, not for all columns of the file."""
        self.num_rows += 1
        for name, value in row.items():
            if name not in self.columns:
                missing = 1 if self.num_rows > 1 else None
                self.columns[name] = {"first": None, "missing": missing, "absent": missing}
                if missing is None:
                    self._never_absent.add(name)
            seen = self.columns[name]
            place = "missing" if value is None else "first"
            if seen[place] is None:
                seen[place] = self.num_rows
        for name in self._never_absent.difference(row):
            self._never_absent.remove(name)
            seen = self.columns[name]
            seen["absent"] = self.num_rows
            seen["missing"] = seen["missing"] or self.num_rows
        for name in CHATS:
            if isinstance(row.get(name), list):
                self.columns[name].setdefault("chat", self.num_rows)


class UploadCancelledError(Exception):
    """The client has left while its file was checked."""


def examine(path: Path, is_cancelled: Callable[[], bool]) -> Dataset:
    """Check every row of a file, and hash it.

    Args:
        path: The file.
        is_cancelled: Polled at each row.

    Raises:
        InvalidRequestError: A row is invalid, or the file has no rows.
        UploadCancelledError: ``is_cancelled`` returned true.
    """
    found, problems, digest = Dataset(), list[Problem](), hashlib.sha256()
    with path.open("rb") as file:

        def lines() -> Iterator[bytes]:
            for line in lines_of(file):
                if is_cancelled():
                    raise UploadCancelledError
                if not problems:  # a file with problems is not kept
                    digest.update(line)
                    found.bytes += len(line)
                yield line

        for row in read_lines(lines(), problems):
            found.add(row)
    if problems:
        raise invalid_file(problems, end="; nothing was stored")
    found.sha256 = digest.hexdigest()
    return found


def common_columns(columns: Columns) -> list[str]:
    """Names of the columns that every row has."""
    return sorted(name for name, seen in columns.items() if seen["missing"] is None)


def uses_of(columns: Columns) -> list[Literal["rewards", "stored_completions"]]:
    """For which jobs a file can be used: with rewards, or without, on stored completions."""
    uses: list[Literal["rewards", "stored_completions"]] = []
    if columns and not _filled(KINDS, columns):
        uses.append("rewards")
    if columns and not _offline_problems(columns, "training_file"):
        uses.append("stored_completions")
    return uses


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
    for path, name in _unfilled(components, columns):
        row = columns[name]["missing"] if name in columns else 1
        assert row is not None  # it is not filled
        yield _missing(columns, name, row, path if param == "training_file" else param, param)


def _unfilled(components: Iterable[RewardComponent], columns: Columns) -> Iterator[tuple[str, str]]:
    """The columns that a component reads and that lack a value in some row, with their places."""
    for index, component in enumerate(components):
        for place, name in _columns_of(component):
            is_filled = name in columns and columns[name]["missing"] is None
            # A builtin skips a prompt without a value. Without the column it would skip all.
            if not is_filled and not (component.kind == "builtin" and name in columns):
                yield f"{PATH}.components[{index}].{place}", name


def _missing(columns: Columns, name: str, row: int, place: str, param: FileParam) -> Problem:
    there = ", ".join(common_columns(columns))
    return Problem(
        f"row {row} of the {_words(param)} has no value for {name!r}; every row has: {there}",
        place,
        "missing_column",
        row,
    )


def rows_without(spec: JobSpec, columns: Columns, source: BinaryIO) -> Iterator[Problem]:
    """Every row of the training file that lacks a value which the job's rewards need.

    At most `MOST_LISTED` of them, in the first `MOST_SCANNED` bytes. A column that no row has is
    left out: `check_for` names it.

    Args:
        spec: Spec of the job.
        columns: Columns of the file.
        source: The file, which was checked at its upload.
    """
    components = () if spec.dar.rewards is None else spec.dar.rewards.components
    wanted = [(place, name) for place, name in _unfilled(components, columns) if name in columns]
    scanned = listed = 0
    for number, line in enumerate(lines_of(source) if wanted else (), start=1):
        scanned += len(line)
        if listed >= MOST_LISTED or scanned > MOST_SCANNED:
            return
        row = parse_row(line) if line.strip() else None
        for place, name in wanted:
            if row is not None and row.get(name) is None:
                listed += 1
                yield _missing(columns, name, number, place, "training_file")


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
    """Why a file cannot be trained on offline.

    Uploads of mixed formats are refused now, but earlier versions have stored such files.
    """
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
