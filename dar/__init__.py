"""Direct Advantage Regression: training core, reward client, SDK and the ``dar`` command.

Each name is loaded when it is first used, so that the SDK never loads torch.

client: the SDK.
cli: the ``dar`` command.
demo: the ``dar demo`` command; its part with torch is in training.
protocol: wire models of all processes, and the rules over specs and rows.
rewards: reward sources, the client of reward services, the reward server.
training: the trainer; the only folder that imports torch.
disk: digests of files, and durable writes.
fault_points: instants at which a test can kill a process; off in production.
errors: all errors that a user can see, with their codes and HTTP statuses.
output: standard output of a command, on any terminal and any disk.
processes: child processes: restarted when they die, ended with their parent.
setting_kinds: what a setting must be, so that it fails at the start and not later.
settings: all settings of an installation, read from ``DAR_*`` variables.
version: the version.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dar.version import __version__

if TYPE_CHECKING:
    from dar.client import AsyncClient, Client
    from dar.training import DARConfig, DARTrainer, DataCollatorForDAR

__all__ = ["AsyncClient", "Client", "DARConfig", "DARTrainer", "DataCollatorForDAR", "__version__"]

_HOMES = {
    "AsyncClient": "dar.client",
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
