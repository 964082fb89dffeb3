"""The job spec: everything needed to reproduce a job, exactly as a client submits it.

Fields that this version cannot vary yet accept their neutral value and refuse every other one (`only`): an option is never
accepted and then ignored.
"""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from dar.protocol.base import Input

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
COMPONENT_NAME = r"^[a-z][a-z0-9_]{0,31}$"
RESERVED_COLUMNS = frozenset(
    {"prompt", "prompts", "completion", "completions", "completion_ids", "messages"}
)


def only(value: object) -> BeforeValidator:
    """Accept just ``value``; the error names it, so that a client knows what to send."""

    def check(given: object) -> object:
        if given != value or isinstance(given, bool) != isinstance(value, bool):
            raise PydanticCustomError(
                "unsupported_value",
                "this version supports only {supported} here; send that or leave the field out",
                {
                    "supported": "null"
                    if value is None
                    else repr(value).lower()
                    if isinstance(value, bool)
                    else repr(value)
                },
            )
        return given

    return BeforeValidator(check)


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


def _check_reward_url(url: str) -> str:
    def refuse(why: str) -> PydanticCustomError:
        return PydanticCustomError("reward_url", "not a usable reward URL: {why}", {"why": why})

    if any(ch.isspace() or ord(ch) < 0x20 for ch in url):
        raise refuse("it contains a space or a control character")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise refuse(str(error)) from None
    if parts.scheme not in {"http", "https"}:
        raise refuse("it must start with http:// or https://")
    if not parts.hostname:
        raise refuse("it names no host")
    if port == 0:
        raise refuse("port 0 cannot be reached")
    if parts.username is not None or parts.password is not None:
        raise refuse(
            "a user name or password does not belong in a URL; it would be kept with the job"
        )
    if parts.fragment:
        raise refuse("a fragment (#…) is never sent to a server")
    return url


RewardURL = Annotated[str, Field(min_length=1, max_length=2048), AfterValidator(_check_reward_url)]


class RewardTimeouts(Input):
    """Hard limits on waiting for a reward service, in seconds."""

    connect: Annotated[float, Field(gt=0, le=60)] = 5.0
    """To open a connection."""
    read: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Between two pieces of an answer."""
    attempt: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """For one attempt, from dialling to the last byte."""
    deadline: Annotated[float, Field(gt=0, le=3600)] = 300.0
    """For one request over all its attempts and the waits between them."""


class RewardRetry(Input):
    """How transient failures of a reward service are retried."""

    attempts: Annotated[int, Field(ge=1, le=20)] = 4
    """Attempts in all, the first included."""
    base: Annotated[float, Field(gt=0, le=60)] = 0.5
    """Seconds; the wait before attempt n+1 is drawn from 0 to ``base * 2**n``."""
    cap: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Longest drawn wait, in seconds."""
    retry_after_cap: Annotated[float, Field(gt=0, le=600)] = 60.0
    """Longest wait that a ``Retry-After`` header can ask for, in seconds."""


class RewardBatching(Input):
    """How samples are put together into requests; the completions of one prompt stay together."""

    by: Annotated[Literal["group"], only("group")] = "group"
    """What is never split over two requests, unless it alone is over the limits."""
    max_samples: Annotated[int, Field(ge=1, le=256)] = 16
    """Most samples in one request."""
    max_bytes: Annotated[int, Field(ge=1024, le=8 * 1024**2)] = 1024**2
    """Largest body of a request."""


class RewardLimits(Input):
    """How hard a reward service may be driven."""

    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests in flight at once."""


class RewardComponent(Input):
    """One reward source of a job."""

    name: Annotated[str, Field(pattern=COMPONENT_NAME)]
    """Unique in the job; names the component's metrics."""
    kind: Annotated[Literal["http"], only("http")] = "http"
    """Where the reward comes from."""
    url: RewardURL
    """The user's reward service, reached from the worker."""
    protocol: Annotated[Literal["dar.reward.v1"], only("dar.reward.v1")] = "dar.reward.v1"
    """What is spoken with it."""
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """Factor of this component in the sum."""
    required: Annotated[Literal[True], only(True)] = True
    """Whether a sample that this component cannot score counts as missing."""
    clip: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Bounds that the raw reward is held to: ``[low, high]``."""
    normalize: Annotated[Literal["none"], only("none")] = "none"
    """Normalisation of the raw reward."""
    batch: RewardBatching = RewardBatching()
    limits: RewardLimits = RewardLimits()
    timeouts: RewardTimeouts = RewardTimeouts()
    retry: RewardRetry = RewardRetry()
    reply: Annotated[Literal["sync"], only("sync")] = "sync"
    """How the service may answer."""
    columns: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=64)]
        | None
    ) = None
    """Columns of the training file that are sent along; null: only ``ground_truth``."""

    @field_validator("clip")
    @classmethod
    def _ordered(cls, clip: list[float] | None) -> list[float] | None:
        if clip is not None and not clip[0] < clip[1]:
            raise PydanticCustomError("clip_order", "the lower bound must be below the upper one")
        return clip

    @field_validator("columns")
    @classmethod
    def _free_names(cls, columns: list[str] | None) -> list[str] | None:
        for name in columns or ():
            if name in RESERVED_COLUMNS:
                raise PydanticCustomError(
                    "reserved_column",
                    "{name} is always sent and cannot be named here",
                    {"name": name},
                )
        return columns


class Rewards(Input):
    """Where the rewards of a job come from: the weighted sum of its components."""

    components: Annotated[list[RewardComponent], Field(min_length=1, max_length=16)]
    combine: Annotated[None, only(None)] = None
    failure: Annotated[None, only(None)] = None

    @field_validator("components")
    @classmethod
    def _unique(cls, components: list[RewardComponent]) -> list[RewardComponent]:
        names = [component.name for component in components]
        for name in names:
            if names.count(name) > 1:
                raise PydanticCustomError(
                    "duplicate_name", "two components are named {name}", {"name": name}
                )
        return components


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

    processes: Annotated[int, only(1)] = 1
    strategy: Annotated[Literal["auto"], only("auto")] = "auto"


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

    preset: Annotated[Literal["default"], only("default")] = "default"
    hyperparameters: Hyperparameters = Hyperparameters()
    sampling: Sampling = Sampling()
    rewards: Rewards
    peft: LoraSpec | None = None
    """Null trains the full weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the forward and backward pass; auto: bf16 on GPUs that have it, else fp32."""
    overlap: Annotated[Literal["none"], only("none")] = "none"
    order: Annotated[Literal["fixed"], only("fixed")] = "fixed"
    resources: Resources = Resources()
    checkpointing: Checkpointing = Checkpointing()
    evaluation: Annotated[None, only(None)] = None
    limits: Limits = Limits()


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
    """Id of an uploaded file of prompts."""
    validation_file: Annotated[None, only(None)] = None
    method: Method
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Fixes data order and sampling; null: the service draws one and records it."""
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)] | None = (
        None
    )
    """Part of the fine-tuned model's name."""
    metadata: dict[Annotated[str, Field(min_length=1, max_length=64)], MetadataValue] | None = None
    """Up to 16 labels of the user's own."""
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
