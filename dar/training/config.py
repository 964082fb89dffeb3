"""`DARConfig`: everything that decides how a policy is trained."""

import functools
import math
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from transformers import TrainingArguments

from dar.errors import InvalidRequestError
from dar.protocol.presets import PRESETS, Preset
from dar.training.loss import Baseline, Behavior, LogRatio, Normalization, WeightNormalization

_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "auto_find_batch_size": (False,),
    "eval_strategy": ("no",),
    "do_eval": (False,),
    "do_predict": (False,),
    "eval_on_start": (False,),
    "eval_steps": (None,),
    "eval_delay": (0,),
    "eval_accumulation_steps": (None,),
    "per_device_eval_batch_size": (8,),
    "prediction_loss_only": (False,),
    "batch_eval_metrics": (False,),
    "include_for_metrics": ([],),
    "fp16": (False,),
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
    "deepspeed": (None,),
    "fsdp": (None, "", [], False),
    "dataloader_num_workers": (0,),
    "dataloader_drop_last": (False,),
    "include_num_input_tokens_seen": ("no", False),
    "enable_jit_checkpoint": (False,),
    "save_only_model": (False,),
    "save_strategy": ("steps", "no"),
    "logging_strategy": ("steps", "no"),
    "push_to_hub": (False,),
    "hub_strategy": ("every_save",),
    "hub_model_id": (None,),
    "hub_always_push": (False,),
    "data_seed": (None,),
    "torch_empty_cache_steps": (None,),
    "train_sampling_strategy": ("random",),
    "length_column_name": ("length",),
}
"""Options of `transformers.TrainingArguments` that this trainer cannot honour, and their neutral values. Any other value is
refused: an option is never accepted and then ignored."""


OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor"}
"""What a job spec calls an optimizer, and transformers' name of it."""
SCHEDULERS = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",  # what transformers calls "constant" ignores warmup_steps
}
"""The same for learning-rate schedules."""


def preset_values(preset: str) -> dict[str, Any]:
    """What a preset says, as arguments of `DARConfig`.

    Raises:
        InvalidRequestError: There is no such preset.
    """
    if preset not in PRESETS:
        raise InvalidRequestError(
            f"preset is {preset!r}, but must be one of {', '.join(PRESETS)}", param="preset"
        )
    values = dict(PRESETS[preset].hyperparameters) | dict(PRESETS[preset].sampling)
    if "batch_size" in values:
        values["per_device_train_batch_size"] = values.pop("batch_size")
    if "optim" in values:
        values["optim"] = OPTIMIZERS[values["optim"]]
    if "lr_scheduler_type" in values:
        values["lr_scheduler_type"] = SCHEDULERS[values["lr_scheduler_type"]]
    return values


def _with_presets(cls: type["DARConfig"]) -> type["DARConfig"]:
    """Let ``preset`` stand behind every argument that is not given."""
    plain = cls.__init__

    @functools.wraps(plain)
    def init(self: "DARConfig", *args: Any, **given: Any) -> None:  # noqa: ANN401 - the fields of the class
        plain(self, *args, **(preset_values(given.get("preset", "default")) | given))

    cls.__init__ = init  # type: ignore[method-assign]  # only the defaults change
    return cls


@_with_presets
@dataclass
class DARConfig(TrainingArguments):
    """Arguments of `dar.DARTrainer`: those of `transformers.TrainingArguments` and DAR's own.

    ``per_device_train_batch_size`` counts prompts; each gives ``dar_k`` completions. One optimizer step takes
    ``per_device_train_batch_size * gradient_accumulation_steps`` prompts, and how that product is split changes the
    result by no more than rounding (in bfloat16, now and then a token): the completions of a step are sampled and scored together, and forward passes are cut to fit the memory.

    The defaults are those of a job spec (`dar.protocol.spec`); ``preset`` puts others in their place
    (`dar.protocol.presets`), and what is given beside it goes before both.

    Raises:
        InvalidRequestError: A value is out of range, or an option is set that would have no effect.
    """

    preset: Preset = field(
        default="default",
        metadata={
            "help": "Where arguments that are not given come from: default, paper or reference."
        },
    )
    alpha: float = field(
        default=0.1, metadata={"help": "Pull towards the reference, in units of reward."}
    )
    beta: float = field(
        default=0.3,
        metadata={"help": "Pull towards the sampling policy: sets the step, not the optimum."},
    )
    dar_k: int = field(default=4, metadata={"help": "Completions sampled per prompt (K)."})
    dar_wclip: float = field(default=20.0, metadata={"help": "Largest weight of a completion."})
    adv_norm: Normalization = field(
        default="none",
        metadata={"help": "Normalisation after centring: none, per_prompt or batch."},
    )
    baseline: Baseline = field(
        default="leave_one_out",
        metadata={"help": "What a reward is compared with: the mean, or the mean of its siblings."},
    )
    log_ratio: LogRatio = field(
        default="sum",
        metadata={
            "help": "log(reference / behavior) of a completion: sum over its tokens, or mean."
        },
    )
    tie_tolerance: float = field(
        default=0.0,
        metadata={"help": "Rewards of a prompt that lie within this range are equal."},
    )
    drop_ties: bool = field(
        default=False, metadata={"help": "Leave out prompts whose rewards are all equal."}
    )
    allow_missing: bool = field(
        default=True,
        metadata={"help": "Leave out completions without a reward; otherwise training ends."},
    )
    weight_norm: WeightNormalization = field(
        default="none",
        metadata={"help": "Divide weights by their mean over the step or the prompt."},
    )
    min_ess: float = field(
        default=0.0,
        metadata={"help": "Flatten weights until the effective sample size is this share; 0: off."},
    )
    behavior: Behavior = field(
        default="sampled",
        metadata={
            "help": "Behavior log-probabilities: of the sampled law, or the policy's at T=1."
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest completion, in tokens."})
    temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits before sampling."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Smallest mass that is kept; 1: off."})
    top_k: int = field(default=0, metadata={"help": "Likeliest tokens that are kept; 0: off."})
    min_p: float | None = field(
        default=None, metadata={"help": "Least probability relative to the likeliest token."}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Divides the scores of tokens that occurred; 1: off."}
    )
    stop: list[str] = field(
        default_factory=list, metadata={"help": "Strings that end a completion containing them."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt + completion; none: the model's context."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt; cut from the left. None: what a completion leaves."},
    )

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the prompts."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two reports."})

    def __post_init__(self) -> None:
        """Validate, then let transformers set up the rest."""
        self._check_ranges()
        super().__post_init__()  # type: ignore[no-untyped-call]  # transformers is only partly typed
        for name, neutral in _WITHOUT_EFFECT.items():
            value = getattr(self, name, neutral[0])
            if getattr(value, "value", value) not in neutral:
                raise InvalidRequestError(
                    f"{name}={value!r} has no effect on DAR training; leave it at {neutral[0]!r}",
                    param=name,
                )
        if self.dar_k == 1 and self.prompts_per_step == 1:
            raise InvalidRequestError(
                "one completion of one prompt has nothing to be compared with, so every advantage would be 0; "
                "set dar_k or the batch size to at least 2",
                param="dar_k",
            )

    def _check_ranges(self) -> None:
        for name, is_right, rule in (
            ("alpha", 0 <= self.alpha < math.inf, "at least 0"),
            ("beta", 0 < self.beta < math.inf, "above 0"),
            ("dar_k", self.dar_k >= 1, "at least 1"),
            ("dar_wclip", 0 < self.dar_wclip < math.inf, "above 0"),
            (
                "adv_norm",
                self.adv_norm in ("none", "per_prompt", "batch"),
                "none, per_prompt or batch",
            ),
            ("baseline", self.baseline in get_args(Baseline), "mean or leave_one_out"),
            ("log_ratio", self.log_ratio in get_args(LogRatio), "sum or mean"),
            ("tie_tolerance", 0 <= self.tie_tolerance < math.inf, "at least 0"),
            (
                "weight_norm",
                self.weight_norm in get_args(WeightNormalization),
                "none, batch or per_prompt",
            ),
            ("min_ess", 0 <= self.min_ess < 1, "at least 0 and below 1"),
            ("behavior", self.behavior in get_args(Behavior), "sampled or policy"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 < self.temperature < math.inf, "above 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("stop", all(self.stop), "a list of strings, none of them empty"),
            ("max_length", self.max_length is None or self.max_length >= 2, "at least 2"),
            ("max_prompt_length", (self.max_prompt_length or 1) >= 1, "at least 1"),
        ):
            if not is_right:
                raise InvalidRequestError(
                    f"{name} is {getattr(self, name)!r}, but must be {rule}", param=name
                )

    @property
    def n_gpu(self) -> int:
        """At most one: several GPUs in one process would be driven by DataParallel, which splits a step wrongly."""
        return min(1, int(super().n_gpu))

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one optimizer step."""
        return int(self.per_device_train_batch_size * self.gradient_accumulation_steps)

    def decisive_values(self) -> dict[str, Any]:
        """Everything here that decides the result of training, as JSON values."""
        own = {f.name for f in fields(DARConfig)} - {f.name for f in fields(TrainingArguments)}
        inherited = {
            "learning_rate", "max_steps", "num_train_epochs", "warmup_steps", "lr_scheduler_type",
            "lr_scheduler_kwargs", "weight_decay", "max_grad_norm", "optim", "optim_args", "adam_beta1",
            "adam_beta2", "adam_epsilon", "bf16", "seed", "optim_target_modules", "use_liger_kernel", "liger_kernel_config",
        }  # fmt: skip
        values = {name: getattr(self, name) for name in sorted(own | inherited)}
        values = {name: getattr(value, "value", value) for name, value in values.items()}
        return values | {"prompts_per_step": self.prompts_per_step}
