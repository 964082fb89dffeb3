"""The parser of ``dar train``: fields of `ScriptArguments` and `DARConfig` as flags."""

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn, get_origin

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from dar.errors import InvalidRequestError
from dar.training.config.config import DARConfig
from dar.training.config.ignored import WITHOUT_EFFECT
from dar.training.script.arguments import (
    SWITCHES,
    CommandLine,
    ScriptArguments,
    asks_for_forecast,
    command_of,
    parsed,
)

COMMON = (
    "output_dir", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type", "optim", "weight_decay",
    "max_grad_norm", "bf16", "fp16", "gradient_checkpointing", "seed", "use_cpu", "logging_steps",
    "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "eval_strategy",
    "eval_steps", "report_to", "run_name", "push_to_hub", "hub_model_id", "hub_private_repo",
    "hub_strategy",
)  # fmt: skip
"""Flags of transformers that most runs set; they come first in the help."""
USAGE = """
  dar train --model_name_or_path MODEL --dataset_name DATA --output_dir FOLDER
      --reward_url URL | --reward_function MODULE:NAME | --reward_model_name_or_path MODEL
      [--config FILE.yaml] [--preset default|paper|reference] [--dry_run] [options]"""
DESCRIPTION = """\
Train a language model by Direct Advantage Regression on its own samples. Rows that
hold completions with rewards are trained on directly; they need no reward option.

A value comes from the first of: the command line, the file of --config, --preset, the
defaults shown here. With several processes:
  accelerate launch --num_processes 2 -m dar.training, followed by the same options."""
FORECAST_USAGE = """
  dar forecast --model_name_or_path MODEL --dataset_name DATA
      --reward_url URL | --reward_function MODULE:NAME | --reward_model_name_or_path MODEL
      [--config FILE.yaml] [--kl_budget X] [options]"""
FORECAST_DESCRIPTION = """\
Show how much reward each distance from the base model buys, before anything is
trained. A forecast samples the base model on at most 16 of the prompts, has the
completions scored, and estimates from them, for each KL in nats, the mean reward at
which training ends. It trains nothing and writes nothing. At most 4,096 completions
are sampled: as many as a KL of --kl_budget (1.5 if it is not given) takes.

Example:
  dar forecast --model_name_or_path models/base --dataset_name prompts.jsonl \\
      --reward_url http://127.0.0.1:8000/score --max_new_tokens 64

  KL (nats)   mean reward    alpha     beta
          0        0.1006
       0.50        0.6607    0.453     1.359
       1.00        0.8135   0.1899   0.5698
       1.50        0.8742  0.07502   0.2251

Read: dar train with --kl_budget 1 is expected to end at a mean reward of 0.81, and
another half nat buys 0.06 more.

Other options of dar train may be given too, and then have no effect."""
FORECAST_OPTIONS = ("config", "help", "seed", "use_cpu", "bf16", "fp16")
"""Options that the help of a forecast shows beside those of `ScriptArguments` and DAR's own."""
CLEARER = {
    "output_dir": "Folder of checkpoints and of the trained model.",
    "per_device_train_batch_size": "Prompts of each process in a step, before accumulation.",
    "gradient_accumulation_steps": "Multiplies the prompts per step, like a larger batch.",
    "gradient_checkpointing": "Recompute activations in the backward pass: less memory, more time.",
    "gradient_checkpointing_kwargs": "Its arguments for torch.utils.checkpoint, as JSON.",
    "activation_checkpointing": "Another name of --gradient_checkpointing.",
    "activation_checkpointing_kwargs": "Another name of --gradient_checkpointing_kwargs.",
    "max_steps": "Optimizer steps; takes precedence over --num_train_epochs.",
    "warmup_steps": "Steps over which the learning rate rises from 0; below 1: a share of all.",
    "logging_strategy": "Whether to report: steps, or no.",
    "save_strategy": "Whether to write checkpoints: steps, or no.",
    "push_to_hub": "Push every checkpoint and the trained model to the hub.",
    "hub_strategy": "What is pushed: end, every_save, checkpoint or all_checkpoints; the last two "
    "can be resumed from.",
    "resume_from_checkpoint": "Checkpoint of a run with the same arguments to resume; latest, or "
    "true: the newest in --output_dir.",
    "report_to": "Trackers: none, all, wandb, trackio or tensorboard; several in a YAML list.",
}
"""Help that replaces the help of transformers where this is missing or wrong here."""
UNSUPPORTED = {"lr_scheduler_type": ("greedy", "reduce_lr_on_plateau")}
"""Choices of transformers that need what has no effect here: a metric for the best model."""
LONGEST_CHOICES = 60
"""Longest list of choices that the help shows, in characters."""
GROUPS = {
    "script": "model, data, rewards",
    "dar": "Direct Advantage Regression",
    "common": "training",
    "other": "further options of transformers.TrainingArguments",
}


class FlagParser(HfArgumentParser):
    """Flags of two dataclasses. It returns only what is given, and raises on errors."""

    def __init__(self, *, is_forecast: bool = False) -> None:
        self.actions_by_name: dict[str, argparse.Action] = {}
        self._is_forecast = is_forecast
        self._titled: dict[str, Any] = {}
        self._own = {f.name for f in fields(DARConfig)} - {
            f.name for f in fields(TrainingArguments)
        }
        self._script = {f.name for f in fields(ScriptArguments)}
        dataclasses: Any = [ScriptArguments, DARConfig]
        super().__init__(
            dataclasses,
            prog=command_of(is_forecast),
            usage=FORECAST_USAGE if is_forecast else USAGE,
            description=FORECAST_DESCRIPTION if is_forecast else DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # noqa: ANN401 - as argparse
        """Add a flag under its name with underscores, to its group."""
        name = names[0].lstrip("-")
        if options.get("choices"):
            options["choices"] = _with_effect(name, options["choices"])
        plain = [other for other in names if "-" not in other.lstrip("-")]
        is_switch = options.get("action") in {"store_true", "store_false", "help"}
        if options.get("type") is dict or get_origin(options.get("type")) is dict:
            options["type"] = json_object  # transformers would call dict with the text
        options["help"] = _help(name, options)
        if self._is_forecast and name not in {*self._own, *self._script, *FORECAST_OPTIONS}:
            options["help"] = argparse.SUPPRESS
        if len(", ".join(map(str, options.get("choices") or ()))) > LONGEST_CHOICES:
            options["metavar"] = "NAME"
        options["default"] = argparse.SUPPRESS
        if not is_switch and not options.get("choices"):
            options.setdefault("metavar", _metavar(options.get("type")))
        action: argparse.Action = self._group(name).add_argument(*plain, **options)
        if not name.startswith("no_"):
            self.actions_by_name[name] = action
        return action

    def _group(self, name: str) -> Any:  # noqa: ANN401 - argparse's class is private
        if not self._titled:
            self._titled = {key: self.add_argument_group(title) for key, title in GROUPS.items()}
        places: tuple[tuple[str, Collection[str]], ...] = (
            ("script", self._script | {"config", "help", *SWITCHES}),
            ("dar", self._own),
            ("common", COMMON),
        )
        found = (key for key, members in places if name.removeprefix("no_") in members)
        return self._titled[next(found, "other")]

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting.

        Raises:
            InvalidRequestError: Always.
        """
        raise InvalidRequestError(f"{message}; {self.prog} --help lists all options")


def _help(name: str, options: Mapping[str, Any]) -> str:
    """The help of a flag with its default; suppressed for options that have no effect."""
    if name.removeprefix("no_") in WITHOUT_EFFECT and name not in COMMON:
        return argparse.SUPPRESS
    if name.startswith("no_"):
        return f"Not --{name[3:]}."
    text = CLEARER.get(name) or str(options.get("help") or "").replace("``", "")
    default = getattr(options.get("default"), "value", options.get("default"))
    if isinstance(default, list):
        default = " ".join(map(str, default))
    if default in (None, "", argparse.SUPPRESS) or isinstance(default, bool):
        return text
    return f"{text} (default: {default})"


def _with_effect(name: str, choices: Collection[str]) -> Collection[str]:
    """Those of the choices of transformers that this trainer supports."""
    kept = WITHOUT_EFFECT.get(name, choices)
    return [one for one in choices if one in kept and one not in UNSUPPORTED.get(name, ())]


def json_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ArgumentTypeError: It is something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a JSON object")
    return value


def _metavar(kind: object) -> str:
    names: dict[object, str] = {
        int: "N",
        float: "X",
        str: "TEXT",
        string_to_bool: "true|false",
        json_object: "JSON",
    }
    return names.get(kind, "NAME" if isinstance(kind, type) else "JSON")


def make_parser(*, is_forecast: bool = False) -> FlagParser:
    """The parser of ``dar train``, or of ``dar forecast``, whose help is another one."""
    parser = FlagParser(is_forecast=is_forecast)
    parser.add_argument("--config", metavar="FILE.yaml", help="Values for any of these options.")
    for name, text in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--help", action="help", help="Show this.")
    return parser


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """Parse flags and the YAML file.

    Raises:
        InvalidRequestError: A flag or a key of the file is unknown, missing or has a wrong value.
        SystemExit: The help was requested, and shown.
    """
    return parsed(arguments, make_parser(is_forecast=asks_for_forecast(arguments)))
