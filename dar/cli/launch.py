"""``dar serve``, ``dar worker``, ``dar migrate`` and ``dar rotate-secrets``: become the process that was asked for.

The service and the worker are separate packages that this library never imports; they are started by name.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from dar.errors import ConfigurationError
from dar.settings import environment

EXTRAS = {"service": "service", "worker": "worker", "reward server": "rewards"}
"""Process -> the extra of the distribution that brings what it needs."""


def require(process: str, module: str) -> None:
    """Refuse with a way out when the libraries of a process are not installed.

    Raises:
        ConfigurationError: ``module`` cannot be found.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigurationError(
            f"the {process} needs libraries that are not installed: "
            f"pip install 'dar-service[{EXTRAS[process]}]'"
        )


def become(module: str, *arguments: str, settings: Mapping[str, object]) -> NoReturn:
    """Replace this process by ``python -m module``, with ``settings`` in its environment."""
    command = [sys.executable, "-m", module, *arguments]
    os.execve(sys.executable, command, environment(**settings))  # noqa: S606 - our own module, no shell


def serve(*, home: Path | None, host: str | None, port: int | None) -> NoReturn:
    """Run the service in this process."""
    require("service", "fastapi")
    become("service", "serve", settings={"home": home, "host": host, "port": port})


def worker(*, home: Path | None, slot: str | None, devices: str | None) -> NoReturn:
    """Run a worker in this process."""
    require("worker", "torch")
    become("worker", settings={"home": home, "slot": slot, "devices": devices})


def migrate(*, home: Path | None) -> NoReturn:
    """Upgrade the database in this process."""
    require("service", "alembic")
    become("service", "migrate", settings={"home": home})


def rotate_secrets(*, home: Path | None) -> NoReturn:
    """Store all secrets under the newest key in this process."""
    require("service", "alembic")
    become("service", "rotate-secrets", settings={"home": home})
