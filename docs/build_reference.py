"""Write docs/reference.md from the code: ``python docs/build_reference.py``."""

import ast
import inspect
import itertools
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import orjson
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dar.cli.main import app as command_line
from dar.errors import DARError
from dar.protocol.budget_checks import DEFAULT_BUDGET
from dar.protocol.hints import HINTS, HintThresholds
from dar.protocol.metrics import COMPONENT_METRICS, METRICS
from dar.protocol.presets import PRESETS, PresetValues
from dar.protocol.spec import JobSpec
from dar.settings import Settings, is_secret, variable_of
from page_text import table, wrapped
from service.app import create_app

TARGET = Path(__file__).with_name("reference.md")


def attribute_docs(module: str, name: str) -> dict[str, str]:
    """Map each attribute of a class to the docstring below it."""
    package, _, file = module.rpartition(".")
    tree = ast.parse((files(package) / f"{file}.py").read_text())
    body = next(
        node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name
    ).body
    docs: dict[str, str] = {}
    for node, following in itertools.pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[node.target.id] = " ".join(str(following.value.value).split())
    return docs


def settings() -> str:
    """Every setting with its default and meaning."""
    docs = attribute_docs("dar.settings", "Settings")
    rows = []
    for name, field in Settings.model_fields.items():
        variable = variable_of(name, field)
        or_file = f"`, `{variable}_FILE" if is_secret(field.annotation) else ""
        default = field.default
        if field.default_factory is not None:
            shown = "this machine's name"
        elif default in (None, "", ()):
            shown = "none"
        else:
            shown = f"`{','.join(default) if isinstance(default, tuple) else default}`"
        rows.append((f"`{variable}{or_file}`", shown, docs[name]))
    return table(("variable", "default", "meaning"), rows)


def job_spec() -> str:
    """Every field of a job spec, then the values of the presets."""
    rows = [
        (f"`{path}`", _WITH_BUDGET.get(path) or _shown(field), _meaning(field))
        for path, field in _fields(JobSpec, prefix="")
    ]
    names = dict.fromkeys(name for preset in PRESETS.values() for name in _preset(preset))
    presets = [
        (f"`{name}`", *(f"`{orjson.dumps(_preset(preset)[name]).decode()}`" if name in _preset(preset) else "" for preset in PRESETS.values()))
        for name in names
    ]  # fmt: skip
    return f"{table(('field', 'default', 'meaning'), rows)}\n\n{_PRESETS}\n\n{table(('field', *PRESETS), presets)}"


_OF_DAR = "method.dar.hyperparameters"
_WITH_BUDGET = {
    f"{_OF_DAR}.alpha": "by `kl_budget`, else `0.1`",
    f"{_OF_DAR}.beta": "by `kl_budget`, else `0.3`",
    f"{_OF_DAR}.kl_budget": f"`{DEFAULT_BUDGET:g}`, or `null`: see there",
}
"""Defaults that depend on what is sent: the field alone does not show them."""

_PRESETS = (
    "A preset sets the fields that a spec leaves out; an empty cell means the default above. "
    + " ".join(f"`{name}`: {preset.meaning}." for name, preset in PRESETS.items())
)  # fmt: skip


def _preset(preset: PresetValues) -> dict[str, Any]:
    return {**preset.hyperparameters, **preset.sampling}


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        inner = [kind for kind in _kinds(field.annotation) if _is_model(kind)]
        if not inner:
            yield f"{prefix}{name}", field
            continue
        is_list = get_origin(field.annotation) is list
        others = {kind for kind in _kinds(field.annotation) if not _is_model(kind)}
        if others or field.description:
            yield f"{prefix}{name}", field
        if others - {type(None)}:  # the meaning of such a field describes each form
            continue
        for kind in inner:
            yield from _fields(kind, f"{prefix}{name}{'[]' if is_list else ''}.")


def _kinds(annotation: object) -> list[Any]:
    parts = get_args(annotation)
    return [kind for part in parts for kind in _kinds(part)] if parts else [annotation]


def _is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _shown(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "the fields below"
    return f"`{orjson.dumps(value).decode()}`"


def _meaning(field: FieldInfo) -> str:
    """The description, and the values of an enumeration that it does not name."""
    text = " ".join((field.description or "").split())
    values = [str(value) for value in _values(field.annotation)]
    if len(values) < 2 or all(f"``{value}``" in text for value in values):
        return text
    return f"{text} Values: {', '.join(f'``{value}``' for value in values)}."


def _values(annotation: object) -> list[object]:
    """The values of every `Literal` in ``annotation``."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in _values(part)]


def errors() -> str:

    def walk(cls: type[DARError]) -> Iterator[type[DARError]]:
        yield cls
        for child in cls.__subclasses__():
            # Internal errors of a package are not documented.
            if child.__module__ == cls.__module__:
                yield from walk(child)

    rows = [
        (f"`{cls.code}`", cls.status, "yes" if cls.retryable else "no", f"`{cls.__name__}`",
         (inspect.getdoc(cls) or "").splitlines()[0])
        for cls in walk(DARError)
    ]  # fmt: skip
    return table(("code", "HTTP", "retry helps", "class", "meaning"), rows)


def metrics() -> str:
    rows: list[tuple[str, str, str]] = [(f"`{m.name}`", m.unit, m.meaning) for m in METRICS]
    rows += [
        (f"`{prefix}/<component>/{last}`", unit, meaning)
        for prefix, series in COMPONENT_METRICS.items()
        for last, (unit, meaning) in series.items()
    ]
    return table(("name", "unit", "meaning"), rows)


def hints() -> str:
    """Every threshold of a hint."""
    docs = attribute_docs("dar.protocol.hints", "HintThresholds")
    rows = [
        (f"`{one.name}`", getattr(HINTS, one.name), docs[one.name])
        for one in fields(HintThresholds)
    ]
    return table(("threshold", "value", "meaning"), rows)


def routes() -> str:
    """Every route of the OpenAPI document."""
    document: dict[str, Any] = create_app(Settings(home=Path("/nonexistent"))).openapi()
    rows = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            text = operation.get("description") or operation.get("summary") or ""
            rows.append((f"`{method.upper()} {path}`", text.split("\n\n")[0].replace("\n", " ")))
    return table(("route", "what it does"), rows)


def named_commands(group: object) -> Iterator[tuple[str, Any]]:
    """Yield all commands of a group, each with the words that call it."""
    for name, command in getattr(group, "commands", {}).items():
        if hasattr(command, "commands"):
            yield from ((f"{name} {below}", found) for below, found in named_commands(command))
        else:
            yield name, command


def commands() -> str:
    """Every command, then every option, with its help."""
    found = list(named_commands(typer.main.get_command(command_line)))
    summaries = [
        (f"`dar {name}`", (command.help or "").split("\n\n")[0].replace("\n", " "))
        for name, command in found
    ]
    options = [
        (f"`dar {name}`", f"`{option.opts[0]}`", " ".join((option.help or "").split()))
        for name, command in found
        for option in command.params
    ]
    return (
        f"{table(('command', 'what it does'), summaries)}\n\n"
        "`dar train --help` lists the options of `dar train`: the fields of `DARConfig` "
        "([Python API](python.md)).\n\n"
        f"{table(('command', 'option', 'meaning'), options)}"
    )


def reference() -> str:
    sections = {
        "Settings": "All processes read the same environment variables. A secret may also be in a file: `DAR_API_KEY_FILE` is the "
        "path of a file with the value of `DAR_API_KEY`.\n\n" + settings(),
        "Routes": "All routes except `/healthz` and `/readyz` need `Authorization: Bearer <key>`; a reward callback needs the "
        "token of its request. `GET /openapi.json` has the full schemas.\n\n" + routes(),
        "Job spec": "The body of `POST /v1/fine_tuning/jobs`. Unknown fields are rejected. The DAR fields have the names and defaults of "
        "`dar.DARConfig`. A meaning that starts with `http:`, `builtin:` or `hf_model:` is for components of that `kind` only.\n\n" + job_spec(),
        "Errors": "Every failure of every route has the body `{\"error\": {\"message\", \"type\", \"param\", \"code\", "
        "\"errors\": [{\"param\", \"message\", \"code\", \"row\"}], \"request_id\"}}`. The SDK raises the class.\n\n" + errors(),
        "Metrics": metrics(),
        "Hints": "These thresholds decide when a job or `dar train` warns during training, and when the probe of a reward "
        "service warns (`dar.protocol.hints`). [The guide](guide.md#when-a-job-learns-nothing) says what to do.\n\n" + hints(),
        "Commands": commands(),
    }  # fmt: skip
    text = "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())
    head = "# Reference\n\nWritten by `python docs/build_reference.py` from the code.\n"
    return wrapped(head + text.replace("``", "`"))


if __name__ == "__main__":
    TARGET.write_text(reference())
    sys.stdout.write(f"{TARGET}\n")
