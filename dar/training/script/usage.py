"""Refuses a wrong command line of ``dar train`` in a fraction of a second.

The parser of `dar.training.script.flags` knows every option in detail, but it is made of
dataclasses whose import loads torch and transformers, which takes seconds. Here the names and kinds
of the options are read from the source of these dataclasses. What passes is parsed again by that
parser, so this check may be lenient and must never be stricter.
"""

import argparse
import ast
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from dar.errors import InvalidRequestError
from dar.training.config.fields import SPEC_FIELDS
from dar.training.config.ranges import check_ranges
from dar.training.script.arguments import (
    SWITCHES,
    CommandLine,
    ScriptArguments,
    asks_for_forecast,
    command_of,
    parsed,
)
from dar.training.script.exits import fail
from dar.training.script.places import check_places

OF_CONFIG = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("dar", "training/config/config.py", "DARConfig"),
)
"""Package, file and class of the dataclasses of all training arguments."""
NUMBERS: Mapping[object, type] = {"int": int, "float": float}
"""Annotations whose values are parsed as numbers."""


def refused(arguments: Sequence[str]) -> int | None:
    """Show what is wrong with a command line.

    Returns:
        The exit code; None if nothing wrong was found.
    """
    if "--help" in arguments:
        return None
    try:
        check_line(parsed(arguments, QuickParser(is_forecast=asks_for_forecast(arguments))))
    except InvalidRequestError as error:
        return fail(error)
    except OSError:  # a library that has no source: only the whole parser knows
        return None
    return None


def check_line(line: CommandLine) -> None:
    """Check values, files and folders of a parsed command line.

    Raises:
        InvalidRequestError: One of them cannot be used; ``param`` names the option.
    """
    check_ranges(line.config)
    check_places(line)


class QuickParser(argparse.ArgumentParser):
    """All flags, with the kinds of those whose kind is simple; every other value is a text."""

    def __init__(self, *, is_forecast: bool = False) -> None:
        super().__init__(prog=command_of(is_forecast), allow_abbrev=False, add_help=False)
        self.actions_by_name: dict[str, argparse.Action] = {}
        self._add("config", {})
        for name in SWITCHES:
            self._add(name, {"action": "store_true"})
        hints = get_type_hints(ScriptArguments)
        for one in fields(ScriptArguments):
            more = {name: one.metadata[name] for name in ("action",) if name in one.metadata}
            self._add(one.name, _options(hints[one.name]) | more)
        for name, annotation in config_fields().items():
            kind = SPEC_FIELDS[name].annotation if name in SPEC_FIELDS else None
            is_chosen = get_origin(kind) is Literal and "|" not in annotation
            self._add(name, _options(kind if is_chosen else annotation))
            if annotation == "bool":
                self.add_argument(
                    f"--no_{name}", dest=name, action="store_false", default=argparse.SUPPRESS
                )

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting.

        Raises:
            InvalidRequestError: Always.
        """
        unknown, sign, rest = message.partition("unrecognized arguments: --")
        name = re.split(r"[ =]", rest, maxsplit=1)[0]
        close = get_close_matches(name, self.actions_by_name, n=1) if sign and not unknown else ()
        advice = f"; did you mean --{close[0]}?" if close else ""
        raise InvalidRequestError(f"{message}{advice}; {self.prog} --help lists all options")

    def _add(self, name: str, options: dict[str, Any]) -> None:
        action = self.add_argument(f"--{name}", default=argparse.SUPPRESS, **options)
        self.actions_by_name[name] = action


def config_fields() -> dict[str, str]:
    """Annotation of every argument of `dar.DARConfig`, by name.

    Raises:
        OSError: The source of a library is missing.
    """
    found: dict[str, str] = {}
    for package, file, class_name in OF_CONFIG:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(package)
        source = (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                found |= {
                    item.target.id: ast.unparse(item.annotation)
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
    return {name: kind for name, kind in found.items() if not name.startswith("_")}


def _options(kind: object) -> dict[str, Any]:
    """Arguments of `argparse.ArgumentParser.add_argument` for an annotation or its source."""
    parts = [part for part in (get_args(kind) or ()) if part is not type(None)]
    if get_origin(kind) is Literal:
        return {"choices": list(get_args(kind))}
    if get_origin(kind) is list:
        return {"nargs": "+", "type": parts[0] if parts[0] in (int, float) else str}
    if len(parts) == 1:
        kind = parts[0]
    text = kind.__name__ if isinstance(kind, type) else str(kind).removesuffix(" | None")
    if "list[" in text:
        return {"nargs": "+"}
    if text == "bool":
        return {"nargs": "?", "const": True, "type": truth}
    return {"type": NUMBERS[text]} if text in NUMBERS else {}


def truth(text: str) -> bool:
    """The value of a switch.

    Raises:
        ArgumentTypeError: It is neither true nor false.
    """
    known = {"true": True, "yes": True, "t": True, "y": True, "1": True}
    known |= {"false": False, "no": False, "f": False, "n": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return known[text.lower()]
