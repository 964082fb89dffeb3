"""The job spec: everything needed to reproduce a job, exactly as a client submits it.

The fields are the one table of hyperparameters: default, bounds, unit and help. The API checks a
spec by them, and `dar.DARConfig` and the flags of ``dar train`` take theirs from here.

Fields that this version cannot vary yet accept their neutral value and reject every other (`only`):
an option is never accepted and then ignored.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dar.protocol.base import FreeObject, Input, one_of, only
from dar.protocol.budget_checks import CHOSEN, DEFAULT_BUDGET, component_conflict, has_default
from dar.protocol.presets import PRESETS, Preset
from dar.protocol.reward_spec import Rewards
from dar.protocol.row_values import check_value
from dar.protocol.rows import RowError, template_kwargs

MAX_LABELS = 16
"""Most labels of a job."""
Normalization = Literal["none", "per_prompt", "batch"]
Baseline = Literal["mean", "leave_one_out"]
LogRatio = Literal["sum", "mean"]
WeightNormalization = Literal["none", "batch", "per_prompt"]
Behavior = Literal["sampled", "policy"]
Overlap = Literal["none", "stream", "one_step"]
TrainingOrder = Literal["fixed", "completion"]


class Unit(str):
    """Unit of a field's value, as an annotation; the API's schema does not show it."""

    __slots__ = ()


class ServiceLimit(int):
    """A largest count that protects a service; `dar.DARConfig` does not have it."""

    __slots__ = ()


class Hyperparameters(Input):
    """How the policy is optimised. The same names and defaults as `dar.DARConfig`."""

    alpha: Annotated[float, Unit("reward")] = Field(0.1, ge=0)
    """Strength of the pull towards the reference model, in units of reward."""
    beta: Annotated[float, Unit("reward")] = Field(0.3, gt=0)
    """Strength of the pull towards the sampling policy, in units of reward; sets the step, not the
    optimum."""
    kl_budget: Annotated[float | None, Unit("nats")] = Field(
        None, gt=0, exclude_if=lambda value: value is None
    )
    """Mean KL of a completion to the reference that the trained policy should have at the end: a
    target that stops nothing. alpha and beta are chosen for it before the first step, from rewards
    of the base model's completions, and must not be sent. Null: alpha and beta are used. Not sent:
    1, or null beside ``alpha``, ``beta``, an option that excludes it or a preset other than
    ``default``, or without rewards."""
    dar_k: int = Field(4, ge=1, le=ServiceLimit(1024))
    """Completions sampled per prompt (K)."""
    dar_wclip: float = Field(20.0, gt=0)
    """Largest weight of a completion."""
    adv_norm: Normalization = "none"
    """Normalisation of the advantages after centring: ``none``, ``per_prompt`` or ``batch``."""
    baseline: Baseline = "leave_one_out"
    """Baseline of a reward: the mean reward of its prompt (``mean``), or the mean of the prompt's
    other completions (``leave_one_out``)."""
    log_ratio: Annotated[LogRatio, Unit("nats")] = "sum"
    """log(reference / behavior) of a completion: ``sum`` over its tokens, or ``mean``."""
    tie_tolerance: Annotated[float, Unit("reward")] = Field(0.0, ge=0)
    """Rewards of a prompt that lie within this range count as equal: their advantages are 0."""
    drop_ties: bool = False
    """Whether prompts whose rewards are all equal are left out of the step."""
    allow_missing: bool = True
    """Whether completions without a reward are left out. If false, the first such completion ends
    training."""
    weight_norm: WeightNormalization = "none"
    """Weights are divided by their mean over the step (``batch``) or over the prompt
    (``per_prompt``); ``none``: they are not divided."""
    min_ess: Annotated[float, Unit("fraction")] = Field(0.0, ge=0, lt=1)
    """Weights are flattened until the effective sample size is this share of the completions; 0
    turns it off."""
    behavior: Behavior = "sampled"
    """Behavior log-probabilities: ``sampled`` takes those of the distribution that was sampled,
    filters and temperature included; ``policy`` takes the policy's own at temperature 1."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; null: chosen by the size of the model, by whether its full weights or an
    adapter are trained, and with ``kl_budget`` by the number of steps and their completions. An
    event names the choice."""
    learning_rate_multiplier: Annotated[
        float,
        BeforeValidator(
            lambda value: 1.0 if value == "auto" else value,
            json_schema_input_type=Annotated[float, Field(gt=0)] | Literal["auto"],
        ),
    ] = Field(1.0, gt=0, exclude_if=lambda value: value == 1)
    """Multiplies the learning rate, whether chosen or given; ``auto`` is 1."""
    control_variate: bool | None = Field(None, exclude_if=lambda value: value is None)
    """Whether every weight is reduced by the policy's probability of the completion divided by that
    with which it was sampled: the same optimum with less noise. Without effect on completions that
    are read from a file. Null: true if there is a ``kl_budget``, else false."""
    batch_size: int = Field(8, ge=1, le=ServiceLimit(65536))
    """Prompts per optimizer step; each gives ``dar_k`` completions. A job with ``n_epochs``, and
    every offline job, takes no row twice in a step, so a step has at most as many prompts as the
    file."""
    max_steps: int | None = Field(None, ge=1, le=ServiceLimit(10_000_000))
    """Optimizer steps in all; null: from ``n_epochs``."""
    n_epochs: float | None = Field(None, gt=0, le=10_000)
    """Passes over the training file; null: from ``max_steps``, or 1 when both are null. The last
    step takes the prompts that are left."""
    warmup_steps: int = Field(0, ge=0, le=ServiceLimit(10_000_000))
    """Steps over which the learning rate rises from 0."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Schedule of the learning rate after the warm-up: ``linear``, ``cosine`` or ``constant``;
    ``constant_with_warmup`` is transformers' name of ``constant``."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0 turns it off."""
    optim: Literal["adamw", "adafactor", "adamw_torch"] = "adamw"
    """Optimizer: ``adamw`` or ``adafactor``; ``adamw_torch`` is transformers' name of ``adamw``."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""

    @model_serializer(mode="wrap")
    def _without_chosen(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what a budget chooses, so that a resolved spec can be sent again."""
        values: dict[str, Any] = plain(self)
        if self.kl_budget is None:
            return values
        return {name: value for name, value in values.items() if name not in CHOSEN}

    @model_validator(mode="after")
    def _one_length(self) -> "Hyperparameters":
        if self.max_steps is not None and self.n_epochs is not None:
            raise PydanticCustomError("exclusive_fields", "send max_steps or n_epochs, not both")
        return self


class Sampling(Input):
    """How completions are sampled from the policy."""

    max_new_tokens: Annotated[int, Unit("tokens")] = Field(128, ge=1, le=ServiceLimit(131_072))
    """Longest completion, in tokens, its end-of-sequence token included."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits before sampling."""
    top_p: Annotated[float, Unit("probability")] = Field(1.0, gt=0, le=1)
    """Only the likeliest tokens that make up this probability mass are kept; 1 turns it off."""
    top_k: Annotated[int, Unit("tokens")] = Field(0, ge=0, le=ServiceLimit(10_000_000))
    """Number of likeliest tokens that are kept; 0 turns it off."""
    min_p: Annotated[float | None, Unit("fraction")] = Field(None, ge=0, le=1)
    """Tokens less likely than this fraction of the likeliest one are dropped; null turns it off."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Makes tokens that occurred already less likely (above 1) or more likely (below 1); 1 turns it
    off."""
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default_factory=list, max_length=16
    )
    """Strings that end a completion as soon as it contains one of them. They may contain special
    tokens."""
    max_length: Annotated[int | None, Unit("tokens")] = Field(
        None, ge=2, le=ServiceLimit(10_000_000)
    )
    """Longest prompt and completion together, in tokens; null: the model's context."""
    max_prompt_length: Annotated[int | None, Unit("tokens")] = Field(
        None, ge=1, le=ServiceLimit(10_000_000)
    )
    """Longest prompt, in tokens; a longer one is cut on the left. Null: what ``max_length`` leaves
    beside the completion."""


class LoraSpec(Input):
    """Train a low-rank adapter instead of the full weights."""

    type: Literal["lora"]
    """Must be ``lora``."""
    r: int = Field(16, ge=1, le=1024)
    """Rank of the adapter."""
    lora_alpha: float = Field(32.0, gt=0)
    """The adapter's output is scaled by ``lora_alpha / r``."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: Annotated[
        str | list[str], one_of('"all-linear", a pattern, or a list of names')
    ] = "all-linear"
    """Modules that get an adapter: ``all-linear``, a pattern, or names."""


class Resources(Input):
    """Hardware of the job."""

    processes: int = Field(1, ge=1, le=64)
    """Processes that train together, one for each GPU of the worker's slot."""
    strategy: Literal["auto", "ddp", "fsdp", "zero2", "zero3"] = "auto"
    """How the processes share the work. ``ddp`` keeps whole weights in each process. ``fsdp`` and
    ``zero3`` shard weights, gradients and optimizer state; ``zero2`` shards gradients and optimizer
    state. ``auto`` is ``ddp``."""


class Evaluation(Input):
    """How often the policy is evaluated on the validation file."""

    every_steps: int = Field(ge=1, le=10_000_000)
    """Steps between two evaluations; the last step always has one."""
    max_prompts: int | None = Field(None, ge=1, le=100_000)
    """Number of prompts that are used, from the first; null: all."""


class Checkpointing(Input):
    """When resumable states are written, and which are kept.

    The last step always gets one. The newest, the best and pinned ones are always kept.
    """

    every_steps: int | None = Field(None, ge=1, le=10_000_000)
    """Steps between two checkpoints; null: one every 5 minutes of training."""
    keep_last: int = Field(3, ge=1, le=1000)
    """Newest checkpoints that are kept; older ones are removed."""
    keep_every: int | None = Field(None, ge=1, le=1_000_000, exclude_if=lambda value: value is None)
    """N: every N-th checkpoint is kept too, as a history of the run; null: none."""
    keep_best: bool = False
    """Whether ``fine_tuned_model`` has the weights of the best checkpoint instead of the last step.

    The best has the highest reward: of its evaluation, or without one the mean of the training
    steps since the checkpoint before. With ``kl_budget``, only checkpoints with a KL of at most 1.3
    times the budget compete. With evaluation, each evaluated step gets a checkpoint.
    """


class Limits(Input):
    """Bounds on what the job may use.

    When one is reached, the job ends with its present step: it writes a checkpoint and succeeds
    with that model.
    """

    max_seconds: float | None = Field(None, gt=0, le=1e9)
    """Running time of all attempts together; null: no limit. Time in the queue and paused time do
    not count."""
    max_reward_calls: int | None = Field(None, ge=1, le=1_000_000_000_000)
    """Requests to reward services of all attempts together, repeated ones included; null: no limit.
    They are counted as they are reported, so the step in which the limit is reached is finished."""


class DARSpec(Input):
    """A training job by Direct Advantage Regression."""

    preset: Preset = "default"
    """Source of values that are not given: ``default``, ``paper`` or ``reference``."""
    hyperparameters: Hyperparameters = Hyperparameters()
    sampling: Sampling = Sampling()
    rewards: Rewards | None = None
    """Where rewards come from. Null (offline training): the training file holds completions with
    their rewards."""
    peft: LoraSpec | None = None
    """The adapter to train. Null: the full weights are trained."""
    chat_template_kwargs: FreeObject | None = Field(None, exclude_if=lambda value: value is None)
    """Variables of the chat template for every conversation, like ``{"enable_thinking": false}``.
    Those of a row's column ``chat_template_kwargs`` take precedence."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the forward and backward pass; auto: bf16 on GPUs that support it, else
    fp32."""
    overlap: Overlap = "stream"
    """What is done while rewards are pending: ``none``: nothing; ``stream``: training on the
    prompts that are scored already; ``one_step``: that, and the next step is sampled before this
    one is trained, by a policy that is one update older."""
    order: TrainingOrder = "fixed"
    """In which order the prompts of a step are trained on: ``fixed`` is reproducible to the last
    bit; ``completion``: as they are scored, which waits least and differs by rounding."""
    resources: Resources = Resources()
    checkpointing: Checkpointing = Checkpointing()
    evaluation: Evaluation | None = None
    """Null: the policy is not evaluated."""
    limits: Limits = Limits()

    @field_validator("chat_template_kwargs")
    @classmethod
    def _usable_variables(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        name = "chat_template_kwargs"
        try:
            template_kwargs(given, name)
            check_value(given, name)
        except RowError as error:
            raise PydanticCustomError(
                "invalid_variables", "{why}", {"why": error.message}
            ) from None
        return given

    @model_validator(mode="before")
    @classmethod
    def _put_preset_behind(cls, given: object) -> object:
        """Fill in the preset's values where the client has sent none."""
        if not isinstance(given, dict):
            return given
        preset = given.get("preset", "default")
        values = PRESETS.get(preset) if isinstance(preset, str) else None
        if values is None:
            return given
        filled = dict(given)
        for name in ("hyperparameters", "sampling"):
            sent = given.get(name, {})
            if isinstance(sent, Input):  # in Python, not over the wire
                sent = sent.model_dump(exclude_unset=True)
            if isinstance(sent, dict):
                filled[name] = {**getattr(values, name), **sent}
        return filled

    @model_validator(mode="after")
    def _with_default_budget(self) -> "DARSpec":
        """Set ``kl_budget`` where nothing is sent that conflicts with it."""
        hyper, rewards = self.hyperparameters, self.rewards
        given = hyper.model_fields_set
        if rewards is None or not has_default(dict(hyper), given, self.sampling.temperature):
            return self
        if any(component_conflict(one.name, one.normalize) for one in rewards.components):
            return self
        filled = hyper.model_copy(update={"kl_budget": DEFAULT_BUDGET})
        self.__dict__["hyperparameters"] = filled  # an assignment would validate again
        self.__pydantic_fields_set__.add("hyperparameters")
        return self


class Method(Input):
    """OpenAI's ``method``, with the type that this service runs."""

    type: Annotated[Literal["dar"], only("dar")]
    """Must be ``dar``."""
    dar: DARSpec


MetadataValue = Annotated[str, Field(max_length=512)]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]


def _few(metadata: dict[str, str]) -> dict[str, str]:
    if len(metadata) > MAX_LABELS:
        raise PydanticCustomError(
            "too_many_keys",
            "{count} keys, but at most {most} are allowed",
            {"count": len(metadata), "most": MAX_LABELS},
        )
    return metadata


Metadata = Annotated[dict[MetadataKey, MetadataValue], AfterValidator(_few)]
"""Labels of a job."""


def _refuse_top_level(given: object) -> object:
    if given is not None:
        raise PydanticCustomError(
            "unsupported_value",
            "this service reads hyperparameters under method.dar only; put them into "
            "method.dar.hyperparameters",
        )
    return given


class JobSpec(Input):
    """Body of ``POST /v1/fine_tuning/jobs``."""

    model: str = Field(min_length=1, max_length=256)
    """A folder under the models directory, a fine-tuned model, or a hub id (with a slash)."""
    training_file: str = Field(min_length=1, max_length=256)
    """Id of an uploaded file of prompts, or of completions with their rewards; or a data set of the
    hub, ``hf://owner/name?split=train``."""
    validation_file: str | None = Field(None, min_length=1, max_length=256)
    """Id of an uploaded file, of the training file's format, that the policy is evaluated on; see
    ``method.dar.evaluation``."""
    method: Method
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    """Fixes data order and sampling; null: the service draws one and records it."""
    suffix: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)
    """Part of the fine-tuned model's name."""
    metadata: Metadata | None = None
    """Up to 16 labels of the user's own."""
    skip_validation: bool = False
    """Whether the job is accepted without calling its reward services first."""
    auto_start: bool = Field(True, exclude_if=lambda value: value is True)
    """Whether the job is queued at once. If false, it is ``paused`` until a request starts it."""
    hyperparameters: Annotated[None, BeforeValidator(_refuse_top_level)] = None
    """Must be null: hyperparameters are in ``method.dar.hyperparameters``."""
    integrations: Annotated[None, only(None)] = None
    """Not supported yet: must be null."""

    @model_validator(mode="after")
    def _fit_together(self) -> "JobSpec":
        dar = self.method.dar
        if (dar.evaluation is None) != (self.validation_file is None):
            raise PydanticCustomError(
                "evaluation_incomplete",
                "validation_file and method.dar.evaluation belong together; send both or neither",
            )
        if dar.rewards is None and dar.overlap == "one_step":
            raise PydanticCustomError(
                "overlap_without_rewards",
                "overlap one_step samples one step ahead, but without rewards nothing is sampled; "
                "leave it out",
            )
        prompts, processes = dar.hyperparameters.batch_size, dar.resources.processes
        if prompts % processes:
            raise PydanticCustomError(
                "batch_not_divisible",
                "{processes} processes cannot share a batch_size of {prompts} evenly; "
                "send a multiple",
                {"processes": processes, "prompts": prompts},
            )
        return self

    @property
    def dar(self) -> DARSpec:
        return self.method.dar


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Which prompts of the stream of all epochs each optimizer step takes.

    A run whose length is given in epochs never takes more: its last step takes what is left. Its
    steps, and those of offline training, never take a row twice, so a row is not compared with its
    own copies. Batches cross the ends of epochs.
    """

    rows: int
    """Rows of the data set."""
    per_step: int
    """Prompts of a step; the last one may have fewer."""
    total: int | None
    """Prompts of all steps; None: the run's length is given in steps."""
    is_distinct: bool
    """Whether no step takes a row twice."""

    @classmethod
    def of(
        cls,
        rows: int,
        batch_size: int,
        epochs: float | None,
        *,
        is_replay: bool = False,
        chunk: int = 1,
    ) -> "StepPlan":
        """The plan of a run.

        Args:
            rows: Rows of the data set.
            batch_size: Prompts per step, as requested.
            epochs: Passes over the data set; None: the run's length is given in steps.
            is_replay: Whether the rows hold their completions.
            chunk: Every step has a multiple of so many prompts, as several processes share them
                evenly; the prompts beyond that are left out.
        """
        is_distinct = is_replay or epochs is not None
        per_step, total = batch_size, None
        if is_distinct:
            per_step = max(chunk, min(batch_size, rows) // chunk * chunk)
        if epochs is not None:
            total = max(chunk, math.floor(epochs * rows + 1e-9) // chunk * chunk)
        return cls(rows, per_step, total, is_distinct and per_step <= rows)

    @property
    def steps(self) -> int:
        """Steps of a run whose length is given in epochs."""
        assert self.total is not None
        return -(-self.total // self.per_step)

    def positions(self, step: int) -> range:
        """Positions in the stream, from 0, that a step takes; steps count from 1."""
        start = (step - 1) * self.per_step
        return range(start, max(start + 1, self.end(step)))

    def end(self, step: int) -> int:
        """Prompts of all steps up to this one."""
        end = step * self.per_step
        return end if self.total is None else min(end, self.total)


def total_steps(hyperparameters: Hyperparameters, num_rows: int, processes: int = 1) -> int:
    """Optimizer steps of a job over ``num_rows`` prompts."""
    if hyperparameters.max_steps is not None:
        return hyperparameters.max_steps
    epochs = hyperparameters.n_epochs or 1.0
    return StepPlan.of(num_rows, hyperparameters.batch_size, epochs, chunk=processes).steps
