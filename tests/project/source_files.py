"""Source files as the measuring command reads them: functions, prose, lines of code."""

import ast
import io
import re
import sys
import tokenize
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

SKIPPED = {".venv", ".git", "node_modules", "__pycache__", "build", "dist", "stored"}

WIDTH = 100

DIALECT = {
    "tell": r"tells?|telling",
    "told": r"told",
    "spare": r"spares?|spared|sparing",
    "law": r"(?<!Little's )laws?",
    "standing": r"standing",
    "verdict": r"verdicts?",
    "fate": r"fates?",
    "want of": r"want\s+of",
    "for ever": r"for\s+ever",
    "whoever": r"whoever",
    "has it": r"has\s+it",
    "look for": r"look(?:s|ed|ing)?\s+for",
}
"""Words that CONTRIBUTING.md rules out, each as a regular expression."""

DIALECT_WORD = re.compile(
    "|".join(f"(?P<w{i}>\\b(?:{form})\\b)" for i, form in enumerate(DIALECT.values())),
    re.IGNORECASE,
)
CODE_SPAN = re.compile(r"(`+)(?:.+?)\1", re.DOTALL)
PRAGMA = re.compile(r"#\s*(?:noqa|type:\s*ignore|fmt:|ruff:|pragma:|mypy:|pyright:)")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Prose:
    """A docstring, a comment or a Markdown paragraph line."""

    line: int
    text: str
    kind: str


@dataclass(frozen=True)
class FunctionSize:
    """How long a function is and how many parameters it takes, ``self`` aside."""

    name: str
    line: int
    lines: int
    parameters: int


def width(text: str) -> int:
    """Columns of a line; East Asian wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def is_string(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@dataclass
class Module:
    """A Python file, parsed once."""

    root: Path
    path: Path
    text: str = field(init=False)

    def __post_init__(self) -> None:
        self.text = self.path.read_text(encoding="utf-8")

    @cached_property
    def file(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    @cached_property
    def folder(self) -> str:
        return self.file.rpartition("/")[0]

    @cached_property
    def name(self) -> str:
        """The dotted name; a package's ``__init__`` has the package's."""
        return self.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @cached_property
    def comments(self) -> list[tuple[int, str]]:
        """Line and text of each comment: a number sign that is in no string begins it.

        The syntax tree has the strings, and reading tokens would take ten times as long.
        """
        strings: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for node in self.nodes:
            if isinstance(node, ast.JoinedStr) or (
                isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
            ):
                last = node.end_lineno or node.lineno
                for line in range(node.lineno, last + 1):
                    start = node.col_offset if line == node.lineno else 0
                    end = (node.end_col_offset or 0) if line == last else sys.maxsize
                    strings[line].append((start, end))
        found = []
        for number, line in enumerate(self.lines, start=1):
            if "#" not in line:
                continue
            encoded = line.encode()
            for match in re.finditer(b"#", encoded):
                if not any(start <= match.start() < end for start, end in strings[number]):
                    found.append((number, encoded[match.start() :].decode()))
                    break
        return found

    @property
    def is_face(self) -> bool:
        return self.path.name == "__init__.py"

    @cached_property
    def functions(self) -> list[FunctionSize]:
        return [size_of(node) for node in self.nodes if isinstance(node, Function)]

    @cached_property
    def strings(self) -> list[ast.Expr]:
        """Strings that stand alone: docstrings, and the notes below an attribute."""
        return [node for node in self.nodes if isinstance(node, ast.Expr) and is_string(node)]

    @cached_property
    def docstring_count(self) -> int:
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        return sum(
            bool(node.body) and is_string(node.body[0])
            for node in self.nodes
            if isinstance(node, owners)
        )

    @cached_property
    def prose(self) -> list[Prose]:
        comments = [Prose(line, text, "comment") for line, text in self.comments]
        docstrings = [
            Prose(
                node.lineno, "\n".join(self.lines[node.lineno - 1 : node.end_lineno]), "docstring"
            )
            for node in self.strings
        ]
        return comments + docstrings

    @cached_property
    def messages(self) -> list[Prose]:
        """Texts with a space in them that are no docstrings: errors, help, descriptions."""
        alone = {id(node.value) for node in self.strings}
        return [
            Prose(node.lineno, node.value, "message")
            for node in self.nodes
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and " " in node.value
            and id(node) not in alone
        ]

    @cached_property
    def code_lines(self) -> int:
        """Lines that are neither blank nor comment nor docstring."""
        ignored = {
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        }
        alone = {node.lineno for node in self.strings}
        used: set[int] = set()
        for token in self.tokens:
            first, last = token.start[0], token.end[0]
            is_docstring = token.type == tokenize.STRING and first in alone
            if token.type not in ignored and not is_docstring:
                used.update(range(first, last + 1))
        return len(used)

    @cached_property
    def wide_prose(self) -> list[int]:
        """Numbers of lines beyond the width that hold prose; a ``noqa`` and its reason is free."""
        prose: set[int] = set()
        for item in self.prose:
            if item.kind == "docstring":
                prose.update(range(item.line, item.line + item.text.count("\n") + 1))
            else:
                prose.add(item.line)
        return [number for number in sorted(prose) if self._is_wide(self.lines[number - 1])]

    def _is_wide(self, line: str) -> bool:
        pragma = PRAGMA.search(line)
        kept = line[: pragma.start()].rstrip() if pragma else line
        return width(kept) > WIDTH and len(kept.split()) > 1


def size_of(node: Function) -> FunctionSize:
    arguments = node.args
    names = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    extra = sum(arg is not None for arg in (arguments.vararg, arguments.kwarg))
    count = len([name for name in names if name not in ("self", "cls")]) + extra
    last = node.end_lineno or node.lineno
    return FunctionSize(node.name, node.lineno, last - node.lineno + 1, count)


@dataclass
class Markdown:
    """A Markdown file and its paragraph lines."""

    root: Path
    path: Path

    @cached_property
    def file(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    @cached_property
    def prose(self) -> list[Prose]:
        """Lines of paragraphs, list items and quotes: no tables, code, headings, link targets."""
        found = []
        fence = ""
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            text = line.strip()
            mark = re.match(r"(```+|~~~+)", text.lstrip("> "))
            if fence:
                if mark and mark[1].startswith(fence):
                    fence = ""
            elif mark:
                fence = mark[1]
            elif text and not re.match(r"\||#{1,6} |<|\[[^\]]+\]:\s|[-:| ]+$", text):
                found.append(Prose(number, line, "markdown"))
        return found

    @cached_property
    def wide_prose(self) -> list[int]:
        """Numbers of lines beyond the width; one long word, link or code span is free."""
        return [
            item.line for item in self.prose if width(item.text) > WIDTH and can_break(item.text)
        ]


def can_break(line: str) -> bool:
    text = re.sub(r"^\s*(?:>\s*)*(?:[-*+]\s+|\d+[.)]\s+)?", "", line)
    whole = re.sub(r"!?\[[^\]]*\]\([^)]*\)", "link", CODE_SPAN.sub("code", text))
    return len(whole.split()) > 1


def python_files(root: Path, packages: Iterable[str]) -> Iterator[Path]:
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            if not SKIPPED & set(path.parts):
                yield path


def dialect_words(prose: Iterable[Prose]) -> Iterator[tuple[str, int]]:
    """Each word of the list in a text, and its line. Code spans are not prose."""
    words = list(DIALECT)
    for item in prose:
        text = CODE_SPAN.sub(lambda span: "\n" * span[0].count("\n"), item.text)
        for match in DIALECT_WORD.finditer(text):
            index = int((match.lastgroup or "w0")[1:])
            yield words[index], item.line + text.count("\n", 0, match.start())
