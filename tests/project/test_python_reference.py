"""docs/python.md says what signatures and docstrings say."""

import importlib.util
import sys
from pathlib import Path

from transformers import HfArgumentParser

from dar import DARConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_the_python_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("build_python", DOCS / "build_python.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_python"] = module  # dataclasses read it from there
    spec.loader.exec_module(module)
    HfArgumentParser(
        DARConfig
    )  # rewrites the types of the fields, as any training script in this process may have
    assert (DOCS / "python.md").read_text() == module.page(), "run python docs/build_python.py"
    for name in module.METHODS:
        assert f"### `{name}`" in module.page()
