"""What the tests of the project share: the measuring command and the parsed source tree."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from project.measure import Tree

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def measure() -> Iterator[ModuleType]:
    """``measure.py`` beside this file; it is run as a program too, so it is no package's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        yield importlib.import_module("measure")
        for name in ("measure", "source_files"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def source_tree(measure: ModuleType) -> "Tree":
    """This checkout, each file parsed once."""
    return measure.Tree(HERE.parents[1])
