"""Rules of the code that a machine can check."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("dar", "service", "worker", "migrations")
SOURCES = sorted(
    path
    for package in (*PACKAGES, "examples", "tests", "benchmarks")
    for path in (ROOT / package).rglob("*.py")
)

EXEMPTION = re.compile(r"# noqa: [A-Z0-9, ]+ - .{10}|# type: ignore\[[a-z, -]+\] +# .{10}")
"""A code, and in words why the rule does not apply here."""

DOLLAR = re.compile(r"(?<!\\)\$(?:$|[)|])")

BARE_SLOW = re.compile(r"pytest\.mark\.slow\b(?!  # .{10})")
"""The marker without a reason on its line."""

VIOLATIONS = {
    "service and worker import dar and never each other": (
        "service/http/errors.py",
        "import worker.spool",
    ),
    "dar imports neither service, worker nor migrations": (
        "dar/client/files.py",
        "import service.app",
    ),
    "inside dar a lower layer never imports a higher one": (
        "dar/rewards/base.py",
        "import dar.client",
    ),
    "inside service a lower layer never imports a higher one": (
        "service/store/jobs.py",
        "import service.http.auth",
    ),
    "no package or module imports itself through others": (
        "service/store/events.py",
        "import service.store.jobs",
    ),
    "inside dar.rewards a lower layer never imports a higher one": (
        "dar/rewards/http/wire.py",
        "import dar.rewards.protocols.native",
    ),
    "inside dar.training a lower layer never imports a higher one": (
        "dar/training/model/policy.py",
        "import dar.training.step.loop",
    ),
    "inside worker a lower layer never imports a higher one": (
        "worker/folders.py",
        "import worker.slot",
    ),
    "torch stays in dar.training: nothing else reaches it, even transitively": (
        "dar/protocol/jobs.py",
        "import torch",
    ),
    "no web, database or queue library in dar.training": (
        "dar/training/loss.py",
        "import sqlalchemy",
    ),
}
"""Contract -> a line in a file that breaks it."""


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_every_import_contract_has_a_violation_to_try() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {contract["name"] for contract in config["tool"]["importlinter"]["contracts"]}
    assert names == set(VIOLATIONS)


@pytest.mark.slow  # each runs the import linter over the whole product
@pytest.mark.parametrize("contract", VIOLATIONS)
def test_an_import_contract_fails_when_it_is_broken(contract: str, source_copy: Path) -> None:
    name, line = VIOLATIONS[contract]
    file = source_copy / name
    original = file.read_text()
    try:
        file.write_text(f"{original}\n{line}\n")
        result = lint_imports(source_copy)
    finally:
        file.write_text(original)
    assert result.returncode == 1
    assert f"{contract} BROKEN" in result.stdout


@pytest.mark.slow  # `make check` says the same; here it shows that the copy breaks no contract yet
def test_the_import_contracts_hold(source_copy: Path) -> None:
    result = lint_imports(source_copy)
    assert result.returncode == 0, result.stdout


def test_exemptions_from_the_linters_carry_a_reason() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in SOURCES
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if ("# noqa" in line or "# type: ignore" in line) and not EXEMPTION.search(line)
    ]
    assert not bare, "\n".join(["exemptions without a reason:", *bare])


def test_slow_tests_carry_a_reason() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if BARE_SLOW.search(line)
    ]
    assert not bare, "\n".join(["slow tests without a reason:", *bare])


def test_only_one_file_commits() -> None:
    committing = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if "commit()" in path.read_text()
    ]
    # A migration runs before any request, on a connection and under a lock of its own.
    assert set(committing) == {"service/store/database.py", "service/migrate.py"}


def test_no_pattern_lets_a_line_break_pass_at_its_end() -> None:
    """``$`` of `re` also matches before a last line break; `fullmatch` needs none."""
    found = []
    for package in ("dar", "service", "worker"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re."):
                    written = [
                        part.value for part in ast.walk(node) if isinstance(part, ast.Constant)
                    ]
                    texts = [part if isinstance(part, str) else str(part) for part in written]
                    if any(DOLLAR.search(text) for text in texts):
                        found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, "\n".join(["patterns with $; use fullmatch:", *found])
