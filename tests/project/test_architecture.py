"""docs/architecture.md is true: its rooms, its layers and its ways through the code."""

import ast
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
README = (ROOT / "README.md").read_text()
PACKAGES = ("dar", "service", "worker", "migrations")
MOST_FILES = {"The way of a spec": 40, "The way of a reward": 16}
METRIC = "Where does a metric travel?"
STOP = re.compile(r"^(?P<indent> *)(?:\d+\.|-) `(?P<file>[^`]+)`: ")
BORDER = re.compile(r"^(?:HTTP|DISK|EXEC|QUEUE): ")
PRODUCT = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FOLDERS = sorted({path.parent.relative_to(ROOT).as_posix() for path in PRODUCT})


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def block(title: str) -> list[str]:
    """The lines of the first code block of a section."""
    return section(title).split("```\n")[1].splitlines()


@dataclass
class Way:
    """The files of a way, and the pairs of neighbours that are in one process."""

    files: list[str] = field(default_factory=list)
    neighbours: list[tuple[str, str]] = field(default_factory=list)
    processes: int = 0
    """Parts between borders."""


def way_of(text: str) -> Way:
    way = Way()
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        if BORDER.match(line):
            way.processes += 1
            above = []
        elif stop := STOP.match(line):
            depth, file = len(stop["indent"]), stop["file"]
            way.processes = way.processes or 1  # a way may begin without a border
            while above and above[-1][0] > depth:
                above.pop()
            if above and above[-1][0] == depth:
                last = above.pop()[1]
                if depth == 0:
                    way.neighbours.append((last, file))
            if above:
                way.neighbours.append((above[-1][1], file))
            above.append((depth, file))
            way.files.append(file)
    return way


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported_by(file: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def are_linked(one: str, other: str) -> bool:
    return module_of(one) in imported_by(other) or module_of(other) in imported_by(one)


@pytest.mark.parametrize("title", [*MOST_FILES, METRIC])
def test_every_file_of_a_way_exists(title: str) -> None:
    files = way_of(section(title)).files
    assert files
    assert [name for name in files if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("title", MOST_FILES)
def test_a_way_is_short_and_enters_no_file_more_than_twice(title: str) -> None:
    files = way_of(section(title)).files
    assert len(set(files)) <= MOST_FILES[title]
    assert [name for name in set(files) if files.count(name) > 2] == []


@pytest.mark.parametrize("title", [*MOST_FILES, METRIC])
def test_neighbours_of_a_way_import_each_other_within_a_process(title: str) -> None:
    way = way_of(section(title))
    assert [pair for pair in way.neighbours if not are_linked(*pair)] == []
    # Each file but the first one of a process has a neighbour.
    assert len(way.neighbours) == len(way.files) - way.processes


def test_neighbours_are_read_from_numbers_indents_and_borders() -> None:
    text = "HTTP: in\n\n1. `a`: x\n2. `b`: x\n   - `c`: x\n     - `d`: x\n   - `e`: x\n"
    way = way_of(f"{text}3. `f`: x\n\nDISK: over\n\n4. `g`: x\n5. `h`: x\n")
    pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("b", "e"), ("b", "f"), ("g", "h")]
    assert (way.files, way.neighbours, way.processes) == (list("abcdefgh"), pairs, 2)
    assert way_of("1. `a`: x\n\nDISK: over\n\n2. `b`: x\n").processes == 2


def test_the_readme_lists_the_same_way_of_a_metric() -> None:
    listed = README.split(f"**{METRIC}**", 1)[1].split("\n## ", 1)[0]
    assert way_of(listed) == way_of(section(METRIC))


def test_the_picture_names_each_product_folder_once() -> None:
    named = [re.match(r"[│├└ ]*([\w/]+)/ ", line) for line in block("Rooms")]
    assert sorted(match[1] for match in named if match) == FOLDERS


def test_the_layers_are_those_of_the_import_contracts() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    expected = [
        "\n".join([contract["containers"][0], *(f"    {layer}" for layer in contract["layers"])])
        for contract in config["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    ]
    assert sorted("\n".join(block("Layers")).split("\n\n")) == sorted(expected)


@pytest.mark.parametrize("folder", [name for name in FOLDERS if "migrations" not in name])
def test_a_folder_says_once_what_each_of_its_modules_contains(folder: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
    listed = re.findall(r"^(\w+): ", docstring, re.MULTILINE)
    parts = {path.stem for path in (ROOT / folder).glob("*.py")} | {
        path.parent.name for path in (ROOT / folder).glob("*/__init__.py")
    }
    assert len(listed) == len(set(listed))
    assert parts - {"__init__", "__main__"} <= set(listed) <= parts
