"""The options of ``dar train`` and their values: what a command line and its YAML file say.

A value comes from the first of: the command line, the file of ``--config``, ``--preset``, the
defaults. Flags may be written with dashes or underscores. Importing this module loads no torch.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from dar.errors import InvalidRequestError
from dar.protocol.spec import LoraSpec
from dar.training.config.fields import option, spec_field

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


REPEATED = ("reward_url", "reward_function", "reward_model_name_or_path")
"""Flags that may be repeated."""
ONLY_WITH = dict.fromkeys(
    ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"), "use_peft"
)
"""Flags that have no effect without another one."""
REQUIRED = ("model_name_or_path", "dataset_name", "output_dir")
SWITCHES = {
    "forecast": "Sample and score the base model, show the reward and the KL to the reference at which "
    "training ends for each alpha; write nothing. The same as dar forecast.",
    "dry_run": "Load everything, sample and score two prompts, show the plan; write nothing.",
    "overwrite_output_dir": "Replace the run that is in --output_dir: its model and checkpoints "
    "are removed.",
}
"""Flags of the command line alone, which a file cannot set, and their help."""
PATHS = (
    "config", "model_name_or_path", "dataset_name", "eval_dataset_name", "output_dir",
    "reward_model_name_or_path", "reward_model_path", "resume_from_checkpoint", "deepspeed",
    "fsdp_config", "accelerator_config",
)  # fmt: skip
"""Options that may name a file or folder."""
LIST_OR_TEXT = ("report_to", "optim_target_modules", "debug")
"""Options that take one value as a flag, and also a list in a YAML file."""
MAPPINGS = (
    "lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs",
    "liger_kernel_config", "accelerator_config", "fsdp_config", "deepspeed",
    "chat_template_kwargs",
)  # fmt: skip
"""Options that take JSON as a flag, and a mapping in a YAML file."""
WORDS = {"on": "true", "off": "false"}
"""Words of YAML for a switch that flags do not have."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The options that were given, as flags or in YAML; no defaults."""

    script: ScriptArguments
    config: Mapping[str, Any]
    """Arguments of `DARConfig`."""
    is_forecast: bool
    is_dry_run: bool
    is_overwriting: bool
    """Whether a run in ``output_dir`` is replaced."""


class Parser(Protocol):
    """A parser of flags; its namespace holds only what is given, and it raises on errors."""

    actions_by_name: dict[str, argparse.Action]

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:
        """The given values by name."""


def parsed(arguments: Sequence[str], parser: Parser) -> CommandLine:
    """Parse flags and the YAML file.

    Raises:
        InvalidRequestError: A flag or a key of the file is unknown, missing or has a wrong value.
        SystemExit: The help was requested, and shown.
    """
    given_flags = [_underscored(argument) for argument in arguments]
    typed = vars(parser.parse_args(given_flags))
    _check_once(given_flags, parser)
    file = _without_tilde("config", typed.pop("config", None))
    is_forecast, is_dry_run, is_overwriting = (typed.pop(name, False) for name in SWITCHES)
    values = {**(_from_yaml(Path(file), parser) if file else {}), **typed}
    given = {name: _without_tilde(name, value) for name, value in values.items()}
    if is_forecast:  # nothing is written
        given.setdefault("output_dir", ".")
    for name in REQUIRED:
        if not given.get(name):
            raise InvalidRequestError(
                f"--{name} is missing; {command_of(is_forecast)} --help lists all options",
                param=name,
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
        ScriptArguments(**{k: v for k, v in given.items() if k in own and v is not None}),
        {name: value for name, value in given.items() if name not in own},
        is_forecast,
        is_dry_run,
        is_overwriting,
    )


def asks_for_forecast(arguments: Sequence[str]) -> bool:
    """Whether these are the arguments of ``dar forecast``."""
    return any(_underscored(argument) == "--forecast" for argument in arguments)


def command_of(is_forecast: bool) -> str:
    """The command that a user runs."""
    return "dar forecast" if is_forecast else "dar train"


def _check_once(arguments: Sequence[str], parser: Parser) -> None:
    """Reject a flag that occurs twice, of which argparse would keep the last without a word."""
    seen: set[str] = set()
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--")
        if name not in parser.actions_by_name:
            name = name.removeprefix("no_")
        action = parser.actions_by_name.get(name)
        if not argument.startswith("--") or action is None or name in REPEATED:
            continue
        if name in seen and action.nargs != 0:
            is_many = action.nargs == "+"
            advice = f"give all its values at once: --{name} A B" if is_many else "keep one"
            raise InvalidRequestError(f"--{name} occurs twice; {advice}", param=name)
        seen.add(name)


def _without_tilde(name: str, value: Any) -> Any:  # noqa: ANN401 - a value of any option
    """A path, or a list of them, with the folder of its user in place of ``~``.

    A shell does this in ``--output_dir ~/out``, but not in ``--output_dir=~/out`` and not in YAML.
    It is done once, before anything is checked, so that all checks see the folder that is used.
    """
    if name not in PATHS:
        return value
    if isinstance(value, list):
        return [_without_tilde(name, one) for one in value]
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError:
        raise InvalidRequestError(
            f"--{name} {value}: {value.partition('/')[0]} is no folder of a user; if the name "
            f"begins with ~, give ./{value}",
            param=name,
        ) from None


def _evaluates(given: Mapping[str, Any]) -> bool:
    strategy = given.get("eval_strategy", "no")
    return getattr(strategy, "value", strategy) != "no" or bool(given.get("eval_on_start"))


def _underscored(argument: str) -> str:
    """``--dry-run`` becomes ``--dry_run``; the value after an equals sign stays."""
    if not argument.startswith("--"):
        return argument
    name, sign, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{sign}{value}"


class _KeyTwiceError(ValueError):
    """A mapping has a key twice."""


def _resolvers(left_out: frozenset[str]) -> dict[str, list[tuple[str, Any]]]:
    """Rules by which YAML takes a text for something else, without those for these kinds."""
    return {
        first: [rule for rule in rules if rule[0].rpartition(":")[2] not in left_out]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _OneByOne(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Rejects a key that occurs twice, of which YAML would keep the last without a word."""

    yaml_implicit_resolvers = _resolvers(frozenset({"timestamp", "value"}))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value).replace("-", "_")
            if name in seen:
                line = key.start_mark.line + 1
                raise _KeyTwiceError(f"line {line}: {key.value!r} occurs twice; keep one")
            seen.add(name)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


class _AsWritten(_OneByOne):
    """Leaves numbers, dates and words like ``no`` as they are written: options convert them.

    To YAML ``007`` is 7, ``12:30`` is 750 and ``no`` is false, also where a text is wanted.
    """

    yaml_implicit_resolvers = _resolvers(frozenset({"timestamp", "value", "int", "float", "bool"}))


def _from_yaml(path: Path, parser: Parser) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"--config {path}: {error}", param="config") from None
    content = _loaded(path, text, _AsWritten)
    if not isinstance(content, dict):
        raise InvalidRequestError(f"{path} must hold a mapping of options", param="config")
    if any(isinstance(value, dict) for value in content.values()):
        typed = _loaded(path, text, _OneByOne)
        content |= {key: value for key, value in typed.items() if isinstance(value, dict)}
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        action = parser.actions_by_name.get(name)
        if action is None or name in {"config", "help", *SWITCHES}:
            raise InvalidRequestError(f"{path}: there is no option {key!r}", param=str(key))
        values[name] = _converted(path, name, value, action)
    return values


def _loaded(path: Path, text: str, loader: type[_OneByOne]) -> Any:  # noqa: ANN401 - whatever the file holds
    try:
        return yaml.load(text, loader)  # noqa: S506 - a SafeLoader
    except _KeyTwiceError as error:
        raise InvalidRequestError(f"{path}, {error}", param="config") from None
    except RecursionError:
        raise InvalidRequestError(f"{path} is nested too deeply", param="config") from None
    except (yaml.YAMLError, ValueError) as error:  # a number or a date that cannot be
        raise InvalidRequestError(f"{path} is not YAML: {error}", param="config") from None


def _converted(path: Path, name: str, value: object, action: argparse.Action) -> object:
    """A value of the file as the flag parses it."""
    if value is None or (isinstance(value, dict) and name in MAPPINGS):
        return value
    takes_many = action.nargs == "+"
    is_list = isinstance(value, list) and (takes_many or name in LIST_OR_TEXT)
    items: list[Any] = value if isinstance(value, list) and is_list else [value]
    for item in items:
        if not isinstance(item, str):
            kinds = {type(None): "null", list: "a list", dict: "a mapping"}
            kind = kinds.get(type(item), f"of the type {type(item).__name__}")
            what = "an item" if is_list else "it"
            raise InvalidRequestError(
                f"{path}: {name} takes texts and numbers, but {what} is {kind}", param=name
            )
    if is_list and not takes_many:
        return items
    convert: Any = action.type or str
    if action.nargs == "?":
        items = [WORDS.get(item.lower(), item) for item in items]
    try:
        converted = [convert(item) for item in items]
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        raise InvalidRequestError(
            f"{path}: {name}: invalid value {value!r:.80}", param=name
        ) from None
    wrong = [item for item in converted if action.choices and item not in action.choices]
    if wrong:
        choices = ", ".join(map(str, action.choices or ()))
        raise InvalidRequestError(
            f"{path}: {name} is {wrong[0]!r}, but must be one of {choices}", param=name
        )
    return converted if takes_many else converted[0]
