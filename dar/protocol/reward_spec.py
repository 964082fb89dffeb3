"""The ``rewards`` of a job spec: which sources score a job's completions, and how they are called."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from dar.protocol.base import Input, only

COMPONENT_NAME = r"^[a-z][a-z0-9_]{0,31}$"
RESERVED_COLUMNS = frozenset(
    {"prompt", "prompts", "completion", "completions", "completion_ids", "messages"}
)


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


def _check_order(bounds: list[float]) -> list[float]:
    if not bounds[0] < bounds[1]:
        raise PydanticCustomError("clip_order", "the lower bound must be below the upper one")
    return bounds


Bounds = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_check_order)]


class FallbackValue(Input):
    """A reward for samples that could not be scored."""

    fallback_value: Annotated[float, Field(ge=-1e6, le=1e6)]


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
    linger_ms: Annotated[float, Field(ge=0, le=10_000)] = 50.0
    """How long a request that is not full waits for further groups, in milliseconds."""


class RewardLimits(Input):
    """How hard a reward service may be driven."""

    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests in flight at once."""
    rps: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """Most requests begun per second, retries included; null: no bound."""
    adaptive: Annotated[Literal[False], only(False)] = False


class RewardCaching(Input):
    """Whether rewards are remembered, and equal samples of a step sent once."""

    enabled: Literal["auto"] | bool = "auto"
    """``auto``: only where the last probe of the registered endpoint, at its present revision, found that repeats and other
    orders change nothing; an inline URL has no such probe, so there it is off."""
    scope: Literal["job", "endpoint"] = "job"
    """``endpoint``: shared on each worker host by the jobs that name the same registered endpoint."""
    ttl_seconds: Annotated[float, Field(gt=0, le=366 * 86_400)] = 7 * 86_400.0
    """How long a reward is remembered; 604,800 s are 7 days."""


class MinMax(Input):
    """Maps ``[lo, hi]`` onto [0, 1]."""

    minmax: Bounds
    """``[lo, hi]``; what lies beyond is held at 0 or 1."""


class Tanh(Input):
    """``tanh(reward / scale)``."""

    tanh: Annotated[float, Field(gt=0, le=1e6)]
    """Scale, in units of reward."""


Normalize = Literal["none", "running", "group"] | MinMax | Tanh
ProtocolName = Literal["dar.reward.v1", "openrlhf", "trl", "plain", "openai_grader"]
ENDPOINT_ID = r"^rwe_[0-9A-Za-z]{26}$"


class RewardComponent(Input):
    """One reward source of a job. Which fields may differ from their defaults depends on ``kind``."""

    name: Annotated[str, Field(pattern=COMPONENT_NAME)]
    """Unique in the job; names the component's metrics."""
    kind: Literal["http", "builtin", "hf_model"] = "http"
    """Where the reward comes from: a reward service, a function of this package, or a reward model beside the trainer."""
    role: Literal["term", "gate"] = "term"
    """What becomes of its rewards: a ``term`` is added to the sum; a ``gate`` says 0 or 1, and the sum is multiplied by it before
    ``combine.clip``. A gate has no weight, clip or normalisation, and is always required."""
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """Factor of this component in the sum; 0 only watches."""
    required: bool = True
    """Whether a sample that this component cannot score counts as missing; otherwise the sum goes on without it."""
    clip: Bounds | None = None
    """Bounds that the raw reward is held to: ``[low, high]``."""
    normalize: Normalize = "none"
    """What is done to the clipped reward before it is weighted: ``none``; ``running`` takes mean and deviation of all rewards so
    far; ``group`` those of the prompt's rewards; ``{"minmax": [lo, hi]}``; ``{"tanh": scale}``."""

    url: RewardURL | None = None
    """http: the user's reward service, reached from the worker; or name a registered ``endpoint``."""
    endpoint: Annotated[str, Field(pattern=ENDPOINT_ID)] | None = None
    """http: a registered reward endpoint (``rwe_…``), which brings its own URL and secrets."""
    protocol: ProtocolName = "dar.reward.v1"
    """http: what is spoken with it."""
    template: Any = None
    """http, protocol ``plain``: body of a request; ``{{name}}`` in a string is replaced by a value of the sample."""
    pointer: Annotated[str, Field(pattern=r"^(/[^/]*)*$", max_length=256)] | None = None
    """http, protocol ``plain``: JSON pointer to the reward in an answer, like ``/data/0/score``."""
    grader: dict[str, Any] | None = None
    """http, protocol ``openai_grader``: sent along as ``grader``."""
    coerce: bool = False
    """http: whether rewards sent as numeric strings or booleans are taken as numbers."""
    prompt_format: Literal["auto", "text"] = "auto"
    """http: ``auto`` sends conversations as ``messages``; ``text`` sends every prompt as the text that the policy saw."""
    strip_thinking: bool = False
    """http, builtin: whether completions are scored without their ``<think>…</think>`` blocks; an unclosed one goes to the end."""
    batch: RewardBatching = RewardBatching()
    limits: RewardLimits = RewardLimits()
    timeouts: RewardTimeouts = RewardTimeouts()
    retry: RewardRetry = RewardRetry()
    cache: RewardCaching = RewardCaching()
    """http: whether rewards are remembered."""
    reply: Literal["sync", "either"] = "sync"
    """http: how the service may answer; ``either`` allows a 202 whose result follows by callback or polling."""
    require_signed_responses: bool = False
    """http: whether an answer must carry a signature of the endpoint's secret."""
    columns: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=64)]
        | None
    ) = None
    """http: columns of the training file that are sent along; null: only ``ground_truth``."""

    fn: Annotated[str, Field(pattern=COMPONENT_NAME)] | None = None
    """builtin: name of the function; see the reward guide."""
    params: dict[str, Any] = Field(default_factory=dict)
    """builtin: its parameters."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """hf_model: a folder under the models directory, or a hub id, of a sequence classifier with one label."""

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

    @model_validator(mode="after")
    def _fits_kind(self) -> "RewardComponent":
        fields = type(self).model_fields
        for kind, names in FIELDS_OF_KIND.items():
            for name in names:
                default = fields[name].get_default(call_default_factory=True)
                if kind != self.kind and getattr(self, name) != default:
                    raise PydanticCustomError(
                        "field_of_another_kind",
                        "{name} belongs to components of kind {kind}, but this one is of kind {own}; leave it out",
                        {"name": name, "kind": kind, "own": self.kind},
                    )
        missing = {"builtin": self.fn, "hf_model": self.model, "http": self.url or self.endpoint}
        if missing[self.kind] is None:
            needed = {"builtin": "fn", "hf_model": "model", "http": "url or endpoint"}[self.kind]
            raise PydanticCustomError(
                "missing_field", "a component of kind {kind} needs {needed}",
                {"kind": self.kind, "needed": needed},
            )  # fmt: skip
        if self.url is not None and self.endpoint is not None:
            raise PydanticCustomError(
                "exclusive_fields",
                "url and endpoint both say where the reward comes from; send one",
            )
        if self.kind == "hf_model" and self.strip_thinking:
            raise PydanticCustomError(
                "field_of_another_kind",
                "strip_thinking belongs to components of kind http and builtin; a reward model reads whole completions",
            )
        self._check_protocol()
        self._check_gate()
        return self

    def _check_gate(self) -> None:
        if self.role != "gate":
            return
        for name in FIELDS_OF_TERMS:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise PydanticCustomError(
                    "field_of_a_term",
                    "{name} has no meaning for a gate, which multiplies the sum by 0 or 1 and is always required; leave it out",
                    {"name": name},
                )

    def _check_protocol(self) -> None:
        for protocol, names in FIELDS_OF_PROTOCOL.items():
            for name in names:
                is_given = getattr(self, name) is not None
                if is_given and protocol != self.protocol:
                    raise PydanticCustomError(
                        "field_of_another_protocol",
                        "{name} belongs to protocol {protocol}, but this component speaks {own}; leave it out",
                        {"name": name, "protocol": protocol, "own": self.protocol},
                    )
                # A registered endpoint may bring them.
                if not is_given and protocol == self.protocol and self.endpoint is None:
                    raise PydanticCustomError(
                        "missing_field", "protocol {protocol} needs {name}",
                        {"protocol": protocol, "name": name},
                    )  # fmt: skip
        if self.protocol != "dar.reward.v1" and self.reply != "sync":
            raise PydanticCustomError(
                "sync_protocol", "protocol {own} knows no later answers; send reply sync", {"own": self.protocol}
            )  # fmt: skip


FIELDS_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "http": (
        "url", "endpoint", "protocol", "template", "pointer", "grader", "coerce", "prompt_format", "batch", "limits",
        "timeouts", "retry", "cache", "reply", "require_signed_responses", "columns",
    ),
    "builtin": ("fn", "params"),
    "hf_model": ("model",),
}  # fmt: skip
FIELDS_OF_TERMS = ("weight", "clip", "normalize", "required")
FIELDS_OF_PROTOCOL: Mapping[str, tuple[str, ...]] = {
    "plain": ("template", "pointer"),
    "openai_grader": ("grader",),
}


class Combine(Input):
    """How the rewards of the components become one."""

    mode: Annotated[Literal["weighted_sum"], only("weighted_sum")] = "weighted_sum"
    clip: Bounds | None = None
    """Bounds that the sum is held to."""
    on_partial_skip: Literal["drop_group", "zero"] = "drop_group"
    """A component that skips only some completions of a prompt: ``drop_group`` leaves all of them out (if it is not required: the
    component), as sums over different components cannot be compared; ``zero`` adds 0 for those, with a warning and a metric."""
    tie_eps: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Sums of a group that lie within this range are equal: their advantages are 0."""


class FailurePolicy(Input):
    """What becomes of samples without a reward. No failure turns into a number but by ``fallback_value``."""

    on_error: Literal["drop_sample", "drop_group", "fail_job"] | FallbackValue = "drop_sample"
    """A sample that could not be scored is left out; or its whole group is; or the job fails; or it gets a reward that is named
    here (``{"fallback_value": 0.0}``), with a warning and a metric each time."""
    min_valid: Annotated[int, Field(ge=1, le=1024)] = 2
    """Scored samples below which a group is left out."""
    refill: Annotated[float, Field(ge=1, le=4)] = 1.0
    """Groups that may be sampled for a step, relative to the batch size, to replace those left out; 1: none extra."""
    max_failed_fraction: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Failed samples in the last ``window_groups`` groups above which the job pauses."""
    window_groups: Annotated[int, Field(ge=1, le=100_000)] = 200
    """Groups that ``max_failed_fraction`` looks back on."""
    max_empty_steps: Annotated[int, Field(ge=1, le=1000)] = 3
    """Steps in a row without a usable group after which the job pauses."""
    on_budget: Literal["pause", "fail"] = "pause"
    """What happens then."""


class Rewards(Input):
    """Where the rewards of a job come from: the weighted sum of its components."""

    components: Annotated[list[RewardComponent], Field(min_length=1, max_length=16)]
    combine: Combine = Combine()
    failure: FailurePolicy = FailurePolicy()

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
