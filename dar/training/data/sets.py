"""A data set by the name on a command line: a file, a folder or a hub id."""

from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from dar.errors import InvalidRequestError
from dar.protocol.hub_data import HubData
from dar.training.data.hub import load_hub_rows
from dar.training.data.load_errors import first_line
from dar.training.data.rows import Rows, read_rows

JSON = (".jsonl", ".json")
"""Suffixes of files that are read by the rules of uploads."""
BUILDERS = {".csv": "csv", ".parquet": "parquet"}
"""Suffix of another file -> its reader in `datasets`."""
OF_NO_ROWS = ("corresponds to no data", "No columns to parse from file")
"""What `datasets` and pandas say of a file without rows."""
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
            `datasets.Dataset.save_to_disk` wrote; or a data set of the hub.
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
    if path.suffix in {*JSON, *BUILDERS} or name.startswith((".", "/", "~")):
        raise InvalidRequestError(f"there is no file or folder {name}", param=PARAM)
    return load_hub_rows(HubData(name, split, config), is_offline=is_offline, token=token)


def is_one_split(path: Path) -> bool:
    """Whether it has no splits: a file, or a folder that `datasets.Dataset.save_to_disk` wrote."""
    return path.is_file() or (path / "state.json").is_file()


def _from_file(path: Path) -> Rows:
    if path.suffix in JSON:
        return read_rows(path, PARAM)
    if path.suffix not in BUILDERS:
        raise InvalidRequestError(
            f"{path} must end with {', '.join((*JSON, *BUILDERS))} to name its format", param=PARAM
        )
    try:
        loaded: Any = load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ or error  # `datasets` says only that it failed
        why = first_line(cause)
        is_empty = any(text in f"{error} {why}" for text in OF_NO_ROWS)
        raise InvalidRequestError(
            f"{path} has no rows" if is_empty else f"{path} cannot be read: {why}", param=PARAM
        ) from error
    rows: Rows = loaded
    return rows


def _from_folder(path: Path, split: str) -> Rows:
    for suffix in (*JSON, *BUILDERS):
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
