"""``dar train``: become ``python -m dar.training``, which alone loads torch."""

from collections.abc import Sequence
from typing import NoReturn

from dar.cli.launch import become, require


def run(arguments: Sequence[str]) -> NoReturn:
    """Train in this process's place: signals reach the training itself, and its exit code is ours.

    Args:
        arguments: Whatever was typed after ``dar train``; `dar.training.script.flags` reads it.
    """
    require("worker", "torch")
    become("dar.training", *arguments, settings={})
