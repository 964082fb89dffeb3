"""Write docs/python.md from signatures and docstrings: ``python docs/build_python.py``."""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from transformers import Trainer, TrainingArguments

from dar import DARConfig, DARTrainer, DataCollatorForDAR
from dar.protocol.presets import PRESETS
from dar.training.config.config import preset_values
from dar.training.config.fields import HelpText
from dar.training.config.ignored import OF_EVALUATION, WITHOUT_EFFECT
from dar.training.evaluation import Predictions
from dar.training.reward_sources import RewardFunctions
from page_text import table, wrapped

TARGET = Path(__file__).with_name("python.md")
SECTION = re.compile(r"^(Args|Returns|Raises|Yields):$")
ENTRY = re.compile(r"^    (\*{0,2}\w+): (.*)$")
FROM_TRL = {"reward_funcs", "reward_weights", "peft_config", "ref_model"}
"""Parameters that TRL's trainers have with the same names."""
REWARD_FUNCTIONS = re.sub(r"\b(?:\w+\.)+(\w)", r"\1", inspect.formatannotation(RewardFunctions))
"""The expanded type, which is too long to read; the page shows ``RewardFunctions``."""
METHODS = ("train", "evaluate", "save_model", "push_to_hub")


@dataclass(slots=True)
class Doc:
    """A parsed docstring in Google's style."""

    text: str = ""
    sections: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, thing: object) -> "Doc":
        found, name = cls(), ""
        body: list[str] = []
        for line in (inspect.getdoc(thing) or "").splitlines():
            if match := SECTION.match(line):
                name = match[1]
                found.sections[name] = []
            elif name:
                found.sections[name].append(line)
            else:
                body.append(line)
        found.text = "\n".join(body).strip()
        return found

    def entries(self, section: str) -> dict[str, str]:
        """Map each name in a section to its text."""
        said: dict[str, str] = {}
        for line in self.sections.get(section, ()):
            if match := ENTRY.match(line):
                said[match[1]] = match[2]
            elif line.strip():
                said[list(said)[-1]] += f" {line.strip()}"
        return said

    def paragraph(self, section: str) -> str:
        return " ".join(line.strip() for line in self.sections.get(section, ()) if line.strip())


def shown_type(annotation: object) -> str:
    """Format a type without module names."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:\w+\.)+(\w)", r"\1", text.replace("'Predictions'", "Predictions"))
    return f"`{text}`".replace(REWARD_FUNCTIONS, "RewardFunctions")


def shown_value(value: object) -> str:
    """Format a default as in source code."""
    if value in (MISSING, inspect.Parameter.empty):
        return "required"
    return f"`{value.value if isinstance(value, Enum) else value!r}`"


def trainer() -> str:
    """`DARTrainer`: parameters, then methods."""
    doc = Doc.of(DARTrainer)
    said = doc.entries("Args")
    inherited = inspect.signature(Trainer.__init__).parameters
    rows = []
    for name, parameter in inspect.signature(DARTrainer.__init__).parameters.items():
        if name == "self":
            continue
        source = (
            "TRL" if name in FROM_TRL else "`transformers.Trainer`" if name in inherited else "own"
        )
        rows.append(
            (f"`{name}`", shown_type(parameter.annotation), shown_value(parameter.default), said.pop(name), source)
        )  # fmt: skip
    assert not said, f"documented, but not a parameter: {', '.join(said)}"
    parameters = table(("parameter", "type", "default", "meaning", "source"), rows)
    methods = "\n\n".join(function(getattr(DARTrainer, name)) for name in METHODS)
    return f"{doc.text}\n\n{parameters}\n\n{raises(doc)}\n\n{methods}"


def function(thing: Callable[..., object]) -> str:
    """Describe a method: parameters, result, exceptions."""
    doc = Doc.of(thing)
    said = doc.entries("Args")
    parameters = [
        p
        for p in inspect.signature(thing).parameters.values()
        if p.name in said and not p.name.startswith("_")
    ]
    rows = [
        (f"`{p.name}`", shown_type(p.annotation), shown_value(p.default), said[p.name])
        for p in parameters
    ]
    parts = [f"### `{thing.__name__}`", doc.text]
    if rows:
        parts.append(table(("parameter", "type", "default", "meaning"), rows))
    if doc.paragraph("Returns"):
        parts.append(f"Returns: {doc.paragraph('Returns')}")
    return "\n\n".join(part for part in (*parts, raises(doc)) if part)


def raises(doc: Doc) -> str:
    return "\n".join(f"- raises `{name}`: {when}" for name, when in doc.entries("Raises").items())


def config() -> str:
    """`DARConfig`: its own fields in full, then the inherited ones in short."""
    doc = Doc.of(DARConfig)
    presets = {name: preset_values(name) for name in PRESETS if name != "default"}
    # transformers' argument parser changes the types of the fields in place, so these are not used.
    types = get_type_hints(DARConfig)
    rows = []
    for one in fields(DARConfig):
        meaning = one.metadata.get("help")
        if isinstance(meaning, HelpText):
            others = (
                f"`{values[one.name]}`" if one.name in values else "" for values in presets.values()
            )
            rows.append(
                (f"`{one.name}`", shown_type(types[one.name]), meaning.unit, shown_value(default(one)), *others, meaning, meaning.source)
            )  # fmt: skip
    headings = ("field", "type", "unit", "default", *presets, "meaning", "source")
    own = table(headings, rows)
    return f"{doc.text}\n\n{own}\n\n{raises(doc)}\n\n### Inherited options\n\n{inherited(presets)}"


def inherited(presets: Mapping[str, Mapping[str, Any]]) -> str:
    """Options of transformers: accepted ones with their defaults, then rejected ones."""
    ours = {one.name: one for one in fields(DARConfig)}
    rows = []
    for theirs in fields(TrainingArguments):
        own = ours[theirs.name]
        if theirs.name in WITHOUT_EFFECT or isinstance(own.metadata.get("help"), HelpText):
            continue
        preset = ", ".join(
            f"{name}: `{values[own.name]}`"
            for name, values in presets.items()
            if own.name in values
        )
        rows.append((f"`{own.name}`", shown_value(default(own)), preset))
    changed = [
        (f"`{theirs.name}`", shown_value(default(ours[theirs.name])), shown_value(default(theirs)))
        for theirs in fields(TrainingArguments)
        if default(theirs) != default(ours[theirs.name])
    ]
    refused = ", ".join(f"`{name}`" for name in sorted(WITHOUT_EFFECT))
    evaluation = "; ".join(
        f'{", ".join(f"`{name}`" for name in names)} with `eval_strategy="{strategy}"`'
        for strategy, names in OF_EVALUATION.items()
        if names
    )
    return "\n\n".join(
        (
            "These defaults differ from those of transformers:",
            table(("option", "here", "in transformers"), changed),
            "These have the meaning that `transformers.TrainingArguments` documents:",
            table(("option", "default", "in a preset"), rows),
            f"These would have no effect, so only their neutral value is accepted: {refused}; and {evaluation}.",
        )
    )


def default(one: "Field[Any]") -> object:
    return one.default if one.default_factory is MISSING else one.default_factory()


def collator() -> str:
    doc, said = Doc.of(DataCollatorForDAR), Doc.of(DataCollatorForDAR).entries("Args")
    rows = [
        (f"`{one.name}`", shown_type(one.type), shown_value(default(one)), said[one.name], "own")
        for one in fields(DataCollatorForDAR)
    ]
    parameters = table(("parameter", "type", "default", "meaning", "source"), rows)
    return f"{doc.text}\n\n{parameters}\n\n{function(DataCollatorForDAR.__call__)}"


def predictions() -> str:
    """`Predictions`, from the docstrings below its attributes."""
    tree = ast.parse(inspect.getsource(Predictions)).body[0]
    assert isinstance(tree, ast.ClassDef)
    said = {
        node.target.id: " ".join(str(after.value.value).split())
        for node, after in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    rows = [(f"`{one.name}`", shown_type(one.type), said[one.name]) for one in fields(Predictions)]
    return f"{Doc.of(Predictions).text}\n\n{table(('attribute', 'type', 'meaning'), rows)}"


def page() -> str:
    sections = {
        "DARTrainer": trainer(),
        "DARConfig": config(),
        "DataCollatorForDAR": collator(),
        "Predictions": predictions(),
    }
    text = "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())
    head = (
        "# Python API\n\nWritten by `python docs/build_python.py` from the code. Shapes: P prompts, K completions per "
        "prompt, B = P * K completions, T tokens. [dar.md](dar.md) has the method, with the numbered equations "
        "and departures.\n"
    )
    return wrapped(head + re.sub(r"(?<!`)``(?!`)", "`", text))


if __name__ == "__main__":
    TARGET.write_text(page())
    sys.stdout.write(f"{TARGET}\n")
