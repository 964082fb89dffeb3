"""Data sets of a hub, loaded without running anything that comes with them."""

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
        data: Which one.
        is_offline: Whether the hub may not be asked. ``HF_HUB_OFFLINE=1`` then lets the cache be read.

    Raises:
        TrainingError: There is no such data set, split or configuration, its files cannot be read, or it needs code of its own.
        OSError: The hub cannot be reached.
    """
    name = f"the hub data set {data.name!r} (split {data.split!r})"
    if is_offline and not is_offline_mode():
        raise TrainingError(
            f"{name} cannot be loaded: the hub may not be asked here; set HF_HUB_OFFLINE=1 to read it from the cache, or give a file",
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
            f"{name} is not in the cache of this machine, and the hub may not be asked", param=PARAM
        ) from error
    except (DatasetsError, FileNotFoundError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{name} cannot be loaded: {error}", param=PARAM) from error
    rows: Rows = loaded
    return rows
