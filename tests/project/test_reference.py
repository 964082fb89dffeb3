"""docs/reference.md says what the code says."""

import importlib
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_is_up_to_date() -> None:
    module = importlib.import_module("build_reference")
    assert (DOCS / "reference.md").read_text() == module.reference(), (
        "run python docs/build_reference.py"
    )
