"""Write docs/python.md from signatures and docstrings, so that it cannot disagree with them: ``python docs/build_python.py``."""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
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

TARGET = Path(__file__).with_name("python.md")
SECTION = re.compile(r"^(Args|Returns|Raises|Yields):$")
ENTRY = re.compile(r"^    (\*{0,2}\w+): (.*)$")
FROM_TRL = {"reward_funcs", "reward_weights", "peft_config", "ref_model"}
"""Parameters that TRL's trainers have by the same names."""
REWARD_FUNCTIONS = re.sub(r"\b(?:\w+\.)+(\w)", r"\1", inspect.formatannotation(RewardFunctions))
"""Too long to be read."""
METHODS = ("train", "evaluate", "save_model", "push_to_hub")


@dataclass(slots=True)
class Doc:
    """A docstring of Google's style, taken apart."""

    text: str = ""
    sections: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, thing: object) -> "Doc":
        """The docstring of a class or function."""
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
        """What a section says of each name."""
        said: dict[str, str] = {}
        for line in self.sections.get(section, ()):
            if match := ENTRY.match(line):
                said[match[1]] = match[2]
            elif line.strip():
                said[list(said)[-1]] += f" {line.strip()}"
        return said

    def paragraph(self, section: str) -> str:
        """A section as one paragraph."""
        return " ".join(line.strip() for line in self.sections.get(section, ()) if line.strip())


def table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    headings = list(headings)
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [headings, ["---"] * len(headings), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown_type(annotation: object) -> str:
    """A type as one writes it."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:\w+\.)+(\w)", r"\1", text.replace("'Predictions'", "Predictions"))
    return f"`{text}`".replace(REWARD_FUNCTIONS, "RewardFunctions")


def shown_value(value: object) -> str:
    """A default as one writes it."""
    if value in (MISSING, inspect.Parameter.empty):
        return "required"
    return f"`{value.value if isinstance(value, Enum) else value!r}`"


def trainer() -> str:
    """`DARTrainer`: its parameters, then its methods."""
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
    assert not said, f"documented and not there: {', '.join(said)}"
    parameters = table(("parameter", "type", "default", "meaning", "source"), rows)
    methods = "\n\n".join(function(getattr(DARTrainer, name)) for name in METHODS)
    return f"{doc.text}\n\n{parameters}\n\n{raises(doc)}\n\n{methods}"


def function(thing: Callable[..., object]) -> str:
    """A method with its parameters, what it returns and what it raises."""
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
    """What is raised, and when."""
    return "\n".join(f"- raises `{name}`: {when}" for name, when in doc.entries("Raises").items())


def config() -> str:
    """`DARConfig`: its own fields in full, then the inherited ones."""
    doc = Doc.of(DARConfig)
    presets = {name: preset_values(name) for name in PRESETS if name != "default"}
    # Not the fields' own types: transformers' argument parser narrows these in place.
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
    """Options of transformers: those that do what transformers says, and those that are refused."""
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
            "These defaults are not those of transformers:",
            table(("option", "here", "in transformers"), changed),
            "These mean what `transformers.TrainingArguments` says:",
            table(("option", "default", "in a preset"), rows),
            f"These would do nothing, and are refused at any value but their neutral one: {refused}; and {evaluation}.",
        )
    )


def default(one: "Field[Any]") -> object:
    """What a field is when it is not given."""
    return one.default if one.default_factory is MISSING else one.default_factory()


def collator() -> str:
    """`DataCollatorForDAR`."""
    doc, said = Doc.of(DataCollatorForDAR), Doc.of(DataCollatorForDAR).entries("Args")
    rows = [
        (f"`{one.name}`", shown_type(one.type), shown_value(default(one)), said[one.name], "own")
        for one in fields(DataCollatorForDAR)
    ]
    parameters = table(("parameter", "type", "default", "meaning", "source"), rows)
    return f"{doc.text}\n\n{parameters}\n\n{function(DataCollatorForDAR.__call__)}"


def predictions() -> str:
    """`Predictions`, from the docstrings under its attributes."""
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
    """The whole page."""
    sections = {
        "DARTrainer": trainer(),
        "DARConfig": config(),
        "DataCollatorForDAR": collator(),
        "Predictions": predictions(),
    }
    text = "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())
    head = (
        "# Python API\n\nWritten by `python docs/build_python.py` from the code. Shapes: P prompts, K completions of each, "
        "B = P * K completions, T tokens. The method, with its equations and departures by number: [dar.md](dar.md).\n"
    )
    return head + re.sub(r"(?<!`)``(?!`)", "`", text)


if __name__ == "__main__":
    TARGET.write_text(page())
    sys.stdout.write(f"{TARGET}\n")
