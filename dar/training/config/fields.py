"""Fields of a dataclass that take default, help and unit from a field of the job spec."""

from collections.abc import Mapping
from dataclasses import field
from functools import partial
from typing import Any

from pydantic.fields import FieldInfo

from dar.protocol.spec import DARSpec, Hyperparameters, Sampling, Unit

SPEC_FIELDS: Mapping[str, FieldInfo] = {
    **DARSpec.model_fields,
    **Hyperparameters.model_fields,
    **Sampling.model_fields,
}
"""The fields of a job spec by the names that they have in `dar.DARConfig` too."""


class HelpText(str):
    """What a field of `dar.DARConfig` is: the help of its flag, with what docs/python.md adds.

    It is a str because transformers' parser passes all other keys of a field's metadata to
    argparse.
    """

    __slots__ = ("source", "unit")

    source: str
    """Where it comes from: an equation or departure of `dar.training.loss`, a paper, a library."""
    unit: str
    """Unit of its value; empty: a pure number or a word."""


def option(
    text: str, default: object = None, *, source: str = "", unit: str = "", **more: str
) -> Any:  # noqa: ANN401 - as dataclasses.field
    """A dataclass field with a help text.

    Args:
        text: The help.
        default: The value if none is given, or a function that makes it.
        source: See `HelpText`.
        unit: See `HelpText`.
        more: Further arguments of argparse for the flag.
    """
    help_text = HelpText(text)
    help_text.source, help_text.unit = source, unit
    metadata = {"help": help_text, **more}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def spec_field(spec: FieldInfo, *, source: str = "") -> Any:  # noqa: ANN401 - as dataclasses.field
    """A dataclass field with the default and the help of a field of the job spec.

    Args:
        spec: The field of the job spec.
        source: See `HelpText`.
    """
    unit = next((str(note) for note in spec.metadata if isinstance(note, Unit)), "")
    text = " ".join((spec.description or "").split())
    make = partial(spec.get_default, call_default_factory=True)
    default = spec.default if spec.default_factory is None else make
    return option(text, default, source=source, unit=unit)
