"""Direct Advantage Regression: the training core, the reward client, the SDK and the ``dar`` command.

Importing this package is light: each name is loaded when it is first used, so that a client never loads torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dar.version import __version__

if TYPE_CHECKING:
    from dar.client import Client
    from dar.training import DARConfig, DARTrainer, DataCollatorForDAR

__all__ = ["Client", "DARConfig", "DARTrainer", "DataCollatorForDAR", "__version__"]

_HOMES = {
    "Client": "dar.client",
    "DARConfig": "dar.training",
    "DARTrainer": "dar.training",
    "DataCollatorForDAR": "dar.training",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dar' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
