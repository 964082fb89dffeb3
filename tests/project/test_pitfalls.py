"""Every test that docs/pitfalls.md, docs/hostile.md and docs/security.md name is there."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"


@pytest.mark.parametrize(
    ("page", "rows"), [("pitfalls.md", 17), ("hostile.md", 35), ("security.md", 18)]
)
def test_every_mistake_has_tests_that_exist(page: str, rows: int) -> None:
    found = re.findall(r"^\| (\d+) \|(.*)$", (DOCS / page).read_text(), re.MULTILINE)
    assert [int(number) for number, _ in found] == list(range(1, rows + 1))
    for number, row in found:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, f"row {number} names no test"
        for file, test in named:
            tree = ast.parse((TESTS / file).read_text())
            functions = {
                n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            }
            assert test in functions, f"row {number}: {file} has no {test}"
