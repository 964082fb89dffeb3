"""The command line of `dar train`: fields of `ScriptArguments` and `DARConfig` as flags or YAML.

A value comes from the first of: the command line, the file of ``--config``, ``--preset``, the
defaults. Flags may be written with dashes or underscores.
"""

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from dar.errors import InvalidRequestError
from dar.protocol.spec import LoraSpec
from dar.training.config.config import DARConfig
from dar.training.config.fields import option, spec_field
from dar.training.config.ignored import WITHOUT_EFFECT

_LORA = LoraSpec.model_fields
Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass
class ScriptArguments:
    """The model, its data and its rewards."""

    model_name_or_path: str | None = option(
        "Model that is trained: folder or hub id.", metavar="MODEL"
    )
    dataset_name: str | None = option(
        "Prompts: a JSON Lines, JSON, CSV or Parquet file, a folder, or a hub id.", metavar="DATA"
    )
    dataset_config: str | None = option("Configuration of a hub data set.", metavar="NAME")
    dataset_train_split: str = option("Split that is trained on.", "train", metavar="SPLIT")
    dataset_test_split: str = option(
        "Split that is evaluated on, with --eval_strategy.", "test", metavar="SPLIT"
    )
    eval_dataset_name: str | None = option(
        "Prompts for evaluation, where they are not a split of --dataset_name.", metavar="DATA"
    )
    reward_url: list[str] = option(
        "Reward service; may be repeated. Requests are signed with DAR_REWARD_SECRET, or else the "
        "file reward_secret in DAR_HOME.",
        list,
        metavar="URL",
        action="extend",
    )
    reward_function: list[str] = option(
        "Reward function f(prompts, completions, **columns); may be repeated.",
        list,
        metavar="MODULE:NAME",
        action="extend",
    )
    reward_model_name_or_path: list[str] = option(
        "Reward model: folder or hub id of a sequence classifier with one label; may be repeated.",
        list,
        metavar="MODEL",
        action="extend",
    )
    reward_weights: list[float] = option(
        "Factor of each reward: functions first, then services, then models. (default: 1 each)",
        list,
        metavar="X",
    )
    use_peft: bool = option("Train a LoRA adapter instead of all weights.", default=False)
    lora_r: int = spec_field(_LORA["r"])
    lora_alpha: float = spec_field(_LORA["lora_alpha"])
    lora_dropout: float = spec_field(_LORA["lora_dropout"])
    lora_target_modules: list[str] = option(
        _LORA["target_modules"].description or "",
        lambda: [_LORA["target_modules"].default],
        metavar="NAME",
    )
    dtype: Dtype | None = option(
        "Number format of the weights. (default: float32; under an adapter with --bf16, bfloat16)"
    )
    sample_every: int = option("Steps between two tables of samples; 0: none.", 10)


ONLY_WITH = dict.fromkeys(
    ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"), "use_peft"
)
"""Flags that have no effect without another one."""
REQUIRED = ("model_name_or_path", "dataset_name", "output_dir")
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
    "resume_from_checkpoint": "Checkpoint of a run with the same arguments to resume; latest: the "
    "newest in --output_dir.",
    "report_to": "Trackers: none, all, wandb, trackio or tensorboard; several in a YAML list.",
}
"""Help that replaces the help of transformers where this is missing or wrong here."""
LIST_OR_TEXT = ("report_to", "optim_target_modules", "debug")
"""Options that take one value as a flag, and also a list in a YAML file."""
LONGEST_CHOICES = 60
"""Longest list of choices that the help shows, in characters."""
GROUPS = {
    "script": "model, data, rewards",
    "dar": "Direct Advantage Regression",
    "common": "training",
    "other": "further options of transformers.TrainingArguments",
}


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The options that were given, as flags or in YAML; no defaults."""

    script: ScriptArguments
    config: Mapping[str, Any]
    """Arguments of `DARConfig`."""
    is_dry_run: bool


class FlagParser(HfArgumentParser):
    """Flags of two dataclasses. It returns only what is given, and raises on errors."""

    def __init__(self) -> None:
        self.actions_by_name: dict[str, argparse.Action] = {}
        self._titled: dict[str, Any] = {}
        self._own = {f.name for f in fields(DARConfig)} - {
            f.name for f in fields(TrainingArguments)
        }
        self._script = {f.name for f in fields(ScriptArguments)}
        dataclasses: Any = [ScriptArguments, DARConfig]
        super().__init__(
            dataclasses,
            prog="dar train",
            usage=USAGE,
            description=DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # noqa: ANN401 - as argparse
        """Add a flag under its name with underscores, to its group."""
        name = names[0].lstrip("-")
        plain = [other for other in names if "-" not in other.lstrip("-")]
        is_switch = options.get("action") in {"store_true", "store_false", "help"}
        options["help"] = _help(name, options)
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
            ("script", self._script | {"config", "dry_run", "help"}),
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
        raise InvalidRequestError(f"{message}; dar train --help lists all options")


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


def _metavar(kind: object) -> str:
    names: dict[object, str] = {int: "N", float: "X", str: "TEXT", string_to_bool: "true|false"}
    return names.get(kind, "NAME" if isinstance(kind, type) else "JSON")


def make_parser() -> FlagParser:
    parser = FlagParser()
    parser.add_argument("--config", metavar="FILE.yaml", help="Values for any of these options.")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Load everything, sample and score two prompts, show the plan; write nothing.",
    )
    parser.add_argument("--help", action="help", help="Show this.")
    return parser


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """Parse flags and the YAML file.

    Raises:
        InvalidRequestError: A flag or a key of the file is unknown, missing or has a wrong value.
        SystemExit: The help was requested, and shown.
    """
    parser = make_parser()
    typed = vars(parser.parse_args([_underscored(argument) for argument in arguments]))
    file, is_dry_run = typed.pop("config", None), typed.pop("dry_run", False)
    given = {**(_from_yaml(Path(file), parser) if file else {}), **typed}
    for name in REQUIRED:
        if not given.get(name):
            raise InvalidRequestError(
                f"--{name} is missing; dar train --help lists all options", param=name
            )
    for name, other in ONLY_WITH.items():
        if name in given and not given.get(other):
            raise InvalidRequestError(f"--{name} has no effect without --{other}", param=name)
    for name in ("eval_dataset_name", "dataset_test_split"):
        if name in given and not _evaluates(given):
            raise InvalidRequestError(
                f"--{name} has no effect without --eval_strategy or --eval_on_start", param=name
            )
    own = {f.name for f in fields(ScriptArguments)}
    return CommandLine(
        ScriptArguments(**{name: value for name, value in given.items() if name in own}),
        {name: value for name, value in given.items() if name not in own},
        is_dry_run,
    )


def _evaluates(given: Mapping[str, Any]) -> bool:
    strategy = given.get("eval_strategy", "no")
    return getattr(strategy, "value", strategy) != "no" or bool(given.get("eval_on_start"))


def _underscored(argument: str) -> str:
    """``--dry-run`` becomes ``--dry_run``; the value after an equals sign stays."""
    if not argument.startswith("--"):
        return argument
    name, sign, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{sign}{value}"


def _from_yaml(path: Path, parser: FlagParser) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"--config {path}: {error}", param="config") from None
    except yaml.YAMLError as error:
        raise InvalidRequestError(f"{path} is not YAML: {error}", param="config") from None
    if not isinstance(content, dict):
        raise InvalidRequestError(f"{path} must hold a mapping of options", param="config")
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        action = parser.actions_by_name.get(name)
        if action is None or name in {"config", "dry_run", "help"}:
            raise InvalidRequestError(f"{path}: there is no option {key!r}", param=str(key))
        values[name] = _converted(path, name, value, action)
    return values


def _converted(path: Path, name: str, value: object, action: argparse.Action) -> object:
    """A YAML value as the flag parses it; YAML reads ``5e-7``, for example, as a string."""
    if value is None or isinstance(value, dict):
        return value
    takes_many = action.nargs == "+"
    if isinstance(value, list) and not takes_many and name in LIST_OR_TEXT:
        return value
    items = value if isinstance(value, list) and takes_many else [value]
    convert: Any = action.type or str
    try:
        converted = [convert(str(item)) for item in items]
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        raise InvalidRequestError(f"{path}: {name}: invalid value {value!r}", param=name) from None
    wrong = [item for item in converted if action.choices and item not in action.choices]
    if wrong:
        choices = ", ".join(map(str, action.choices or ()))
        raise InvalidRequestError(
            f"{path}: {name} is {wrong[0]!r}, but must be one of {choices}", param=name
        )
    return converted if takes_many else converted[0]
