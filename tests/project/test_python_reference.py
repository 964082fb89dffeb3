"""docs/python.md says what signatures and docstrings say."""

import importlib
from pathlib import Path

from transformers import HfArgumentParser

from dar import DARConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_the_python_reference_is_up_to_date() -> None:
    module = importlib.import_module("build_python")
    HfArgumentParser(
        DARConfig
    )  # rewrites the types of the fields, as any training script in this process may have
    assert (DOCS / "python.md").read_text() == module.page(), "run python docs/build_python.py"
    for name in module.METHODS:
        assert f"### `{name}`" in module.page()
