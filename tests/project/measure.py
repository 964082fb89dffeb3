"""Measure the size and shape of the source tree, and check the size rule.

``python tests/project/measure.py [--root DIR] [--json] [--before FILE] [--words] [--list]``
prints one table. ``--json`` prints every number and list for a program, and ``--before`` puts the
numbers of an earlier ``--json`` beside today's.

The tables of kinds and main modules describe today's tree. A change of the tree may add a row, with
its reason; a test fails if a row names what does not exist.
"""

import argparse
import ast
import json
import os
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from source_files import (
    CODE_SPAN,
    DIALECT,
    SKIPPED,
    WIDTH,
    FunctionSize,
    Markdown,
    Module,
    dialect_words,
    python_files,
)

PRODUCT = ("dar", "service", "worker", "migrations")
OTHERS = ("tests", "examples", "benchmarks", "docs")
MOST_MODULES = 14
MOST_TEST_MODULES = 25
MOST_FILE_LINES = 700
MOST_FUNCTION_LINES = 80
FEWEST_FILE_LINES = 50

NOUN_FOLDERS = {"dar/protocol", "dar/client", "service/api", "service/store"}
"""Folders with one file per noun, the same name in every layer."""

MIGRATIONS = "migrations/versions"
"""One file for each change of the schema, and none ever goes."""

PLUGIN_FOLDERS = {
    *("dar/rewards/builtins", "dar/rewards/protocols"),
    "service/storage",  # found by the scheme of a URL
    MIGRATIONS,
}
"""Folders whose files are found by a table or by name, and grow with what they support."""

MAIN_MODULES = {
    # the commands
    "dar/cli": ["dar.cli.main"],
    # the commands, and the longest of them
    "dar/cli/reward": ["dar.cli.reward.main", "dar.cli.reward.check"],
    # the steps of the demo
    "dar/demo": ["dar.demo.run"],
    # a spec's rewards, and one service
    "dar/rewards": ["dar.rewards.from_spec", "dar.rewards.http_reward"],
    # one service, and one request to it
    "dar/rewards/http": ["dar.rewards.http_reward", "dar.rewards.http.request"],
    # the nine steps
    "dar/rewards/probe": ["dar.rewards.probe.run"],
    # all groups, and the sum of one
    "dar/rewards/scoring": ["dar.rewards.scoring.scorer", "dar.rewards.scoring.combine"],
    # the application, and its routes
    "dar/rewards/server": ["dar.rewards.server.app", "dar.rewards.server.endpoint"],
    # the trainer, and how a job makes one
    "dar/training": ["dar.training.trainer", "dar.training.from_spec"],
    # RunCheckpoints has the other parts
    "dar/training/checkpoint": ["dar.training.checkpoint.resume"],
    # sets by name, and their rows
    "dar/training/data": ["dar.training.data.sets", "dar.training.data.rows"],
    # the base model that the demo trains
    "dar/training/demo": ["dar.training.demo.base"],
    # loading, and Policy
    "dar/training/model": ["dar.training.model.loading", "dar.training.model.policy"],
    # Sampler
    "dar/training/sampling": ["dar.training.sampling.sampler"],
    # the command
    "dar/training/script": ["dar.training.script.main"],
    # StepLoop, and its usual source
    "dar/training/step": ["dar.training.step.loop", "dar.training.step.online"],
    # the application, and what it holds
    "service": ["service.app", "service.runtime"],
    # they start and stop the threads
    "service/background": ["service.runtime", "service.app"],
    # it installs handlers for all routes
    "service/http": ["service.app"],
    # check, probe, store; the same as a dry run; and from another job
    "service/jobs": [
        "service.jobs.submission",
        "service.jobs.validation",
        "service.jobs.copies",
    ],
    # a component's endpoint
    "service/rewards": ["service.rewards.endpoints"],
    # the loop, and what wakes it
    "worker": ["worker.slot", "worker.app"],
    # process 0 of the trainer
    "worker/attempt": ["worker.attempt.main"],
    # the three commands
    "service/backup": [
        "service.backup.backup",
        "service.backup.restore",
        "service.backup.move",
    ],
}
"""Modules that hold a folder's main class, besides its ``__init__``, its ``__main__`` and the
module with the folder's own name; each with what makes it one."""

OTHER_KINDS = {
    "dar/version.py": "noun",  # the build reads the version from this file
    "migrations/env.py": "entry point",  # Alembic runs it
    "dar/demo/reward.py": "entry point",  # the demo starts it: python -m dar.demo.reward
    "dar/training/merge.py": "entry point",  # dar merge
    "dar/training/offline.py": "face",  # the public names of dar.training.step.offline
    "dar/training/report/drift.py": "noun",  # DriftWatch: reads metrics, knows no step
    "service/installation.py": "noun",  # Installation: settings and database, below HTTP
    "service/runtime.py": "noun",  # Runtime: what one service process holds
}


class Tree:
    """All files of a checkout, and what is measured of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.product = [Module(root, path) for path in python_files(root, PRODUCT)]
        self.others = [Module(root, path) for path in python_files(root, OTHERS)]
        self.tests = [module for module in self.others if module.file.startswith("tests/")]
        self.by_name = {module.name: module for module in self.product}

    @cached_property
    def markdown(self) -> list[Markdown]:
        paths: list[Path] = []
        for folder, inner, names in os.walk(self.root):
            inner[:] = (
                set(inner) - SKIPPED
            )  # the virtual environment has tens of thousands of files
            paths += [Path(folder, name) for name in names if name.endswith(".md")]
        return [Markdown(self.root, path) for path in sorted(paths)]

    # Imports

    def imported(self, module: Module) -> set[str]:
        """Product modules that a module imports anywhere: type-only, in a function, by name."""
        found: set[str] = set()
        for node in module.nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found.add(inner if inner in self.by_name else node.module)
            elif isinstance(node, ast.Call) and _is_import_module(node):
                found.add(node.args[0].value)  # type: ignore[attr-defined]  # checked in the line above
        return {name for name in found if name in self.by_name and name != module.name}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        return {module.name: self.imported(module) for module in self.product}

    @cached_property
    def importers(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {module.name: set() for module in self.product}
        for importer, names in self.imports.items():
            for name in names:
                found[name].add(importer)
        return found

    @cached_property
    def cycles(self) -> list[list[str]]:
        return sorted(sorted(group) for group in strongly_connected(self.imports) if len(group) > 1)

    # Kinds

    @cached_property
    def entry_points(self) -> set[str]:
        """Console scripts, modules run by ``python -m``, and ``module:attribute`` strings."""
        config = tomllib.loads((self.root / "pyproject.toml").read_text(encoding="utf-8"))
        scripts = config.get("project", {}).get("scripts", {}).values()
        found = {script.partition(":")[0] for script in scripts}
        for module in self.product:
            found.update(run_by_name(module))
        return found & set(self.by_name)

    def mains(self, folder: str) -> set[str]:
        """Modules that hold a folder's main class."""
        package = folder.replace("/", ".")
        own = f"{package}.{package.rpartition('.')[2]}"
        return {package, f"{package}.__main__", own, *MAIN_MODULES.get(folder, [])}

    def kind(self, module: Module) -> str:
        """face, entry point, noun, plug-in, or an empty string."""
        if module.is_face:
            return "face"
        if module.path.name == "__main__.py" or module.name in self.entry_points:
            return "entry point"
        if module.file in OTHER_KINDS:
            return OTHER_KINDS[module.file]
        if module.folder in NOUN_FOLDERS:
            return "noun"
        return "plug-in" if module.folder in PLUGIN_FOLDERS else ""

    def kind_with_importer(self, module: Module) -> str:
        """The kind, where a member of its folder's main class and the main module itself count."""
        kind = self.kind(module)
        if kind:
            return kind
        if module.name in self.mains(module.folder):
            return "main"
        return "member" if self.importers[module.name] <= self.mains(module.folder) else ""

    @cached_property
    def single_importers(self) -> dict[str, dict[str, str]]:
        """Module file -> its only importer and its kind; "cut by length" where it has none."""
        return {
            module.file: {
                "importer": next(iter(self.importers[module.name])),
                "kind": self.kind_with_importer(module) or "cut by length",
            }
            for module in self.product
            if len(self.importers[module.name]) == 1
        }

    @cached_property
    def unimported(self) -> list[str]:
        """Modules that no module of the product, no example and no benchmark imports."""
        elsewhere: set[str] = set()
        for module in self.others:
            if not module.file.startswith("tests/"):
                elsewhere |= self.imported(module)
        return [
            module.file
            for module in self.product
            if not self.importers[module.name]
            and module.name not in elsewhere
            and self.kind(module) in ("", "noun")
            and module.file not in OTHER_KINDS
        ]

    # Sizes

    @cached_property
    def folders(self) -> dict[str, int]:
        """Folder -> modules directly in it, without its ``__init__``."""
        found: dict[str, int] = defaultdict(int)
        for module in (*self.product, *self.tests):
            if not module.is_face:
                found[module.folder] += 1
        return dict(sorted(found.items()))

    @cached_property
    def crowded_folders(self) -> dict[str, int]:
        return {
            folder: count for folder, count in self.folders.items() if is_crowded(folder, count)
        }

    @cached_property
    def small_modules(self) -> dict[str, dict[str, Any]]:
        return {
            module.file: {"lines": len(module.lines), "kind": self.kind(module) or "none"}
            for module in self.product
            if len(module.lines) < FEWEST_FILE_LINES
        }

    def long_functions(self, most: int, modules: list[Module]) -> dict[str, int]:
        return {
            f"{module.file}:{function.line} {function.name}": function.lines
            for module in modules
            for function in module.functions
            if function.lines > most and not is_migration(module, function)
        }

    @property
    def all_modules(self) -> list[Module]:
        return [*self.product, *self.others]

    @cached_property
    def long_files(self) -> dict[str, int]:
        return {
            module.file: len(module.lines)
            for module in self.all_modules
            if len(module.lines) > MOST_FILE_LINES
        }

    # Names

    @cached_property
    def repeated_classes(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for module in self.product:
            for node in module.tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name].append(module.file)
        return {name: files for name, files in sorted(found.items()) if len(files) > 1}

    @cached_property
    def tables_without_row(self) -> list[str]:
        return [
            f"{module.file}:{node.lineno} {node.name}"
            for module in self.product
            for node in module.nodes
            if isinstance(node, ast.ClassDef) and is_table(node) and not node.name.endswith("Row")
        ]

    # Libraries

    @cached_property
    def private_uses(self) -> list[str]:
        """Private names of others: ``SLF001`` exemptions, ``getattr(x, "_name")``, imports."""
        found = []
        for module in self.product:
            noted = {n for n, line in enumerate(module.lines, start=1) if "SLF001" in line}
            noted.update(line for node in module.nodes for line in private_names(node))
            found += [f"{module.file}:{n} {module.lines[n - 1].strip()}" for n in sorted(noted)]
        return found

    # Prose

    @cached_property
    def wide_prose(self) -> dict[str, list[int]]:
        files: list[Module | Markdown] = [*self.all_modules, *self.markdown]
        return {file.file: file.wide_prose for file in files if file.wide_prose}

    @cached_property
    def guillemets(self) -> dict[str, list[int]]:
        return self._prose_with(lambda text: len(re.findall("[«»]", text)))

    @cached_property
    def dialect(self) -> dict[str, dict[str, list[int]]]:
        """Word -> file -> lines of docstrings, comments and Markdown that use it."""
        found: dict[str, dict[str, list[int]]] = {word: {} for word in DIALECT}
        for file in (*self.all_modules, *self.markdown):
            for word, line in dialect_words(file.prose):
                found[word].setdefault(file.file, []).append(line)
        return found

    @cached_property
    def dialect_messages(self) -> list[str]:
        """The same words in strings of the product that a user may read."""
        return [
            f"{module.file}:{line} {word}"
            for module in self.product
            for word, line in dialect_words(module.messages)
        ]

    def _prose_with(self, count: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for file in (*self.all_modules, *self.markdown):
            lines = [
                item.line for item in file.prose for _ in range(count(CODE_SPAN.sub("", item.text)))
            ]
            if lines:
                found[file.file] = lines
        return found


def _is_import_module(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return (
        name == "import_module"
        and bool(node.args)
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    )


def run_by_name(module: Module) -> set[str]:
    """Modules that follow a ``"-m"`` in a list, or stand before a colon in a string."""
    found = set()
    for node in module.nodes:
        if isinstance(node, ast.List | ast.Tuple | ast.Call):
            items = node.args if isinstance(node, ast.Call) else node.elts
            words = [item.value if isinstance(item, ast.Constant) else None for item in items]
            found.update(str(after) for word, after in pairwise(words) if word == "-m")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            target = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+):[a-zA-Z_]+", node.value)
            found.update([target[1]] if target else [])
    return found


def is_crowded(folder: str, count: int) -> bool:
    if folder.split("/")[0] == "tests":
        return count > MOST_TEST_MODULES
    return count > MOST_MODULES and folder not in NOUN_FOLDERS | {MIGRATIONS}


def is_migration(module: Module, function: FunctionSize) -> bool:
    """A migration is one flat list of tables."""
    return module.folder == MIGRATIONS and function.name in ("upgrade", "downgrade")


def is_table(node: ast.ClassDef) -> bool:
    return any(
        isinstance(target, ast.Name) and target.id == "__tablename__"
        for statement in node.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    )


def private_names(node: ast.AST) -> list[int]:
    private = re.compile(r"_[a-zA-Z]\w*")
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr"):
        name = getattr(node.args[1], "value", None) if len(node.args) > 1 else None
        return [node.lineno] if isinstance(name, str) and private.fullmatch(name) else []
    if isinstance(node, ast.ImportFrom):
        words = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        return [node.lineno] if any(private.fullmatch(word) for word in words) else []
    return []


def strongly_connected(graph: dict[str, set[str]]) -> list[set[str]]:
    """Tarjan's algorithm without recursion."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[set[str]] = []
    for start in graph:
        if start in order:
            continue
        work: list[tuple[str, Iterator[str]]] = []
        _enter(start, graph, order, low, stack, work)
        while work:
            node, neighbours = work[-1]
            for neighbour in neighbours:
                if neighbour not in order:
                    _enter(neighbour, graph, order, low, stack, work)
                    break
                if neighbour in stack:
                    low[node] = min(low[node], order[neighbour])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    cut = stack.index(node)
                    groups.append(set(stack[cut:]))
                    del stack[cut:]
    return groups


def _enter(
    node: str,
    graph: dict[str, set[str]],
    order: dict[str, int],
    low: dict[str, int],
    stack: list[str],
    work: list[tuple[str, Iterator[str]]],
) -> None:
    order[node] = low[node] = len(order)
    stack.append(node)
    work.append((node, iter(sorted(graph[node]))))


def quantiles(values: Iterable[int]) -> str:
    ordered = sorted(values)
    if not ordered:
        return "-"
    picked = [ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.5, 0.9, 0.99)]
    return " / ".join(str(value) for value in (*picked, ordered[-1]))


def size_violations(tree: Tree) -> list[str]:
    """Every breach of the size rule, one line each. An empty list is the goal."""
    found = [
        f"{folder}: {count} modules in one folder" for folder, count in tree.crowded_folders.items()
    ]
    found += [f"{file}: {lines} lines" for file, lines in tree.long_files.items()]
    found += [
        f"{where}: a function of {lines} lines"
        for where, lines in tree.long_functions(MOST_FUNCTION_LINES, tree.all_modules).items()
    ]
    found += [
        f"{file}: {small['lines']} lines, and no face, entry point, noun or plug-in"
        for file, small in tree.small_modules.items()
        if small["kind"] == "none"
    ]
    found += [
        f"{file}: only {single['importer']} imports it, so it is a cut by length"
        for file, single in tree.single_importers.items()
        if single["kind"] == "cut by length"
    ]
    found += [f"{file}: nothing imports it" for file in tree.unimported]
    found += [
        f"class {name} stands in {', '.join(files)}"
        for name, files in tree.repeated_classes.items()
    ]
    found += [f"{where}: a table class ends in Row" for where in tree.tables_without_row]
    found += [f"import cycle: {', '.join(cycle)}" for cycle in tree.cycles]
    return found


def wide_violations(tree: Tree, suffix: str) -> list[str]:
    """Lines of prose beyond the width in files of a kind (``.md`` or ``.py``)."""
    return [
        f"{file}:{line}: over {WIDTH} columns"
        for file, lines in tree.wide_prose.items()
        if file.endswith(suffix)
        for line in lines
    ]


def word_violations(tree: Tree) -> list[str]:
    """Guillemets and words of the list in docstrings, comments and Markdown."""
    found = [
        f"{file}:{line}: {word}"
        for word, files in tree.dialect.items()
        for file, lines in files.items()
        for line in lines
    ]
    quotes = [
        f"{file}:{line}: guillemets"
        for file, lines in tree.guillemets.items()
        for line in sorted(set(lines))
    ]
    return sorted(found + quotes)


def missing_mains(tree: Tree) -> list[str]:
    """Entries of the tables above that name no module or folder."""
    names = {main for mains in MAIN_MODULES.values() for main in mains} - set(tree.by_name)
    folders = NOUN_FOLDERS | PLUGIN_FOLDERS | set(MAIN_MODULES)
    gone = {folder for folder in folders if not (tree.root / folder).is_dir()}
    files = {file for file in OTHER_KINDS if not (tree.root / file).exists()}
    return sorted(names | gone | files)


def total(lists: dict[str, list[int]], suffix: str = "") -> int:
    return sum(len(lines) for file, lines in lists.items() if file.endswith(suffix))


def _size_numbers(title: str, modules: list[Module]) -> dict[str, int | str]:
    functions = [
        function
        for module in modules
        for function in module.functions
        if not is_migration(module, function)
    ]
    return {
        f"{title}: modules": len(modules),
        f"{title}: all lines": sum(len(module.lines) for module in modules),
        f"{title}: lines of code": sum(module.code_lines for module in modules),
        f"{title}: file p50 / p90 / p99 / max": quantiles(len(module.lines) for module in modules),
        f"{title}: function p50 / p90 / p99 / max": quantiles(item.lines for item in functions),
        f"{title}: most parameters": max((item.parameters for item in functions), default=0),
    }


def numbers(tree: Tree) -> dict[str, int | str]:
    """Every number of the table, by its row's title."""
    rows: dict[str, int | str] = {}
    for package in PRODUCT:
        rows |= _size_numbers(
            package, [m for m in tree.product if m.file.startswith(f"{package}/")]
        )
    rows |= _size_numbers("product", tree.product)
    rows |= _size_numbers("tests", tree.tests)
    singles = [single["kind"] for single in tree.single_importers.values()]
    rows["product: largest folder but nouns"] = max(
        count
        for folder, count in tree.folders.items()
        if not folder.startswith("tests") and folder not in NOUN_FOLDERS
    )
    rows["tests: largest folder"] = max(
        count for folder, count in tree.folders.items() if folder.startswith("tests")
    )
    rows["folders with too many modules"] = len(tree.crowded_folders)
    rows["modules with one importer"] = len(singles)
    for kind in ("noun", "plug-in", "member", "main", "entry point", "face", "cut by length"):
        rows[f"  {kind}"] = singles.count(kind)
    rows["modules that nothing imports"] = len(tree.unimported)
    rows["modules under 50 lines"] = len(tree.small_modules)
    rows["  without a kind"] = sum(small["kind"] == "none" for small in tree.small_modules.values())
    for most in (MOST_FUNCTION_LINES, 60):
        rows[f"functions over {most} lines"] = len(tree.long_functions(most, tree.all_modules))
    rows["files over 700 lines"] = len(tree.long_files)
    rows["import cycles"] = len(tree.cycles)
    rows["public class names used twice"] = len(tree.repeated_classes)
    rows["table classes not named ...Row"] = len(tree.tables_without_row)
    rows["private names of libraries"] = len(tree.private_uses)
    rows["docstrings: product"] = sum(module.docstring_count for module in tree.product)
    rows["prose lines over 100 columns: product"] = sum(len(m.wide_prose) for m in tree.product)
    rows["prose lines over 100 columns: Python"] = total(tree.wide_prose, ".py")
    rows["prose lines over 100 columns: Markdown"] = total(tree.wide_prose, ".md")
    rows["guillemets in prose"] = total(tree.guillemets)
    rows["words of the list in prose"] = sum(total(files) for files in tree.dialect.values())
    for word, files in tree.dialect.items():
        rows[f"  {word}"] = total(files)
    rows["words of the list in messages"] = len(tree.dialect_messages)
    return rows


def as_json(tree: Tree) -> dict[str, Any]:
    return {
        "numbers": numbers(tree),
        "folders": tree.folders,
        "crowded_folders": tree.crowded_folders,
        "single_importers": tree.single_importers,
        "unimported": tree.unimported,
        "small_modules": tree.small_modules,
        "long_functions": tree.long_functions(60, tree.all_modules),
        "long_files": tree.long_files,
        "cycles": tree.cycles,
        "repeated_classes": tree.repeated_classes,
        "tables_without_row": tree.tables_without_row,
        "private_uses": tree.private_uses,
        "wide_prose": tree.wide_prose,
        "guillemets": tree.guillemets,
        "dialect": tree.dialect,
        "dialect_messages": tree.dialect_messages,
    }


def table(now: dict[str, Any], before: dict[str, Any] | None) -> Iterator[str]:
    if before is None:
        yield from (f"{title:48} {value!s:>26}" for title, value in now.items())
        return
    yield f"{'':48} {'before':>26} {'now':>26}"
    for title in {**before, **now}:
        old, new = str(before.get(title, "-")), str(now.get(title, "-"))
        yield f"{title:48} {old:>26} {new:>26}"


def words_by_file(tree: Tree) -> Iterator[str]:
    found: dict[str, list[str]] = defaultdict(list)
    for word, files in tree.dialect.items():
        for file, lines in files.items():
            found[file].append(f"{word} {', '.join(map(str, lines))}")
    for file, lines in tree.guillemets.items():
        found[file].append(f"guillemets {', '.join(map(str, sorted(set(lines))))}")
    yield from (f"{file}: {'; '.join(words)}" for file, words in sorted(found.items()))
    yield from (f"message: {line}" for line in tree.dialect_messages)


def default_root() -> Path:
    home = Path(__file__).resolve().parents
    is_installed = len(home) > 2 and (home[2] / "pyproject.toml").exists()
    return home[2] if is_installed else Path.cwd()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=default_root())
    parser.add_argument("--json", action="store_true", help="print all numbers and lists as JSON")
    parser.add_argument("--before", type=Path, help="a file of --json to compare with")
    parser.add_argument("--words", action="store_true", help="print the listed words by file")
    parser.add_argument("--list", action="store_true", help="print each breach of the size rule")
    arguments = parser.parse_args()
    tree = Tree(arguments.root.resolve())
    if arguments.json:
        lines: Iterable[str] = [json.dumps(as_json(tree), indent=1, ensure_ascii=False)]
    elif arguments.words:
        lines = words_by_file(tree)
    elif arguments.list:
        lines = size_violations(tree)
    else:
        before = json.loads(arguments.before.read_text()) if arguments.before else None
        lines = table(numbers(tree), before and before["numbers"])
    sys.stdout.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
