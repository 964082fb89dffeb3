"""The guide to reward sources names every builtin with all its parameters, every protocol and every
placeholder.
"""

from pathlib import Path
from typing import get_args

import pytest

from dar.protocol.reward_spec import ProtocolName
from dar.rewards.builtins.registry import BUILTINS
from dar.rewards.protocols.plain import VALUES

GUIDE = (Path(__file__).parents[2] / "docs" / "rewards-sources.md").read_text()


@pytest.mark.parametrize("fn", BUILTINS)
def test_a_builtin_is_described_with_its_parameters(fn: str) -> None:
    row = next(line for line in GUIDE.splitlines() if line.startswith(f"| `{fn}` |"))
    if "as above" in row:
        row += next(line for line in GUIDE.splitlines() if line.startswith("| `exact_match` |"))
    for name in BUILTINS[fn].model_fields:
        assert f"`{name}`" in row, name


def test_protocols_and_placeholders_are_described() -> None:
    for name in (*get_args(ProtocolName), *VALUES):
        assert f"`{name}`" in GUIDE, name
