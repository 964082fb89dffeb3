"""A trainer, with everything loaded, from the options of a command line."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from pydantic import ValidationError
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback

from dar.errors import InvalidRequestError
from dar.protocol import target_patterns
from dar.protocol.spec import LoraSpec
from dar.rewards.functions import RewardFunction
from dar.rewards.http.signing import secrets_in
from dar.settings import Settings
from dar.training.config.config import DARConfig
from dar.training.data.sets import is_one_split, open_rows
from dar.training.model import loading
from dar.training.report.sink import Control, Sink
from dar.training.script.arguments import ScriptArguments
from dar.training.trainer import DARTrainer


def build(
    script: ScriptArguments, config: DARConfig, settings: Settings, sink: Sink, control: Control
) -> DARTrainer:
    """Load everything that a command line names, and make its trainer.

    Raises:
        DARError: Something cannot be loaded, or does not fit together.
    """
    assert script.model_name_or_path
    assert script.dataset_name
    offline = settings.is_offline
    if config.hub_token is None and settings.hf_token is not None:
        config.hub_token = settings.hf_token.get_secret_value()
    token = config.hub_token
    rows = open_rows(
        script.dataset_name,
        split=script.dataset_train_split,
        config=script.dataset_config,
        is_offline=offline,
        token=token,
    )
    functions: list[RewardFunction | str] = [
        *map(imported_function, script.reward_function),
        *script.reward_url,
    ]
    evaluated: dict[str, Any] = {}
    if config.is_evaluating:
        if script.eval_dataset_name is None and is_one_split(
            Path(script.dataset_name).expanduser()
        ):
            raise InvalidRequestError(
                f"{script.dataset_name} is one split, which is trained on; name other prompts with "
                "--eval_dataset_name to evaluate",
                param="eval_dataset_name",
            )
        evaluated["eval_dataset"] = open_rows(
            script.eval_dataset_name or script.dataset_name,
            split=script.dataset_test_split,
            config=script.dataset_config,
            is_offline=offline,
            token=token,
        )
    secrets = settings.secret_from(settings.reward_secret, "reward_secret")
    trainer = DARTrainer(
        _model(script, config, is_offline=offline),
        config,
        rows,
        functions or None,
        reward_model=list(script.reward_model_name_or_path) or None,
        reward_weights=script.reward_weights or None,
        reward_secret=next(iter(secrets_in(secrets or "")), None),
        processing_class=loading.load_tokenizer(
            script.model_name_or_path, is_offline=offline, token=token
        ),
        peft_config=_adapter(script),
        sink=sink,
        control=control,
        is_offline=offline,
        **evaluated,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def imported_function(name: str) -> RewardFunction:
    """Import ``module:function``; modules of the working directory are found too.

    Raises:
        InvalidRequestError: There is no such function.
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise InvalidRequestError(
            f"--reward_function {name}: {error}", param="reward_function"
        ) from error
    except (Exception, SystemExit) as error:
        raise InvalidRequestError(
            f"--reward_function {name}: importing {module_name} raised "
            f"{type(error).__name__}: {error}",
            param="reward_function",
        ) from error
    if not callable(function):
        raise InvalidRequestError(
            f"--reward_function {name} is of the type {type(function).__name__}, not a function",
            param="reward_function",
        )
    found: RewardFunction = function
    return found


def config_of(values: Mapping[str, Any]) -> DARConfig:
    """Arguments of a trainer whose output is that of its sink alone.

    Raises:
        InvalidRequestError: A value cannot be used.
    """
    quiet: dict[str, Any] = {"log_level": "error", "disable_tqdm": True}
    try:
        return DARConfig(**{**quiet, **values})
    except (ValueError, TypeError, ImportError) as error:  # transformers' own checks
        raise InvalidRequestError(str(error)) from error


def _model(script: ScriptArguments, config: DARConfig, *, is_offline: bool) -> PreTrainedModel:
    assert script.model_name_or_path
    is_half = script.use_peft and config.bf16
    dtype = getattr(torch, script.dtype or ("bfloat16" if is_half else "float32"))
    return loading.load_model(
        script.model_name_or_path, dtype=dtype, is_offline=is_offline, token=config.hub_token
    )


def _adapter(script: ScriptArguments) -> LoraConfig | None:
    if not script.use_peft:
        return None
    modules = script.lora_target_modules
    if len(modules) == 1 and (why := target_patterns.problem_of(modules[0])):
        raise InvalidRequestError(
            f"--lora_target_modules {modules[0][: target_patterns.SHOWN_PATTERN]!r} is no pattern of modules: {why}; give "
            "all-linear, a regular expression, or several names",
            param="lora_target_modules",
        )
    try:
        spec = LoraSpec(
            type="lora",
            r=script.lora_r,
            lora_alpha=script.lora_alpha,
            lora_dropout=script.lora_dropout,
            target_modules=modules[0] if len(modules) == 1 else modules,
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = {"r": "lora_r", "target_modules": "lora_target_modules"}.get(
            str(first["loc"][0]), str(first["loc"][0])
        )
        raise InvalidRequestError(
            f"--{name}: {first['msg']}, but it is {first['input']}", param=name
        ) from None
    return loading.lora_config(spec)
