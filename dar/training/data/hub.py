"""Data sets of a hub, loaded without running their code."""

from typing import Any

from datasets import load_dataset
from datasets import logging as datasets_logging
from datasets.exceptions import DatasetsError
from datasets.utils import disable_progress_bars
from huggingface_hub import is_offline_mode

from dar.errors import TrainingError
from dar.protocol.hub_data import HubData
from dar.training.data.rows import Rows

PARAM = "training_file"


def load_hub_rows(data: HubData, *, is_offline: bool = False) -> Rows:
    """One split of a data set, from the hub or from its cache on this machine.

    Args:
        data: Name, split and configuration.
        is_offline: Whether the hub may not be called. With ``HF_HUB_OFFLINE=1`` the cache is read.

    Raises:
        TrainingError: There is no such data set, split or configuration, its files cannot be read,
            or it needs its own code.
        OSError: The hub cannot be reached.
    """
    name = f"the hub data set {data.name!r} (split {data.split!r})"
    if is_offline and not is_offline_mode():
        raise TrainingError(
            f"{name} cannot be loaded: this process may not call the hub; set HF_HUB_OFFLINE=1 to "
            "read it from the cache, or give a file",
            param=PARAM,
        )
    disable_progress_bars()
    datasets_logging.set_verbosity_error()
    try:
        loaded: Any = load_dataset(f"hf://datasets/{data.name}", data.config, split=data.split)
    except ConnectionError as error:
        if not is_offline:
            raise
        raise TrainingError(
            f"{name} is not in this machine's cache, and this process may not call the hub",
            param=PARAM,
        ) from error
    except (DatasetsError, FileNotFoundError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{name} cannot be loaded: {error}", param=PARAM) from error
    rows: Rows = loaded
    return rows
