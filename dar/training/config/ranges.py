"""Bounds of the options of `dar.DARConfig`; a bad value fails with the option's name.

Options that a job spec has by the same name take their bounds from it, but not those that protect
a service (`dar.protocol.spec.ServiceLimit`): a script may exceed them. Importing this module loads
no torch.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from dar.errors import InvalidRequestError
from dar.protocol.spec import ServiceLimit
from dar.training.config.fields import SPEC_FIELDS

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is allowed, and what it must be in words."""

BOUNDS: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}
"""How a bound of pydantic compares a value with a limit, and how that reads."""


def _number(*, is_whole: bool = False, is_optional: bool = False, **limits: float) -> Rule:
    def check(value: object) -> bool:
        if value is None:
            return is_optional
        if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):
            return False
        return (is_whole or math.isfinite(value)) and all(
            BOUNDS[name][0](value, limit) for name, limit in limits.items()
        )

    words = " and ".join(f"{BOUNDS[name][1]} {limit}" for name, limit in limits.items())
    return check, f"{'a whole number' if is_whole else 'a number'}, {words}"


def _are_texts(value: object) -> bool:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return False
    return all(isinstance(one, str) and one for one in value)


_AT_LEAST_0 = _number(ge=0)
_ABOVE_0 = _number(gt=0)
_COUNT = _number(is_whole=True, ge=1)

RANGES: Mapping[str, Rule] = {
    "output_dir": (lambda value: "\0" not in str(value), "a path without NUL characters"),
    "stop": (_are_texts, "a list of strings, none of them empty"),
    "adam_epsilon": _AT_LEAST_0,
    "warmup_steps": _AT_LEAST_0,  # below 1: a share of all steps, which a job cannot give
    "num_train_epochs": _ABOVE_0,
    "max_steps": (
        lambda value: value == -1 or _COUNT[0](value),
        "a whole number, at least 1, or -1: then num_train_epochs decides",
    ),
    "logging_steps": _ABOVE_0,
    "save_steps": _ABOVE_0,
    "eval_steps": _number(gt=0, is_optional=True),
    "eval_delay": _AT_LEAST_0,
    "save_total_limit": _number(is_whole=True, ge=1, is_optional=True),
    "ddp_timeout": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "seed": _number(is_whole=True, ge=0, lt=2**32),  # numpy's; a job's is stored with a sign
}
"""Options that no job spec has, or, with the reason, that have other bounds here."""
WIDER = ("optim", "lr_scheduler_type")
"""Options with more choices in transformers, which checks them itself, than in a job spec."""


def rule_of(spec: FieldInfo) -> Rule | None:
    """The rule of a field of the job spec; None for kinds that need none here."""
    kind = spec.annotation
    if get_origin(kind) is Literal:
        names = get_args(kind)
        return lambda value: value in names, f"{', '.join(names[:-1])} or {names[-1]}"
    kinds = get_args(kind) or (kind,)
    is_whole = int in kinds
    if not is_whole and float not in kinds:
        return None
    limits = {
        name: getattr(bound, name)
        for bound in spec.metadata
        for name in BOUNDS
        if hasattr(bound, name) and not isinstance(getattr(bound, name), ServiceLimit)
    }
    return _number(is_whole=is_whole, is_optional=type(None) in kinds, **limits)


def check_ranges(values: Mapping[str, Any]) -> None:
    """Check values of `dar.DARConfig` by name, all or some.

    Raises:
        InvalidRequestError: One is out of range; ``param`` names it.
    """
    of_spec = {
        name: rule
        for name, spec in SPEC_FIELDS.items()
        if name in values and name not in WIDER and (rule := rule_of(spec))
    }
    for name, (is_right, words) in (of_spec | dict(RANGES)).items():
        if name in values and not is_right(values[name]):
            raise InvalidRequestError(
                f"{name} is {values[name]!r}, but must be {words}", param=name
            )
