"""Commands that replace this process by another one.

This library never imports the service and the worker. They are started by their module names.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from dar.processes import require
from dar.settings import environment


def become(module: str, *arguments: str, settings: Mapping[str, object]) -> NoReturn:
    """Replace this process by ``python -m module``, with ``settings`` in its environment."""
    command = [sys.executable, "-m", module, *arguments]
    os.execve(sys.executable, command, environment(**settings))  # noqa: S606 - a module of this product, no shell


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
    """Encrypt all stored secrets with the newest key in this process."""
    require("service", "alembic")
    become("service", "rotate-secrets", settings={"home": home})


def train(arguments: Sequence[str]) -> NoReturn:
    """Train in this process: signals reach the training, and its exit code is this command's.

    Args:
        arguments: Everything after ``dar train``; `dar.training.script.flags` parses it.
    """
    require("worker", "torch")
    become("dar.training", *arguments, settings={})
