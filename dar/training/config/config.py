"""`DARConfig`: everything that decides how a policy is trained."""

import functools
import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from dar.errors import InvalidRequestError
from dar.protocol.budget_checks import CHOSEN, DEFAULT_BUDGET, has_default, option_conflicts
from dar.protocol.presets import PRESETS, Preset
from dar.protocol.row_values import check_value
from dar.protocol.rows import template_kwargs
from dar.protocol.spec import (
    Baseline,
    Behavior,
    LogRatio,
    Normalization,
    Overlap,
    StepPlan,
    TrainingOrder,
    WeightNormalization,
)
from dar.protocol.spec_checks import NOTHING_TO_COMPARE
from dar.training.config.fields import SPEC_FIELDS, option, spec_field
from dar.training.config.ignored import refuse_without_effect
from dar.training.config.ranges import check_ranges
from dar.training.parallel import deepspeed_config
from dar.training.report.trackers import check_trackers

if TYPE_CHECKING:
    from dar.training.config.learning_rates import ChosenRate

_CHECKPOINTING = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""New and usual names of two options of transformers."""

OPTIMIZERS = {"adamw": "adamw_torch"}
"""Name of an optimizer in a job spec -> in transformers, where they differ."""
SCHEDULERS = {"constant": "constant_with_warmup"}
"""The same for learning-rate schedules. What transformers calls "constant" ignores warmup_steps."""


def preset_values(preset: str) -> dict[str, Any]:
    """Values of a preset as arguments of `DARConfig`.

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
    for name, names in (("optim", OPTIMIZERS), ("lr_scheduler_type", SCHEDULERS)):
        if name in values:
            values[name] = names.get(values[name], values[name])
    return values


DECISIVE = {
    "learning_rate", "max_steps", "num_train_epochs", "warmup_steps", "lr_scheduler_type",
    "lr_scheduler_kwargs", "weight_decay", "max_grad_norm", "optim", "optim_args", "adam_beta1",
    "adam_beta2", "adam_epsilon", "bf16", "fp16", "seed", "optim_target_modules",
    "use_liger_kernel", "liger_kernel_config",
}  # fmt: skip
"""Options of transformers that decide the result of training."""

_TRANSFORMERS = "transformers.TrainingArguments"
_GENERATION = "transformers.GenerationConfig"
_FIRST_TRAINER = "the first public trainer"


def _with_presets(cls: type["DARConfig"]) -> type["DARConfig"]:
    """Let ``preset`` fill in every argument that is not given."""
    plain = cls.__init__

    @functools.wraps(plain)
    def init(self: "DARConfig", *args: Any, **given: Any) -> None:  # noqa: ANN401 - the fields of the class
        preset = given.get("preset", "default")
        plain(self, *args, **(preset_values(preset) | given))
        # dataclasses.replace gives all arguments, so it says nothing about the user's
        is_copy = given.keys() >= {one.name for one in fields(self) if one.init}
        if self.kl_budget is not None:
            for name, why in option_conflicts(vars(self), set() if is_copy else given.keys()):
                raise InvalidRequestError(why, param=name)
        elif preset == "default" and has_default(vars(self), given.keys(), self.temperature):
            self.kl_budget = DEFAULT_BUDGET
            self.has_default_budget = True

    cls.__init__ = init  # type: ignore[method-assign]  # only the defaults change
    return cls


@_with_presets
@dataclass
class DARConfig(TrainingArguments):
    """Arguments of `dar.DARTrainer`: those of `transformers.TrainingArguments` and DAR's own.

    ``per_device_train_batch_size`` counts prompts; each gives ``dar_k`` completions. One optimizer
    step takes ``per_device_train_batch_size * gradient_accumulation_steps`` prompts in each
    process. How the product of these and the number of processes is split changes the result by no
    more than rounding (in bfloat16, occasionally by a token): the completions of a step are scored
    together, and forward passes are cut to fit the memory.

    The defaults are those of a job spec (`dar.protocol.spec`). ``preset`` replaces some of them
    (`dar.protocol.presets`). An argument that is given takes precedence over both.

    Raises:
        InvalidRequestError: A value is out of range, or an option is set that would have no effect.
    """

    preset: Preset = spec_field(SPEC_FIELDS["preset"], source="docs/decisions")
    alpha: float = spec_field(SPEC_FIELDS["alpha"], source="equations (1), (4)")
    beta: float = spec_field(SPEC_FIELDS["beta"], source="equations (1), (4)")
    kl_budget: float | None = spec_field(SPEC_FIELDS["kl_budget"], source="docs/decisions")
    dar_k: int = spec_field(SPEC_FIELDS["dar_k"], source="arXiv 2602.11523: 4")
    dar_wclip: float = spec_field(SPEC_FIELDS["dar_wclip"], source="equation (5)")
    adv_norm: Normalization = spec_field(
        SPEC_FIELDS["adv_norm"], source="equation (3); arXiv 2602.11523: batch"
    )
    baseline: Baseline = spec_field(SPEC_FIELDS["baseline"], source="departure 1")
    log_ratio: LogRatio = spec_field(SPEC_FIELDS["log_ratio"], source="departure 3")
    tie_tolerance: float = spec_field(SPEC_FIELDS["tie_tolerance"], source="departure 4")
    drop_ties: bool = spec_field(SPEC_FIELDS["drop_ties"], source="departure 4")
    allow_missing: bool = spec_field(SPEC_FIELDS["allow_missing"], source="departure 2")
    weight_norm: WeightNormalization = spec_field(SPEC_FIELDS["weight_norm"], source="departure 5")
    min_ess: float = spec_field(SPEC_FIELDS["min_ess"], source="departure 6")
    behavior: Behavior = spec_field(SPEC_FIELDS["behavior"], source="departure 7")
    control_variate: bool | None = spec_field(SPEC_FIELDS["control_variate"], source="departure 8")
    max_new_tokens: int = spec_field(SPEC_FIELDS["max_new_tokens"], source=_GENERATION)
    temperature: float = spec_field(
        SPEC_FIELDS["temperature"], source="transformers; arXiv 2602.11523: 0.9"
    )
    top_p: float = spec_field(SPEC_FIELDS["top_p"], source=_GENERATION)
    top_k: int = spec_field(SPEC_FIELDS["top_k"], source=_GENERATION)
    min_p: float | None = spec_field(SPEC_FIELDS["min_p"], source=_GENERATION)
    repetition_penalty: float = spec_field(SPEC_FIELDS["repetition_penalty"], source=_GENERATION)
    stop: list[str] = spec_field(SPEC_FIELDS["stop"], source="OpenAI's API")
    max_length: int | None = spec_field(SPEC_FIELDS["max_length"], source=_FIRST_TRAINER)
    max_prompt_length: int | None = spec_field(
        SPEC_FIELDS["max_prompt_length"], source=_FIRST_TRAINER
    )
    chat_template_kwargs: dict[str, Any] | str | None = spec_field(
        SPEC_FIELDS["chat_template_kwargs"], source="TRL"
    )
    reward_model_path: str | None = option(
        "Reward model: folder or hub id of a sequence classifier with one label.",
        source=_FIRST_TRAINER,
    )

    overlap: Overlap = spec_field(SPEC_FIELDS["overlap"], source="docs/dar.md")
    order: TrainingOrder = spec_field(SPEC_FIELDS["order"], source="docs/dar.md")

    optim: OptimizerNames | str = option(
        "Optimizer: a name of a job spec or of transformers.",
        OPTIMIZERS.get(SPEC_FIELDS["optim"].default, SPEC_FIELDS["optim"].default),
        source=_TRANSFORMERS,
    )
    learning_rate: float | None = spec_field(  # type: ignore[assignment]  # transformers takes no null
        SPEC_FIELDS["learning_rate"], source="docs/decisions; arXiv 2602.11523: 1e-6"
    )
    learning_rate_multiplier: float = spec_field(
        SPEC_FIELDS["learning_rate_multiplier"], source="OpenAI's API"
    )
    warmup_steps: float = spec_field(
        SPEC_FIELDS["warmup_steps"], source=f"{_TRANSFORMERS}; below 1: a share of all steps"
    )
    lr_scheduler_type: SchedulerType | str = option(
        "Schedule of the learning rate after the warm-up: a name of a job spec or of transformers.",
        SPEC_FIELDS["lr_scheduler_type"].default,
        source=_TRANSFORMERS,
    )
    weight_decay: float = spec_field(SPEC_FIELDS["weight_decay"], source=_TRANSFORMERS)
    max_grad_norm: float = spec_field(SPEC_FIELDS["max_grad_norm"], source=_TRANSFORMERS)
    adam_beta1: float = spec_field(SPEC_FIELDS["adam_beta1"], source=_TRANSFORMERS)
    adam_beta2: float = spec_field(SPEC_FIELDS["adam_beta2"], source=_TRANSFORMERS)
    num_train_epochs: float = option("Passes over the prompts.", 1.0, source=_TRANSFORMERS)
    logging_steps: float = option(
        "Steps between two reports.", 1, source=_TRANSFORMERS, unit="steps"
    )

    def __post_init__(self) -> None:
        """Validate, then let transformers set up the rest."""
        self.counted_epochs: float | None = None
        """Passes that the run may not exceed; None: its length is given in steps."""
        self.checkpoint_seconds: float | None = None
        """Longest time of training without a checkpoint; None: ``save_steps`` alone decides."""
        self.saves_in_background = False
        """Whether training goes on while a checkpoint is made durable and gets its name."""
        self.saves_evaluated = False
        """Whether each step that is evaluated gets a checkpoint."""
        self.chosen_rate: ChosenRate | None = None
        """How ``learning_rate`` was chosen, once a trainer has; None: it was given."""
        self.has_default_budget = False
        """Whether ``kl_budget`` is the default: then it gives way to what conflicts with it."""
        check_ranges(vars(self))
        check_trackers(self.report_to)
        self._use_own_names()
        self.chat_template_kwargs = _variables(self.chat_template_kwargs)
        # transformers warns about the usual names; both mean the same.
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
                f"fp16 needs a CUDA device, and this runs on {self.device.type}; "
                "use bf16, or neither",
                param="fp16",
            )
        if self.dar_k == 1 and self.prompts_per_step == 1:
            raise InvalidRequestError(
                f"{NOTHING_TO_COMPARE}; set dar_k or the batch size to at least 2",
                param="dar_k",
            )

    def _use_own_names(self) -> None:
        """Give names of a job spec the meaning that they have there."""
        self.optim = OPTIMIZERS.get(str(self.optim), self.optim)
        if self.warmup_steps:  # without a warm-up both schedules are the same
            name = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
            self.lr_scheduler_type = SCHEDULERS.get(str(name), self.lr_scheduler_type)

    @property
    def n_gpu(self) -> int:
        """At most one: with more, transformers uses DataParallel, which splits a step wrongly."""
        return min(1, int(super().n_gpu))

    @property
    def coldest(self) -> float:
        """Sampling temperature at or below which training does not converge: entropy keeps falling.

        Derived in `dar.training.demo.brackets`. Without a pull towards the reference (alpha = 0)
        training converges at no temperature, and this is 0.
        """
        if self.alpha == 0:
            return 0.0
        if self.behavior == "sampled":
            return self.beta / (self.alpha + self.beta)
        return (self.alpha + self.beta) / (2 * self.alpha + self.beta)

    @property
    def convergence_problem(self) -> str | None:
        """Why training at this temperature does not converge; None if the temperature allows it."""
        if self.temperature > self.coldest + 1e-9:
            return None
        return (
            f"temperature {self.temperature:g} is not above {self.coldest:.3g}, so with this alpha "
            "and beta training does not converge: the entropy of the policy keeps falling; raise "
            "temperature, or alpha relative to beta"
        )

    @property
    def has_control_variate(self) -> bool:
        """Whether weights are reduced by their control variates."""
        return self.kl_budget is not None if self.control_variate is None else self.control_variate

    @property
    def is_evaluating(self) -> bool:
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

    def step_plan(self, rows: int, *, is_replay: bool) -> StepPlan:
        """Which prompts each step takes of a data set with so many rows."""
        shares = self.world_size * self.gradient_accumulation_steps
        return StepPlan.of(
            rows,
            self.prompts_per_step,
            self.counted_epochs,
            is_replay=is_replay,
            chunk=shares if self.world_size > 1 else 1,
        )

    @property
    def template_variables(self) -> dict[str, Any]:
        """``chat_template_kwargs`` after they were parsed."""
        assert not isinstance(self.chat_template_kwargs, str)
        return self.chat_template_kwargs or {}

    def decisive_values(self) -> dict[str, Any]:
        """Everything here that decides the result of training, as JSON values."""
        own = {f.name for f in fields(DARConfig)} - {f.name for f in fields(TrainingArguments)}
        own -= {"reward_model_path"}  # its weights change the result, not their path
        own -= {"overlap", "order"}  # only whether one step is sampled ahead changes the result
        own -= {"learning_rate_multiplier"}  # the trainer puts it into the learning rate
        values = {name: getattr(self, name) for name in sorted(own | DECISIVE)}
        values = {name: getattr(value, "value", value) for name, value in values.items()}
        if not values["chat_template_kwargs"]:  # fingerprints of earlier versions do not have it
            del values["chat_template_kwargs"]
        if self.control_variate is None:
            del values["control_variate"]
        for name in ("kl_budget",) if self.kl_budget is None else CHOSEN:
            del values[name]
        return values | {
            "prompts_per_step": self.prompts_per_step,
            "is_one_step_ahead": self.overlap == "one_step",
        }


def _variables(given: object) -> dict[str, Any] | None:
    """Variables of the chat template, which a command line gives as JSON.

    Raises:
        InvalidRequestError: They are not an object, or hold what is no variable.
    """
    name = "chat_template_kwargs"
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"{name} must be a JSON object, but is {given!r:.80}: {error}", param=name
            ) from None
    check_value(given, name)
    return template_kwargs(given, name) or None
