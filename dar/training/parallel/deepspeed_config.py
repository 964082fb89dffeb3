"""DeepSpeed's configuration: stage and sizes are the user's, the rest follows from `dar.DARConfig`.

The result must be that of the same arguments without DeepSpeed. So its own mixed precision,
optimizers and schedules, which change the arithmetic, are rejected; bfloat16 comes from torch's
autocast, as everywhere here.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.training_args import OptimizerNames

from dar.errors import InvalidRequestError
from dar.processes import how_to_install
from dar.settings import forget_environment, inherited_environment

INSTALLATION = how_to_install("deepspeed")
STAGES = {"zero2": 2, "zero3": 3}
"""Stage of each strategy of a job spec."""
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
"""Optimizers that update each element of a weight by itself, so that shards change nothing."""
TUNING = {
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "overlap_comm",
    "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "sub_group_size",
}  # fmt: skip
"""Options of ``zero_optimization`` that are kept: they change how work is split, not its result."""
MEANINGLESS = {
    "stage3_gather_16bit_weights_on_model_save", "steps_per_print", "wall_clock_breakdown",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip
"""Options in common configurations that do not concern training; they are dropped."""
OFFLOADING = ("offload_optimizer", "offload_param")
LAUNCHED = "ACCELERATE_USE_DEEPSPEED"
"""Variable by which ``accelerate launch`` requests DeepSpeed. accelerate also sets it itself, and
leaves it set."""


class DeepSpeedArguments(Protocol):
    """Arguments of `dar.DARConfig` that decide DeepSpeed's configuration."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    optim: OptimizerNames | str

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one optimizer step, over all processes."""

    @property
    def half(self) -> torch.dtype | None:
        """Number format of forward and backward passes; None: float32."""


def is_installed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def is_launched() -> bool:
    """Whether ``accelerate launch --use_deepspeed`` has started this process."""
    return inherited_environment([LAUNCHED]).get(LAUNCHED, "").lower() == "true"


@functools.cache
def load() -> Any:  # noqa: ANN401 - DeepSpeed has no annotations
    """Import DeepSpeed, without output on stdout and without a need for a compiler.

    Raises:
        InvalidRequestError: It is not installed.
    """
    if not is_installed():
        raise InvalidRequestError(
            f"DeepSpeed is not installed; {INSTALLATION}, or use fsdp, which needs no installation",
            param="deepspeed",
        )
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # a warning that there is no GPU
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module("deepspeed")
            ops = importlib.import_module("deepspeed.ops")
    finally:
        logging.disable(before)
    logger = logging.getLogger("DeepSpeed")  # writes to the standard output
    logger.handlers.clear()
    logger.propagate = True
    # It calls functions by names that torch 2.13 deprecates, dozens of times in a run.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On CPUs it would compile its own collective when training begins.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return module


def config_of(strategy: str) -> dict[str, Any]:
    """``DARConfig.deepspeed`` for a strategy of a job spec."""
    return {"zero_optimization": {"stage": STAGES[strategy]}}


def leave_loading_alone() -> None:
    """Make `from_pretrained` load whole models, to be read and copied before sharding."""
    unset_hf_deepspeed_config()


def forget_launch() -> None:
    """Keep accelerate from using DeepSpeed for every later trainer of this process too."""
    forget_environment(LAUNCHED)


def settle(config: dict[str, Any], args: DeepSpeedArguments) -> None:
    """Turn the user's or a launcher's configuration into the one that DeepSpeed gets, in place.

    Raises:
        InvalidRequestError: It sets something that this trainer does not support, or contradicts
            ``args``.
    """
    zero = dict(config.get("zero_optimization") or {})
    _check_zero(zero)
    _check_rest(config, args)
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in OPTIMIZERS:
        raise InvalidRequestError(
            f"optim={optimizer!r} cannot be used with DeepSpeed, which passes slices of flattened "
            f"weights to an optimizer; use one of {', '.join(OPTIMIZERS)}",
            param="optim",
        )
    kept = {name: value for name, value in zero.items() if name in TUNING | {"stage"}}
    config.clear()
    config |= {
        # This trainer counts the shares of a step, not DeepSpeed.
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size
        * args.gradient_accumulation_steps,
        "gradient_accumulation_steps": 1,
        "train_batch_size": args.prompts_per_step,
        "gradient_clipping": args.max_grad_norm,
        # Its own linear layer would replace torch's in the whole process.
        "zero_optimization": kept | {"memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": float("inf"),
    }
    if args.half is not None:
        # With no modules named, gradients and gathered weights are sent in float32, as without
        # DeepSpeed.
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": str(args.half).removeprefix("torch."),
            "lower_precision_safe_modules": [],
        }


def _check_zero(zero: Mapping[str, Any]) -> None:
    if zero.get("stage") not in STAGES.values():
        raise InvalidRequestError(
            f"zero_optimization.stage is {zero.get('stage')!r}, but this trainer supports ZeRO-2 "
            "and ZeRO-3 only; set 2 or 3",
            param="deepspeed",
        )
    for name in OFFLOADING:
        if (zero.get(name) or {}).get("device") not in (None, "none"):
            raise InvalidRequestError(
                f"this trainer does not support zero_optimization.{name}; leave it out, and use "
                "more processes if memory is short",
                param="deepspeed",
            )
    _refuse(
        [
            f"zero_optimization.{name}"
            for name, value in zero.items()
            if name not in TUNING | MEANINGLESS | {"stage", *OFFLOADING}
            and not (name == "memory_efficient_linear" and value is False)
        ]
    )


def _check_rest(config: Mapping[str, Any], args: DeepSpeedArguments) -> None:
    if args.half == torch.float16:
        raise InvalidRequestError(
            "this trainer does not support fp16 with DeepSpeed; use bf16, or neither, or fsdp",
            param="fp16",
        )
    own = {
        "train_micro_batch_size_per_gpu": (args.per_device_train_batch_size,),
        "gradient_accumulation_steps": (args.gradient_accumulation_steps, 1),  # 1: accelerate's
        "train_batch_size": (args.prompts_per_step,),
        "gradient_clipping": (args.max_grad_norm,),
    }
    halves = {"bf16": args.half == torch.bfloat16, "fp16": False}
    for name, values in own.items():
        _compare(name, config.get(name, "auto"), values)
    for name, value in halves.items():
        _compare(f"{name}.enabled", (config.get(name) or {}).get("enabled", "auto"), (value,))
    known = {"zero_optimization", *own, *halves, *MEANINGLESS}
    _refuse([name for name in config if name not in known])


def _compare(name: str, value: object, expected: tuple[object, ...]) -> None:
    if value != "auto" and value not in expected:
        raise InvalidRequestError(
            f"the DeepSpeed configuration sets {name} to {value!r}, but the arguments of training "
            f"say {expected[0]!r}; leave it out, or set it to 'auto'",
            param="deepspeed",
        )


def _refuse(names: list[str]) -> None:
    if names:
        raise InvalidRequestError(
            f"the DeepSpeed configuration sets {', '.join(names)}, which this trainer does not "
            "support; leave that out: optimizer, schedule, precision and batch come from DARConfig",
            param="deepspeed",
        )


def check_weights(model: nn.Module) -> None:
    """Reject weights that DeepSpeed would train in another number format.

    Raises:
        InvalidRequestError: They are not in float32.
    """
    for name, parameter in model.named_parameters():
        if str(parameter.dtype) != "torch.float32":
            raise InvalidRequestError(
                f"{name} is in {parameter.dtype}, but DeepSpeed trains float32 weights (bf16=True "
                "still computes in bfloat16); load the model with dtype=torch.float32, or use fsdp",
                param="model",
            )
