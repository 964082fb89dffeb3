"""What the options of `dar.DARConfig` may be: checked before anything else, so that a slip is told by name and not by a traceback."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dar.errors import InvalidRequestError
from dar.protocol.spec import Order, Overlap
from dar.training.loss import Baseline, Behavior, LogRatio, Normalization, WeightNormalization

if TYPE_CHECKING:
    from dar.training.config.config import DARConfig

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value may be, and what it must be in words."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(least: int) -> Rule:
    def check(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return check, f"a whole number, at least {least}"


def _number(check: Callable[[float], bool], rule: str) -> Rule:
    return lambda value: _is_number(value) and check(value), rule


def _or_none(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), rule[1]


def _one_of(names: Iterable[str]) -> Rule:
    words = list(names)
    return lambda value: value in words, " or ".join((", ".join(words[:-1]), words[-1]))


def _are_texts(value: object) -> bool:
    return not isinstance(value, str) and isinstance(value, Iterable) and all(value)


def _are_trackers(value: object) -> bool:
    names = [value] if value is None or isinstance(value, str) else value
    known = {None, "none", "all", *INTEGRATION_TO_CALLBACK}
    return isinstance(names, list | tuple) and all(name in known for name in names)


_AT_LEAST_0 = _number(lambda value: value >= 0, "a number, at least 0")
_ABOVE_0 = _number(lambda value: value > 0, "a number above 0")
_DECAY = _number(lambda value: 0 <= value < 1, "a number, at least 0 and below 1")

RANGES: Mapping[str, Rule] = {
    "alpha": _AT_LEAST_0,
    "beta": _ABOVE_0,
    "dar_k": _count(1),
    "dar_wclip": _ABOVE_0,
    "adv_norm": _one_of(get_args(Normalization)),
    "baseline": _one_of(get_args(Baseline)),
    "log_ratio": _one_of(get_args(LogRatio)),
    "tie_tolerance": _AT_LEAST_0,
    "weight_norm": _one_of(get_args(WeightNormalization)),
    "min_ess": _DECAY,
    "behavior": _one_of(get_args(Behavior)),
    "overlap": _one_of(get_args(Overlap)),
    "order": _one_of(get_args(Order)),
    "max_new_tokens": _count(1),
    "temperature": _ABOVE_0,
    "top_p": _number(lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "top_k": _count(0),
    "min_p": _or_none(_number(lambda value: 0 <= value <= 1, "a number between 0 and 1")),
    "repetition_penalty": _ABOVE_0,
    "stop": (_are_texts, "a list of strings, none of them empty"),
    "max_length": _or_none(_count(2)),
    "max_prompt_length": _or_none(_count(1)),
    "learning_rate": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_epsilon": _AT_LEAST_0,
    "max_grad_norm": _AT_LEAST_0,
    "warmup_steps": _AT_LEAST_0,
    "num_train_epochs": _ABOVE_0,
    "max_steps": _count(-1),
    "logging_steps": _ABOVE_0,
    "save_steps": _ABOVE_0,
    "eval_steps": _or_none(_ABOVE_0),
    "eval_delay": _AT_LEAST_0,
    "save_total_limit": _or_none(_count(1)),
    "ddp_timeout": _count(1),
    "per_device_train_batch_size": _count(1),
    "gradient_accumulation_steps": _count(1),
    "seed": (
        lambda value: _count(0)[0](value) and value < 2**32,
        "a whole number from 0 to 2**32 - 1",
    ),
    "report_to": (_are_trackers, f"none, all, or of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"),
}


def check_ranges(config: "DARConfig") -> None:
    """Refuse values that cannot be meant.

    Raises:
        InvalidRequestError: One is; ``param`` names it.
    """
    for name, (is_right, rule) in RANGES.items():
        value = getattr(config, name)
        if not is_right(value):
            raise InvalidRequestError(f"{name} is {value!r}, but must be {rule}", param=name)
