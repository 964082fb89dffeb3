"""Data sets of a hub, loaded without running their code."""

from pathlib import Path
from typing import Any

from datasets import load_dataset, load_from_disk
from datasets import logging as datasets_logging
from datasets.utils import disable_progress_bars
from huggingface_hub import is_offline_mode

from dar.errors import TrainingError
from dar.protocol.hub_data import HubData
from dar.training.data.load_errors import blame
from dar.training.data.rows import Rows

PARAM = "training_file"


def load_hub_rows(data: HubData, *, is_offline: bool = False, token: str | None = None) -> Rows:
    """One split of a data set, from the hub or from its cache on this machine.

    Args:
        data: Name, split and configuration.
        is_offline: Whether the hub may not be called. With ``HF_HUB_OFFLINE=1`` the cache is read.
        token: Token of the hub; default: that of this machine's user.

    Raises:
        TrainingError: There is no such data set, split or configuration, its files cannot be read,
            or it needs its own code.
        HubUnreachableError: The hub cannot be reached.
    """
    what = _name_of(data)
    if is_offline and not is_offline_mode():
        raise TrainingError(
            f"{what} cannot be loaded, because this process may not call the hub; set "
            "HF_HUB_OFFLINE=1 to read it from the cache, or give a file",
            param=PARAM,
        )
    disable_progress_bars()
    datasets_logging.set_verbosity_error()
    try:
        loaded: Any = load_dataset(
            f"hf://datasets/{data.name}", data.config, split=data.split, token=token
        )
    except Exception as error:  # noqa: BLE001 - odd files raise anything in datasets
        blame(error, what, f"{what} cannot be loaded", param=PARAM, is_offline=is_offline)
    rows: Rows = loaded
    return rows


def save_rows(rows: Rows, folder: Path) -> None:
    """Write rows of `load_hub_rows` for `load_saved_rows`, in another process."""
    loaded: Any = rows
    loaded.save_to_disk(str(folder))


def load_saved_rows(folder: Path) -> Rows:
    """Rows that `save_rows` has written."""
    loaded: Any = load_from_disk(str(folder))
    rows: Rows = loaded
    return rows


def _name_of(data: HubData) -> str:
    """A data set as messages name it."""
    parts = [f"split {data.split!r}"]
    if data.config is not None:
        parts.insert(0, f"configuration {data.config!r}")
    return f"the data set {data.name!r} of the hub ({', '.join(parts)})"
