"""The job spec: everything needed to reproduce a job, exactly as a client submits it.

Fields that this version cannot vary yet accept their neutral value and refuse every other one (`only`): an option is never
accepted and then ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from dar.protocol.base import Fraction, Input, NonNegative, Positive, only
from dar.protocol.presets import PRESETS, Preset
from dar.protocol.reward_spec import Rewards

Overlap = Literal["none", "stream", "one_step"]
Order = Literal["fixed", "completion"]


class Hyperparameters(Input):
    """How the policy is optimised. The same names and defaults as `dar.DARConfig`."""

    alpha: NonNegative = 0.1
    """Strength of the pull towards the reference model, in units of reward."""
    beta: Positive = 0.3
    """Strength of the pull towards the sampling policy, in units of reward; sets the step, not the optimum."""
    dar_k: Annotated[int, Field(ge=1, le=1024)] = 4
    """Completions sampled per prompt (K)."""
    dar_wclip: Positive = 20.0
    """Largest weight of a completion."""
    adv_norm: Literal["none", "per_prompt", "batch"] = "none"
    """Normalisation of the advantages after centring."""
    baseline: Literal["mean", "leave_one_out"] = "leave_one_out"
    """What a reward is compared with: the mean of its prompt's rewards, or the mean of its siblings'."""
    log_ratio: Literal["sum", "mean"] = "sum"
    """log(reference / behavior) of a completion: the sum over its tokens, or the mean."""
    tie_tolerance: NonNegative = 0.0
    """Rewards of a prompt that lie within this range are equal: their advantages are 0."""
    drop_ties: bool = False
    """Whether prompts whose rewards are all equal are left out of the step."""
    allow_missing: bool = True
    """Whether completions without a reward are left out; otherwise one ends the job."""
    weight_norm: Literal["none", "batch", "per_prompt"] = "none"
    """Whether weights are divided by their mean, over the step or over the prompt."""
    min_ess: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Weights are flattened until the effective sample size is this share of the completions; 0 turns it off."""
    behavior: Literal["sampled", "policy"] = "sampled"
    """Behavior log-probabilities: of the law that sampled, filters and temperature included, or the policy's own."""
    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 8
    """Prompts per optimizer step; each gives ``dar_k`` completions."""
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Optimizer steps in all; null: from ``n_epochs``."""
    n_epochs: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """Passes over the training file; null: from ``max_steps``, or 1 when both are null."""
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Steps over which the learning rate rises from 0."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after the warm-up."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this norm; 0 turns it off."""
    optim: Literal["adamw", "adafactor"] = "adamw"
    """Optimizer."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment."""

    @model_validator(mode="after")
    def _one_length(self) -> "Hyperparameters":
        if self.max_steps is not None and self.n_epochs is not None:
            raise PydanticCustomError(
                "exclusive_fields",
                "max_steps and n_epochs both set the length of the job; send one and leave the other null",
            )
        return self


class Sampling(Input):
    """How completions are sampled from the policy."""

    max_new_tokens: Annotated[int, Field(ge=1, le=131_072)] = 128
    """Longest completion, in tokens, its end-of-sequence token included."""
    temperature: Positive = 1.0
    """Divides the logits before sampling."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest probability mass that is kept; 1 turns it off."""
    top_k: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Number of likeliest tokens that are kept; 0 turns it off."""
    min_p: Fraction | None = None
    """Tokens less likely than this fraction of the likeliest one are dropped; null turns it off."""
    repetition_penalty: Positive = 1.0
    """Divides the scores of tokens that occurred already; 1 turns it off."""
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default_factory=list, max_length=16
    )
    """Strings that end a completion as soon as it contains one of them."""
    max_length: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    """Longest prompt and completion together, in tokens; null: the model's context."""
    max_prompt_length: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Longest prompt, in tokens; null: what a completion leaves."""


class LoraSpec(Input):
    """Train a low-rank adapter instead of the full weights."""

    type: Literal["lora"]
    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the adapter."""
    lora_alpha: Positive = 32.0
    """The adapter is scaled by ``lora_alpha / r``."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: ``all-linear``, a pattern, or names."""


class Resources(Input):
    """Hardware of the job."""

    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that train together, one for each GPU of the worker's slot."""
    strategy: Literal["auto", "ddp", "fsdp", "zero2", "zero3"] = "auto"
    """How they share the work: ``ddp`` keeps whole weights in each process, ``fsdp`` and ``zero3`` cut them into shards, ``zero2``
    cuts gradients and optimizer state; ``auto`` is ``ddp``."""


class Evaluation(Input):
    """How often the policy is tried on the validation file."""

    every_steps: Annotated[int, Field(ge=1, le=10_000_000)]
    """Steps between two evaluations; the last step always has one."""
    max_prompts: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Prompts that are used, from the first; null: all."""


class Checkpointing(Input):
    """When resumable states are written. The last step always gets one."""

    every_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Steps between two checkpoints; null: a twentieth of the job."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 3
    """Checkpoints that are kept; older ones are removed."""
    keep_best: Annotated[Literal[False], only(False)] = False


class Limits(Input):
    """Bounds on what the job may use."""

    max_seconds: Annotated[None, only(None)] = None
    max_reward_calls: Annotated[None, only(None)] = None


class DARSpec(Input):
    """A training job by Direct Advantage Regression."""

    preset: Preset = "default"
    """Where values that are not sent come from: ``default``, ``paper`` or ``reference``."""
    hyperparameters: Hyperparameters = Hyperparameters()
    sampling: Sampling = Sampling()
    rewards: Rewards | None = None
    """Null: the training file holds completions and their rewards."""
    peft: LoraSpec | None = None
    """Null trains the full weights."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the forward and backward pass; auto: bf16 on GPUs that have it, else fp32."""
    overlap: Overlap = "stream"
    """What is done while rewards are pending: ``none``: nothing; ``stream``: training on the prompts that are scored already;
    ``one_step``: that, and the next step is sampled before this one is trained, by a policy that is one update older."""
    order: Order = "fixed"
    """In which order the prompts of a step are trained on: ``fixed`` is reproducible to the last bit; ``completion``: as they are
    scored, which waits least and differs by rounding."""
    resources: Resources = Resources()
    checkpointing: Checkpointing = Checkpointing()
    evaluation: Evaluation | None = None
    """Null: none."""
    limits: Limits = Limits()

    @model_validator(mode="before")
    @classmethod
    def _put_preset_behind(cls, given: object) -> object:
        """Values of the preset stand where the client has sent none."""
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


class Method(Input):
    """OpenAI's ``method``, with the type that this service runs."""

    type: Annotated[Literal["dar"], only("dar")]
    dar: DARSpec


MetadataValue = Annotated[str, Field(max_length=512)]


class JobSpec(Input):
    """Body of ``POST /v1/fine_tuning/jobs``."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """A folder under the models directory, a fine-tuned model, or a hub id (with a slash)."""
    training_file: Annotated[str, Field(min_length=1, max_length=256)]
    """Id of an uploaded file of prompts, or of completions with their rewards; or a data set of the hub,
    ``hf://owner/name?split=train``."""
    validation_file: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Id of an uploaded file, of the training file's format, that the policy is tried on; see ``method.dar.evaluation``."""
    method: Method
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Fixes data order and sampling; null: the service draws one and records it."""
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)] | None = (
        None
    )
    """Part of the fine-tuned model's name."""
    metadata: dict[Annotated[str, Field(min_length=1, max_length=64)], MetadataValue] | None = None
    """Up to 16 labels of the user's own."""
    skip_validation: bool = False
    """Whether the job is accepted without trying its reward services first."""
    hyperparameters: Annotated[None, only(None)] = None
    integrations: Annotated[None, only(None)] = None

    @field_validator("metadata")
    @classmethod
    def _few(cls, metadata: dict[str, Any] | None) -> dict[str, Any] | None:
        if metadata is not None and len(metadata) > 16:
            raise PydanticCustomError(
                "too_many_keys",
                "{count} keys, but at most 16 are allowed",
                {"count": len(metadata)},
            )
        return metadata

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
                "overlap one_step samples one step ahead, but without rewards nothing is sampled; leave it out",
            )
        prompts, processes = dar.hyperparameters.batch_size, dar.resources.processes
        if prompts % processes:
            raise PydanticCustomError(
                "batch_not_divisible",
                "{processes} processes cannot share a batch_size of {prompts} evenly; send a multiple",
                {"processes": processes, "prompts": prompts},
            )
        return self

    @property
    def dar(self) -> DARSpec:
        """The DAR part of the spec."""
        return self.method.dar


def total_steps(hyperparameters: Hyperparameters, num_rows: int) -> int:
    """Optimizer steps of a job over ``num_rows`` prompts; the last batch of an epoch runs on into the next."""
    if hyperparameters.max_steps is not None:
        return hyperparameters.max_steps
    prompts = (hyperparameters.n_epochs or 1.0) * num_rows
    return max(1, -int(-prompts // hyperparameters.batch_size))
