"""Every test that docs/pitfalls.md names is there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "pitfalls.md"


def test_every_mistake_has_tests_that_exist() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)$", PAGE.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 18))
    for number, row in rows:
        named = re.findall(r"`(\w+/\w+\.py)::(\w+)`", row)
        assert named, f"row {number} names no test"
        for file, test in named:
            tree = ast.parse((TESTS / file).read_text())
            functions = {
                n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            }
            assert test in functions, f"row {number}: {file} has no {test}"
