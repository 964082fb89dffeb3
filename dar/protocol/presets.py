"""Presets: named sets of hyperparameters, for job specs and for `dar.DARConfig` alike.

``default`` changes nothing: the fields have their own defaults. ``docs/decisions`` says how these
were chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Preset = Literal["default", "paper", "reference"]

ONLINE_ONLY = (
    "dar_k",
    "behavior",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop",
)
"""Hyperparameters and sampling options without effect if completions are read from the data."""

_NO_DEPARTURES = {
    "baseline": "mean",
    "log_ratio": "sum",
    "tie_tolerance": 0.0,
    "drop_ties": False,
    "allow_missing": False,
    "weight_norm": "none",
    "min_ess": 0.0,
    "behavior": "policy",
}


@dataclass(frozen=True, slots=True)
class PresetValues:
    """Values that a preset sets in place of the defaults, by the names of a job spec."""

    meaning: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)


PRESETS: Mapping[str, PresetValues] = {
    "default": PresetValues("the values that did best in our experiments"),
    "paper": PresetValues(
        "the recipe of arXiv 2602.11523: alpha + beta = 0.05, alpha / (alpha + beta) = 0.1",
        {
            **_NO_DEPARTURES,
            "alpha": 0.005,
            "beta": 0.045,
            "dar_k": 4,
            "dar_wclip": 20.0,
            "adv_norm": "batch",
            "learning_rate": 1e-6,
            "batch_size": 128,
            "warmup_steps": 15,
            "lr_scheduler_type": "constant",
            "optim": "adafactor",
        },
        {"temperature": 0.9},
    ),
    "reference": PresetValues(
        "the defaults of the first public trainer; all options that dar.md lists as departures are off",
        {
            **_NO_DEPARTURES,
            "alpha": 0.1,
            "beta": 0.1,
            "dar_k": 2,
            "dar_wclip": 50.0,
            "adv_norm": "per_prompt",
            "learning_rate": 1e-6,
            "batch_size": 8,
            "warmup_steps": 0,
            "lr_scheduler_type": "linear",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optim": "adamw",
        },
        {
            "max_new_tokens": 128,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": None,
            "repetition_penalty": 1.0,
            "max_length": 1024,
            "max_prompt_length": 512,
        },
    ),
}
