"""Options of transformers that have no effect here: they are rejected, never ignored."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from dar.errors import InvalidRequestError
from dar.protocol.presets import ONLINE_ONLY

WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "auto_find_batch_size": (False,),
    "do_train": (False,),
    "do_predict": (False,),
    "eval_do_concat_batches": (True,),
    "eval_use_gather_object": (False,),
    "eval_accumulation_steps": (None,),
    "per_device_eval_batch_size": (8,),
    "prediction_loss_only": (False,),
    "batch_eval_metrics": (False,),
    "include_for_metrics": ([],),
    "fp16_full_eval": (False,),
    "bf16_full_eval": (False,),
    "label_smoothing_factor": (0.0,),
    "load_best_model_at_end": (False,),
    "metric_for_best_model": (None,),
    "greater_is_better": (None,),
    "resume_from_checkpoint": (None,),
    "restore_callback_states_from_checkpoint": (False,),
    "neftune_noise_alpha": (None,),
    "torch_compile": (False,),
    "torch_compile_backend": (None,),
    "torch_compile_mode": (None,),
    "dataloader_num_workers": (0,),
    "dataloader_drop_last": (False,),
    "dataloader_persistent_workers": (False,),
    "dataloader_prefetch_factor": (None,),
    "dataloader_multiprocessing_context": (None,),
    "dataloader_in_order": (True,),
    "label_names": (None,),
    "logging_nan_inf_filter": (True,),
    "save_on_each_node": (False,),
    "use_cache": (False,),
    "include_num_input_tokens_seen": ("no", False),
    "enable_jit_checkpoint": (False,),
    "save_only_model": (False,),
    "save_strategy": ("steps", "no"),
    "logging_strategy": ("steps", "no"),
    "data_seed": (None,),
    "torch_empty_cache_steps": (None,),
    "train_sampling_strategy": ("random",),
    "length_column_name": ("length",),
    "remove_unused_columns": (True,),
    "ignore_data_skip": (False,),
    "average_tokens_across_devices": (True,),
    "dataloader_pin_memory": (True,),
    "accelerator_config": (None,),
    "parallelism_config": (None,),
    "local_rank": (-1,),
}
"""Options of `transformers.TrainingArguments` that this trainer cannot honour, and their neutral
values. Any other value is refused."""

OPTIMIZER_ARGUMENTS: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        (
            *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"),
            *("adafactor", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
            *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "lomo", "adalomo"),
        ),
        frozenset(),
    ),
    "sgd": frozenset({"momentum", "dampening", "nesterov"}),
    "adagrad": frozenset({"lr_decay", "eps"}),
    "rmsprop": frozenset({"momentum", "alpha", "eps", "centered"}),
}
"""What these optimizers read of ``optim_args``; transformers ignores all other arguments."""

OF_EVALUATION: dict[str, dict[str, tuple[object, ...]]] = {
    "no": {"do_eval": (False,), "eval_steps": (None,), "eval_delay": (0,)},
    "steps": {},
    "epoch": {"eval_steps": (None,)},
}
"""The same for each ``eval_strategy``."""


def refuse_without_effect(arguments: TrainingArguments) -> None:
    """Reject options that are set and would have no effect.

    Raises:
        InvalidRequestError: There is such an option; ``param`` names it.
    """
    strategy = str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy))
    for name, neutral in (WITHOUT_EFFECT | OF_EVALUATION[strategy]).items():
        value = getattr(arguments, name, neutral[0])
        if getattr(value, "value", value) not in neutral and not _is_settled(arguments, name):
            when = f" with eval_strategy={strategy!r}" if name not in WITHOUT_EFFECT else ""
            raise InvalidRequestError(
                f"{name}={getattr(value, 'value', value)!r} has no effect on DAR training{when}; "
                f"leave it at {neutral[0]!r}",
                param=name,
            )
    _refuse_arguments_of_optimizer(arguments)


def _refuse_arguments_of_optimizer(arguments: TrainingArguments) -> None:
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    read = OPTIMIZER_ARGUMENTS.get(optimizer)
    if not arguments.optim_args or read is None:
        return
    given = {part.partition("=")[0].strip() for part in arguments.optim_args.split(",")}
    if ignored := sorted(given - read):
        advice = f"it takes {', '.join(sorted(read))}" if read else "leave optim_args out"
        raise InvalidRequestError(
            f"optim_args has {' and '.join(map(repr, ignored))}, which {optimizer} ignores; "
            f"{advice}",
            param="optim_args",
        )


def _is_settled(arguments: TrainingArguments, name: str) -> bool:
    """Whether a value that is not neutral is harmless: set by others, or without any effect."""
    if name == "dataloader_pin_memory":  # transformers turns it off on CPUs
        return arguments.use_cpu
    if name == "local_rank":  # torch.distributed.launch sets it in every process
        return bool(arguments.local_rank == arguments.local_process_index)
    if name == "accelerator_config":
        given, usual = vars(arguments.accelerator_config), vars(AcceleratorConfig())
        # All others concern data loaders, or the split of a step, which this trainer does itself.
        return all(given[key] == usual[key] for key in given if key != "use_configured_state")
    return False


def online_only(arguments: TrainingArguments, preset: Mapping[str, Any]) -> list[str]:
    """Options of sampling that are set in a run that samples nothing.

    Args:
        arguments: Of a run that reads its completions from the data set.
        preset: Values of options that the user has not given.
    """
    found = []
    for one in fields(arguments):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if one.name in ONLINE_ONLY and getattr(arguments, one.name) != preset.get(
            one.name, default
        ):
            found.append(one.name)
    return found
