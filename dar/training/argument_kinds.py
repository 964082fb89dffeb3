"""Kinds of the arguments of `dar.DARTrainer`: another kind is refused by the argument's name.

Python checks no annotation, so a wrong kind would fail deep inside with an error that names
nothing.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec

from peft import PeftConfig, PeftMixedModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.protocol.reward_spec import Rewards
from dar.training.config.config import DARConfig
from dar.training.model.adapters import LanguageModel

P = ParamSpec("P")
Kinds = tuple[type, ...]

SINGLE: Mapping[str, tuple[Kinds, str]] = {
    "model": (
        (str, Path, *LanguageModel.__args__, PeftMixedModel),
        "a folder, a hub id, or a model of transformers or peft",
    ),
    "args": ((DARConfig,), "a DARConfig"),
    "processing_class": ((PreTrainedTokenizerBase,), "a tokenizer of transformers"),
    "ref_model": (
        LanguageModel.__args__,
        "a model; load it with AutoModelForCausalLM.from_pretrained",
    ),
    "peft_config": ((PeftConfig,), "a config of peft, such as LoraConfig(r=8)"),
    "compute_metrics": ((Callable,), "a function"),  # type: ignore[dict-item]  # isinstance takes it
}
"""Arguments that hold one thing, with their kinds, and these in words."""
MODELS = "a folder, a hub id, a sequence classifier of transformers, or a list of these"
SEVERAL: Mapping[str, tuple[Kinds, Kinds, str]] = {
    "reward_funcs": (
        (str, Callable),  # type: ignore[dict-item]  # isinstance takes it
        (Rewards,),
        "a function, a URL, a list of these, or the rewards of a job spec, of which "
        "dar.protocol.reward_spec.Rewards.model_validate makes such an object",
    ),
    "reward_model": ((str, Path, PreTrainedModel), (Mapping,), MODELS),
    "reward_processing_class": (
        (PreTrainedTokenizerBase, type(None)),
        (),
        "a tokenizer of transformers, or a list of these",
    ),
}
"""Arguments that hold one thing or a list: kinds of an item, other kinds, and these in words."""


def with_checked_kinds(init: Callable[P, None]) -> Callable[P, None]:
    """``init`` of a trainer, which first rejects arguments of other kinds.

    Raises:
        InvalidRequestError: By the new function, if an argument is of another kind.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(*args: P.args, **given: P.kwargs) -> None:
        for name, value in signature.bind(*args, **given).arguments.items():
            _check(name, value)
        init(*args, **given)

    return checked


def _check(name: str, value: object) -> None:
    if name in SINGLE:
        kinds, words = SINGLE[name]
        wrong = [] if isinstance(value, kinds) or (value is None and name != "model") else [value]
    elif name in SEVERAL:
        items, others, words = SEVERAL[name]
        is_one = value is None or isinstance(value, (*items, *others))
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        listed = value if is_list else [value]
        wrong = [] if is_one else [one for one in listed if not isinstance(one, items)]  # type: ignore[attr-defined]  # a sequence
    else:
        return
    if wrong:
        raise InvalidRequestError(
            f"{name} has {type(wrong[0]).__name__} {wrong[0]!r:.60}, but must be {words}",
            param=name,
        )
