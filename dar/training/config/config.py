"""`DARConfig`: everything that decides how a policy is trained."""

import functools
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from dar.errors import InvalidRequestError
from dar.protocol.presets import PRESETS, Preset
from dar.protocol.spec import Order, Overlap
from dar.training.config.ignored import refuse_without_effect
from dar.training.config.ranges import check_ranges
from dar.training.loss import Baseline, Behavior, LogRatio, Normalization, WeightNormalization
from dar.training.parallel import deepspeed_config

_CHECKPOINTING = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""New and usual names of options of transformers."""

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


_TRANSFORMERS = "transformers.TrainingArguments"
_GENERATION = "transformers.GenerationConfig"
_FIRST_TRAINER = "the first public trainer"


class Meaning(str):
    """What a field of `DARConfig` is: text for the command line, with what the documents say beside it.

    A text of its own kind, because transformers' parser hands every other key of a field's metadata to argparse.
    """

    __slots__ = ("source", "unit")

    source: str
    """Where it comes from: an equation or departure of `dar.training.loss`, a paper, a library."""
    unit: str
    """Of its value; empty: a pure number or a word."""


def _says(meaning: str, *, source: str, unit: str = "") -> dict[str, Meaning]:
    said = Meaning(meaning)
    said.source, said.unit = source, unit
    return {"help": said}


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
    ``per_device_train_batch_size * gradient_accumulation_steps`` prompts in each process, and how the product of these and the
    number of processes is split changes the result by no more than rounding (in bfloat16, now and then a token): the
    completions of a step are scored together, and forward passes are cut to fit the memory.

    The defaults are those of a job spec (`dar.protocol.spec`); ``preset`` puts others in their place
    (`dar.protocol.presets`), and what is given beside it goes before both.

    Raises:
        InvalidRequestError: A value is out of range, or an option is set that would have no effect.
    """

    preset: Preset = field(
        default="default",
        metadata=_says(
            "Where arguments that are not given come from: default, paper or reference.",
            source="docs/decisions",
        ),
    )
    alpha: float = field(
        default=0.1,
        metadata=_says("Pull towards the reference.", unit="reward", source="equations (1), (4)"),
    )
    beta: float = field(
        default=0.3,
        metadata=_says(
            "Pull towards the sampling policy: sets the step, not the optimum.",
            unit="reward",
            source="equations (1), (4)",
        ),
    )
    dar_k: int = field(
        default=4,
        metadata=_says("Completions sampled per prompt (K).", source="arXiv 2602.11523: 4"),
    )
    dar_wclip: float = field(
        default=20.0, metadata=_says("Largest weight of a completion.", source="equation (5)")
    )
    adv_norm: Normalization = field(
        default="none",
        metadata=_says(
            "Normalisation after centring: none, per_prompt or batch.",
            source="equation (3); arXiv 2602.11523: batch",
        ),
    )
    baseline: Baseline = field(
        default="leave_one_out",
        metadata=_says(
            "What a reward is compared with: the mean, or the mean of its siblings (leave_one_out).",
            source="departure 1",
        ),
    )
    log_ratio: LogRatio = field(
        default="sum",
        metadata=_says(
            "log(reference / behavior) of a completion: sum over its tokens, or mean.",
            unit="nats",
            source="departure 3",
        ),
    )
    tie_tolerance: float = field(
        default=0.0,
        metadata=_says(
            "Rewards of a prompt that lie within this range are equal.",
            unit="reward",
            source="departure 4",
        ),
    )
    drop_ties: bool = field(
        default=False,
        metadata=_says("Leave out prompts whose rewards are all equal.", source="departure 4"),
    )
    allow_missing: bool = field(
        default=True,
        metadata=_says(
            "Leave out completions without a reward; otherwise training ends.", source="departure 2"
        ),
    )
    weight_norm: WeightNormalization = field(
        default="none",
        metadata=_says(
            "Divide weights by their mean: none, over the batch or per_prompt.",
            source="departure 5",
        ),
    )
    min_ess: float = field(
        default=0.0,
        metadata=_says(
            "Flatten weights until the effective sample size is this share; 0: off.",
            unit="fraction",
            source="departure 6",
        ),
    )
    behavior: Behavior = field(
        default="sampled",
        metadata=_says(
            "Behavior log-probabilities: of the sampled law, or the policy's at T=1.",
            source="departure 7",
        ),
    )
    max_new_tokens: int = field(
        default=128, metadata=_says("Longest completion.", unit="tokens", source=_GENERATION)
    )
    temperature: float = field(
        default=1.0,
        metadata=_says(
            "Divides the logits before sampling.", source="transformers; arXiv 2602.11523: 0.9"
        ),
    )
    top_p: float = field(
        default=1.0,
        metadata=_says(
            "Smallest mass that is kept; 1: off.", unit="probability", source=_GENERATION
        ),
    )
    top_k: int = field(
        default=0,
        metadata=_says(
            "Likeliest tokens that are kept; 0: off.", unit="tokens", source=_GENERATION
        ),
    )
    min_p: float | None = field(
        default=None,
        metadata=_says(
            "Least probability relative to the likeliest token.",
            unit="fraction",
            source=_GENERATION,
        ),
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata=_says("Divides the scores of tokens that occurred; 1: off.", source=_GENERATION),
    )
    stop: list[str] = field(
        default_factory=list,
        metadata=_says("Strings that end a completion containing them.", source="OpenAI's API"),
    )
    max_length: int | None = field(
        default=None,
        metadata=_says(
            "Longest prompt + completion; none: the model's context.",
            unit="tokens",
            source=_FIRST_TRAINER,
        ),
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata=_says(
            "Longest prompt; cut from the left. None: what a completion leaves.",
            unit="tokens",
            source=_FIRST_TRAINER,
        ),
    )
    reward_model_path: str | None = field(
        default=None,
        metadata=_says(
            "Reward model: folder or hub id of a sequence classifier with one label.",
            source=_FIRST_TRAINER,
        ),
    )

    overlap: Overlap = field(
        default="stream",
        metadata=_says(
            "What is done while rewards are pending: nothing (none), training on what is scored (stream), or sampling of the next "
            "step too, one update staler (one_step).",
            source="docs/dar.md",
        ),
    )
    order: Order = field(
        default="fixed",
        metadata=_says(
            "In which order prompts are trained on: fixed (bit-reproducible), or as they are scored (completion).",
            source="docs/dar.md",
        ),
    )

    optim: OptimizerNames | str = field(
        default=OPTIMIZERS["adamw"],
        metadata=_says("Optimizer, by transformers' name.", source=_TRANSFORMERS),
    )
    learning_rate: float = field(
        default=1e-6, metadata=_says("Peak learning rate.", source="arXiv 2602.11523: 1e-6")
    )
    num_train_epochs: float = field(
        default=1.0, metadata=_says("Passes over the prompts.", source=_TRANSFORMERS)
    )
    logging_steps: float = field(
        default=1, metadata=_says("Steps between two reports.", unit="steps", source=_TRANSFORMERS)
    )

    def __post_init__(self) -> None:
        """Validate, then let transformers set up the rest."""
        check_ranges(self)
        # transformers warns of these names, which are what everybody writes; both mean the same.
        for new, usual in _CHECKPOINTING.items():
            if getattr(self, new) is None:
                setattr(self, new, getattr(self, usual))
            setattr(self, usual, None)
        if self.deepspeed or deepspeed_config.is_launched() or deepspeed_config.is_installed():
            deepspeed_config.load()
        super().__post_init__()  # type: ignore[no-untyped-call]  # transformers is only partly typed
        deepspeed_config.leave_loading_alone()
        refuse_without_effect(self)
        if self.fp16 and self.device.type != "cuda":
            raise InvalidRequestError(
                f"fp16 needs a CUDA device, and this runs on {self.device.type}; use bf16, or neither",
                param="fp16",
            )
        if self.dar_k == 1 and self.prompts_per_step == 1:
            raise InvalidRequestError(
                "one completion of one prompt has nothing to be compared with, so every advantage would be 0; "
                "set dar_k or the batch size to at least 2",
                param="dar_k",
            )

    @property
    def n_gpu(self) -> int:
        """At most one: several GPUs in one process would be driven by DataParallel, which splits a step wrongly."""
        return min(1, int(super().n_gpu))

    @property
    def coldest(self) -> float:
        """Sampling temperature at and below which training has no point of rest: the policy sharpens for ever.

        Derived in `dar.training.demo.brackets`. Without a pull towards the reference (alpha = 0) there is no point of rest at all,
        whatever the temperature, and none is told.
        """
        if self.alpha == 0:
            return 0.0
        if self.behavior == "sampled":
            return self.beta / (self.alpha + self.beta)
        return (self.alpha + self.beta) / (2 * self.alpha + self.beta)

    @property
    def is_evaluating(self) -> bool:
        """Whether training tries the policy on evaluation data."""
        strategy = getattr(self.eval_strategy, "value", self.eval_strategy)
        return strategy != "no" or bool(self.eval_on_start)

    @property
    def half(self) -> torch.dtype | None:
        """Number format of forward and backward passes; None: that of the weights."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one optimizer step, over all processes."""
        return int(
            self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        )

    def decisive_values(self) -> dict[str, Any]:
        """Everything here that decides the result of training, as JSON values."""
        own = {f.name for f in fields(DARConfig)} - {f.name for f in fields(TrainingArguments)}
        own -= {"reward_model_path"}  # its weights decide, not where they lie
        own -= {"overlap", "order"}  # they decide only as far as one step is sampled ahead
        inherited = {
            "learning_rate", "max_steps", "num_train_epochs", "warmup_steps", "lr_scheduler_type",
            "lr_scheduler_kwargs", "weight_decay", "max_grad_norm", "optim", "optim_args", "adam_beta1",
            "adam_beta2", "adam_epsilon", "bf16", "fp16", "seed", "optim_target_modules", "use_liger_kernel", "liger_kernel_config",
        }  # fmt: skip
        values = {name: getattr(self, name) for name in sorted(own | inherited)}
        values = {name: getattr(value, "value", value) for name, value in values.items()}
        return values | {
            "prompts_per_step": self.prompts_per_step,
            "is_one_step_ahead": self.overlap == "one_step",
        }
