"""A data set by the name on a command line: a file, a folder or a hub id."""

import csv
import glob
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from dar.errors import InvalidRequestError
from dar.protocol.hub_data import HubData
from dar.protocol.rows import KINDS, REWARD_COLUMNS, TEMPLATE_COLUMN
from dar.training.data.hub import load_hub_rows
from dar.training.data.load_errors import first_line
from dar.training.data.rows import Rows, read_rows

JSON = (".jsonl", ".json")
"""Suffixes of files that are read by the rules of uploads."""
CSV = ".csv"
PARQUET = ".parquet"
OF_NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0, got 0")
"""What `datasets` says of a file without rows: the second, where it has a group of none."""
NUMBERS = (*REWARD_COLUMNS, "behavior_logps")
"""Columns of a CSV file with completions that hold numbers."""
NO_TEXTS = ("prompt_ids", "completion_ids", "tools", TEMPLATE_COLUMN)
"""Columns of a CSV file that never hold a text, so that an empty field is null."""
LONGEST_FIELD = 2**31 - 1
"""Characters in a field of a CSV file; the limit of `csv` is shorter than a long prompt."""
PARAM = "dataset_name"
ONLY_SPLIT = ("train", "test")
"""Split names that rows without splits accept: the defaults of a command line."""


def open_rows(
    name: str,
    *,
    split: str = "train",
    config: str | None = None,
    is_offline: bool = False,
    token: str | None = None,
) -> Rows:
    """The rows of a split.

    Args:
        name: A ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, which is one split; a folder
            with a file ``<split>.jsonl`` (or of another of these kinds), or a folder that
            `datasets.Dataset.save_to_disk` wrote; or a data set of the hub. The fields of a CSV
            file are texts, exactly as written; only rewards and ``behavior_logps`` beside
            completions are numbers, and there an empty field is null.
        split: Name of the split.
        config: Name of the configuration; hub only.
        is_offline: Whether the hub may not be called.
        token: Token of the hub; default: that of this machine's user.

    Raises:
        InvalidRequestError: There is no such file, folder or split, or it cannot be read.
        TrainingError: The hub has no such data set.
        HubUnreachableError: The hub cannot be reached.
    """
    path = Path(name).expanduser()
    if config is not None and path.exists():
        raise InvalidRequestError(
            f"{name} is a local path and has no configurations; leave --dataset_config out",
            param="dataset_config",
        )
    if is_one_split(path) and split not in ONLY_SPLIT:
        raise InvalidRequestError(
            f"{path} has no splits, so there is no {split!r}; leave the split out, or give a "
            f"folder with {split}{path.suffix or '.jsonl'}",
            param=PARAM,
        )
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        return _from_folder(path, split)
    if path.suffix in {*JSON, CSV, PARQUET} or name.startswith((".", "/", "~")):
        raise InvalidRequestError(f"there is no file or folder {name}", param=PARAM)
    return load_hub_rows(HubData(name, split, config), is_offline=is_offline, token=token)


def is_one_split(path: Path) -> bool:
    """Whether it has no splits: a file, or a folder that `datasets.Dataset.save_to_disk` wrote."""
    return path.is_file() or (path / "state.json").is_file()


def _from_file(path: Path) -> Rows:
    if path.suffix in JSON:
        return read_rows(path, PARAM)
    if path.suffix == CSV:
        found = list(_of_csv(path))
        if not found:
            raise InvalidRequestError(f"{path} has no rows", param=PARAM)
        return found
    if path.suffix != PARQUET:
        raise InvalidRequestError(
            f"{path} must end with {', '.join((*JSON, CSV, PARQUET))} to name its format",
            param=PARAM,
        )
    try:
        loaded: Any = load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ or error  # `datasets` says only that it failed
        why = first_line(cause)
        is_empty = any(words in f"{error} {why}" for words in OF_NO_ROWS)
        raise InvalidRequestError(
            f"{path} has no rows" if is_empty else f"{path} cannot be read: {why}", param=PARAM
        ) from error
    rows: Rows = loaded
    return rows


def _of_csv(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file; no value is guessed, as a guess depends on all other rows.

    Raises:
        InvalidRequestError: A row does not fit the header, or the file is no CSV in UTF-8.
    """
    longest = csv.field_size_limit(LONGEST_FIELD)
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = _header(next((fields for fields in reader if fields), []), path)
            numbers = () if KINDS.keys().isdisjoint(names) else NUMBERS
            line = reader.line_num + 1
            for fields in reader:
                if fields:
                    yield _csv_row(names, fields, numbers, f"{path}, line {line}")
                line = reader.line_num + 1
    except csv.Error as error:
        raise InvalidRequestError(f"{path}, line {line}: not CSV: {error}", param=PARAM) from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path} is not UTF-8; save it as UTF-8", param=PARAM) from error
    finally:
        csv.field_size_limit(longest)


def _header(names: list[str], path: Path) -> list[str]:
    for place, name in enumerate(names):
        if name in names[:place]:
            raise InvalidRequestError(
                f"{path}: the column {name!r} occurs twice in the header; rename one", param=PARAM
            )
        if not name:
            raise InvalidRequestError(
                f"{path}: column {place + 1} has no name in the header; name it, or remove it "
                "(pandas writes row numbers there: to_csv(index=False))",
                param=PARAM,
            )
    return names


def _csv_row(
    names: list[str], fields: list[str], numbers: tuple[str, ...], place: str
) -> dict[str, Any]:
    if len(fields) != len(names):
        raise InvalidRequestError(
            f"{place}: {len(fields)} field{'' if len(fields) == 1 else 's'}, but the header has "
            f"{len(names)}; a text with a comma or a line break needs quotes around it",
            param=PARAM,
        )
    row: dict[str, Any] = dict(zip(names, fields, strict=True))
    for name in (*numbers, *NO_TEXTS):
        if row.get(name) == "":
            row[name] = None
        elif name in row and name in numbers:
            row[name] = _number_of(row[name])
    return row


def _number_of(text: str) -> float | str:
    """The number that a text is; the text itself where it is none, which the row's check says."""
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) and "_" not in text else text


def _from_folder(path: Path, split: str) -> Rows:
    for suffix in (*JSON, CSV, PARQUET):
        if (path / f"{split}{suffix}").is_file():
            return _from_file(path / f"{split}{suffix}")
    try:
        saved: Any = load_from_disk(str(path))
    except (DatasetsError, OSError, ValueError) as error:
        raise InvalidRequestError(
            f"the folder {path} has no {split}.jsonl and is not a saved data set: {error}",
            param=PARAM,
        ) from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise InvalidRequestError(
                f"{path} has no split {split!r}, but {', '.join(saved)}", param=PARAM
            )
        saved = saved[split]
    rows: Rows = saved
    return rows
