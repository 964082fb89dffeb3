"""Base classes of all wire models: strict inputs, complete outputs, both frozen."""

import ast
import functools
import inspect
import json
import math
import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


MOST_PROBLEMS = 8
"""Most NaN or infinite values that one error lists."""


def _finite(value: Any) -> Any:  # noqa: ANN401 - a JSON value of any shape
    """Refuse NaN and infinity anywhere in a JSON value, which JSON cannot carry."""
    problems: list[InitErrorDetails] = []
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while waiting and len(problems) < MOST_PROBLEMS:
        path, item = waiting.pop()
        if isinstance(item, float) and not math.isfinite(item):
            problems.append(InitErrorDetails(type="finite_number", loc=path, input=item))
        elif isinstance(item, dict):
            waiting += [((*path, str(name)), each) for name, each in item.items()]
        elif isinstance(item, list | tuple):
            waiting += [((*path, place), each) for place, each in enumerate(item)]
    if problems:
        raise ValidationError.from_exception_data("JSON", problems)
    return value


FreeValue = Annotated[Any, AfterValidator(_finite)]
"""A JSON value of any shape, without NaN and infinity."""
FreeObject = Annotated[dict[str, Any], AfterValidator(_finite)]
"""A JSON object of any shape, without NaN and infinity."""


def only(value: object) -> BeforeValidator:
    """Accept only ``value``; the error names it, so that a client knows what to send."""

    def check(given: object) -> object:
        if given != value or isinstance(given, bool) != isinstance(value, bool):
            raise PydanticCustomError(
                "unsupported_value",
                "this version supports only {supported} here; send that or leave the field out",
                {"supported": json.dumps(value)},
            )
        return given

    return BeforeValidator(check)


def one_of(forms: str, **models: "type[BaseModel]") -> WrapValidator:
    """One error for a value that fits no branch of a union, in place of one for each branch.

    Args:
        forms: What may be sent, for the message.
        models: Branches that are objects, by the name of their only field; the error
            of an object with this field says what is wrong with it.
    """

    def check(given: object, validate: ValidatorFunctionWrapHandler) -> object:
        try:
            return validate(given)
        except ValidationError:
            if isinstance(given, dict) and len(given) == 1:
                model = models.get(next(iter(given)))
                if model is not None:
                    return model.model_validate(given)
            raise PydanticCustomError("union_form", "must be {forms}", {"forms": forms}) from None

    return WrapValidator(check)


def _unwrap_descriptions(schema: dict[str, Any]) -> None:
    for described in (schema, *schema.get("properties", {}).values()):
        if "description" in described:
            described["description"] = " ".join(described["description"].split())


@functools.cache
def _docstrings_of(module: str) -> Mapping[str, Mapping[str, str]]:
    """The docstrings of the attributes of each class of a module."""
    found = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                field.target.id: inspect.cleandoc(note.value.value)
                for field, note in pairwise(node.body)
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(note, ast.Expr)
                and isinstance(note.value, ast.Constant)
                and isinstance(note.value.value, str)
            }
    return found


class WireModel(BaseModel):
    """A model with a published schema: docstrings describe its fields, each on one line.

    Pydantic's own ``use_attribute_docstrings`` reads the source once for each class, which takes a
    quarter of the service's start.
    """

    model_config = ConfigDict(frozen=True, json_schema_extra=_unwrap_descriptions)

    def __init_subclass__(cls, **config: Any) -> None:  # noqa: ANN401 - any setting of pydantic
        super().__init_subclass__(**config)
        annotations = inspect.get_annotations(cls)
        for name, text in _docstrings_of(cls.__module__).get(cls.__qualname__, {}).items():
            cls.__annotations__[name] = Annotated[annotations[name], Field(description=text)]


class Input(WireModel):
    """Data from a client.

    Unknown fields, wrong types, NaN and infinity are errors with their path.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Output(WireModel):
    """Data from the service. It has no defaults, so that no field is left out by accident.

    A client ignores unknown fields, so that an older SDK can read a newer service.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


Item = TypeVar("Item")


class Page(Output, Generic[Item]):
    """One page of a list; the next one starts with ``after=<last_id>``."""

    object: Literal["list"]
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(Output):
    """Response to a DELETE."""

    id: str
    object: str
    deleted: bool


class ErrorProblem(Output):
    """One problem of a request."""

    param: str | None
    """Path of the parameter."""
    message: str
    code: str
    row: int | None = None
    """Row of an uploaded file, counted from 1."""


class ErrorDetail(Output):
    """What is wrong with a request, where, and what to do."""

    message: str
    type: str
    param: str | None
    """Path of the wrong parameter."""
    code: str
    errors: list[ErrorProblem]
    """All problems, if there are several."""
    request_id: str | None
    """For the operator of the service."""


class ErrorBody(Output):
    """The body of every response with a status of 400 or more."""

    error: ErrorDetail


MAX_COUNT = 2**31 - 1
"""Largest step, attempt or row number: the limit of an integer column in every database."""

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""A count, or a step number, from 0."""

Number = Annotated[int, Field(ge=1, le=MAX_COUNT)]
"""The number of an attempt, a row or a step, counted from 1."""

Instant = Annotated[float, Field(ge=0, le=253_402_300_799)]
"""Seconds since 1970, up to the year 9999."""

UnixSeconds = Annotated[int, Field(ge=0)]
"""An instant on the OpenAI-shaped objects: seconds since 1970, UTC."""
