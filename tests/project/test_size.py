"""The size rule: small folders, whole ideas, unique names, no import cycle."""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from project.measure import Tree


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_folders_files_functions_and_names_keep_the_size_rule(
    measure: ModuleType, source_tree: "Tree"
) -> None:
    violations = measure.size_violations(source_tree)
    assert not violations, "\n".join(["the size rule is broken:", *violations])


def test_the_tables_of_the_measuring_command_name_what_exists(
    measure: ModuleType, source_tree: "Tree"
) -> None:
    assert measure.missing_mains(source_tree) == []


LONG = "x = 1\n" * 60
BREACHES = {
    "15 modules in one folder": {f"dar/many/file_{n}.py": LONG for n in range(15)},
    "tests/many: 26 modules in one folder": {f"tests/many/test_{n}.py": "" for n in range(26)},
    "dar/long.py: 701 lines": {"dar/long.py": "x = 1\n" * 701},
    "a function of 81 lines": {"dar/function.py": "def f() -> None:\n" + "    f()\n" * 80},
    "no face, entry point, noun or plug-in": {"dar/short.py": "x = 1\n"},
    "only dar.user imports it": {"dar/part.py": LONG, "dar/user.py": "import dar.part\n" + LONG},
    "nothing imports it": {"dar/alone.py": LONG},
    "class Thing stands in dar/one.py, dar/two.py": {
        "dar/one.py": "class Thing: ...\n",
        "dar/two.py": "class Thing: ...\n",
    },
    "a table class ends in Row": {
        "service/store/tables.py": 'class Job:\n    __tablename__ = "jobs"\n'
    },
    "import cycle: dar.left, dar.right": {
        "dar/left.py": "def f() -> None:\n    import dar.right\n",
        "dar/right.py": "if TYPE_CHECKING:\n    from dar.left import f\n",
    },
}
"""What the rule reports -> the files of a tree that breaks it."""


@pytest.mark.parametrize("report", BREACHES)
def test_a_broken_size_rule_is_reported(report: str, measure: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, {"pyproject.toml": "", "dar/__init__.py": "", **BREACHES[report]})
    assert report in "\n".join(measure.size_violations(measure.Tree(tmp_path)))
