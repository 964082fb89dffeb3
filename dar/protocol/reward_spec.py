"""The ``rewards`` of a job spec: which sources score completions, and how they are called."""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dar.protocol.base import FreeObject, FreeValue, Input, one_of, only

COMPONENT_NAME = r"^[a-z][a-z0-9_]{0,31}$"
RESERVED_COLUMNS = frozenset(
    {"prompt", "prompts", "completion", "completions", "completion_ids", "messages"}
)

MAX_CONCURRENCY = 256
"""Most requests in flight to one reward service."""


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
        raise refuse("a user name or password does not belong in a URL; the job would keep it")
    if parts.fragment:
        raise refuse("a fragment (#…) is never sent to a server")
    return url


RewardURL = Annotated[str, Field(min_length=1, max_length=2048), AfterValidator(_check_reward_url)]


def check_pointer(pointer: str) -> str:
    """Check the escapes of a JSON pointer (RFC 6901).

    The spec itself takes any ``~``, so that stored jobs stay readable.

    Raises:
        PydanticCustomError: A ``~`` is followed by neither 0 nor 1.
    """
    if re.search(r"~(?![01])", pointer):
        raise PydanticCustomError(
            "invalid_pointer",
            "in a JSON pointer ~ starts an escape: write ~0 for a tilde and ~1 for a slash",
        )
    return pointer


def _check_order(bounds: list[float]) -> list[float]:
    if not bounds[0] < bounds[1]:
        raise PydanticCustomError("clip_order", "the lower bound must be below the upper one")
    return bounds


Bounds = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_check_order)]


def _retired(name: str, neutral: object) -> Any:  # noqa: ANN401 - what the decorator of pydantic returns
    """A validator that drops a field of earlier versions, which had this one value."""
    check = cast("Callable[[object], object]", only(neutral).func)

    def drop(given: object) -> object:
        if not isinstance(given, dict) or name not in given:
            return given
        try:
            check(given[name])
        except PydanticCustomError as error:
            # Raised as it is, the error would lack the field in its path.
            details = InitErrorDetails(type=error, loc=(name,), input=given[name])
            raise ValidationError.from_exception_data(name, [details]) from None
        return {key: value for key, value in given.items() if key != name}

    return model_validator(mode="before")(drop)


def with_retired_fields(rewards: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of `Rewards` with the fields of earlier versions.

    Digests of specs include them, so that a request repeated after an upgrade is recognised.
    """
    return {
        **rewards,
        "combine": {**rewards["combine"], "mode": "weighted_sum"},
        "components": [
            {
                **component,
                "batch": {**component["batch"], "by": "group"},
                "limits": {**component["limits"], "adaptive": False},
            }
            for component in rewards["components"]
        ],
    }


class FallbackValue(Input):
    """A reward for samples that could not be scored."""

    fallback_value: Annotated[float, Field(ge=-1e6, le=1e6)]
    """Reward of each sample that could not be scored."""


class RewardTimeouts(Input):
    """Time limits of requests to a reward service, in seconds."""

    connect: Annotated[float, Field(gt=0, le=60)] = 5.0
    """Seconds to open a connection."""
    read: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Seconds between two reads of an answer."""
    attempt: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Seconds for one attempt, from connecting to the last byte."""
    deadline: Annotated[float, Field(gt=0, le=3600)] = 300.0
    """Seconds for one request, including all attempts and the waits between them."""


class RewardRetry(Input):
    """How transient failures of a reward service are retried."""

    attempts: Annotated[int, Field(ge=1, le=20)] = 4
    """Most attempts, the first included."""
    base: Annotated[float, Field(gt=0, le=60)] = 0.5
    """Seconds; the wait before attempt n+1 is drawn from 0 to ``base * 2**n``."""
    cap: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Longest random wait, in seconds."""
    retry_after_cap: Annotated[float, Field(gt=0, le=600)] = 60.0
    """Longest wait that a ``Retry-After`` header can request, in seconds."""


class RewardBatching(Input):
    """How samples are batched into requests.

    The completions of one prompt are split over two requests only if they alone exceed a limit.
    """

    _by = _retired("by", "group")
    max_samples: Annotated[int, Field(ge=1, le=256)] = 16
    """Most samples in one request."""
    max_bytes: Annotated[int, Field(ge=1024, le=8 * 1024**2)] = 1024**2
    """Largest body of a request."""
    linger_ms: Annotated[float, Field(ge=0, le=10_000)] = 50.0
    """How long a request that is not full waits for further groups, in milliseconds."""


class RewardLimits(Input):
    """Limits on the load of a reward service."""

    _adaptive = _retired("adaptive", False)

    concurrency: Annotated[int, Field(ge=1, le=MAX_CONCURRENCY)] = 8
    """Requests in flight at once."""
    rps: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """Most requests started per second, retries included; null: no limit."""


class RewardCaching(Input):
    """Whether rewards are cached, and equal samples of a step are sent once."""

    enabled: Annotated[Literal["auto"] | bool, one_of('"auto", true or false')] = "auto"
    """``auto``: on where the last probe of the registered endpoint, at its current revision, found
    that neither a repetition nor another order changes a reward. Probe results of an inline URL are
    not stored, so for it ``auto`` means off."""
    scope: Literal["job", "endpoint"] = "job"
    """``job``: used by the job alone; ``endpoint``: shared on each worker host by the jobs that
    name the same registered endpoint."""
    ttl_seconds: Annotated[float, Field(gt=0, le=366 * 86_400)] = 7 * 86_400.0
    """How long a reward is cached; 604,800 s are 7 days."""


class MinMax(Input):
    """Maps ``[lo, hi]`` onto [0, 1]."""

    minmax: Bounds
    """``[lo, hi]``; values outside become 0 or 1."""


class Tanh(Input):
    """``tanh(reward / scale)``."""

    tanh: Annotated[float, Field(gt=0, le=1e6)]
    """Scale, in units of reward."""


Normalize = Annotated[
    Literal["none", "running", "group"] | MinMax | Tanh,
    one_of(
        '"none", "running", "group", {"minmax": [low, high]} or {"tanh": scale}',
        minmax=MinMax,
        tanh=Tanh,
    ),
]
OnError = Annotated[
    Literal["drop_sample", "drop_group", "fail_job"] | FallbackValue,
    one_of(
        '"drop_sample", "drop_group", "fail_job" or {"fallback_value": reward}',
        fallback_value=FallbackValue,
    ),
]
ProtocolName = Literal["dar.reward.v1", "openrlhf", "trl", "plain", "openai_grader"]
ENDPOINT_ID = r"^rwe_[0-9A-Za-z]{26}$"


class RewardComponent(Input):
    """One reward source of a job. ``kind`` decides which fields may differ from their defaults."""

    name: Annotated[str, Field(pattern=COMPONENT_NAME)]
    """Unique in the job; names the component's metrics."""
    kind: Literal["http", "builtin", "hf_model"] = "http"
    """Where the reward comes from: a reward service, a function of this package, or a reward model
    in the trainer's process."""
    role: Literal["term", "gate"] = "term"
    """A ``term`` is added to the sum. A ``gate`` gives 0 or 1, and the sum is multiplied by it
    before ``combine.clip``; it has no weight, clip or normalisation, and is always required."""
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """Factor of this component in the sum; 0: its reward is reported only."""
    required: bool = True
    """True: a sample that this component cannot score has no reward. False: the sum is then taken
    without the component."""
    clip: Bounds | None = None
    """Bounds that the raw reward is clipped to: ``[low, high]``."""
    normalize: Normalize = "none"
    """How the clipped reward is normalised before it is weighted. ``running`` uses the mean and
    standard deviation of the rewards of earlier steps (with ``overlap: one_step`` without the step
    just before), ``group`` those of the prompt's rewards;
    ``{"minmax": [lo, hi]}`` maps this range onto [0, 1]; ``{"tanh": scale}`` is
    ``tanh(reward / scale)``."""

    url: RewardURL | None = None
    """http: the reward service, called from the worker; the alternative is ``endpoint``."""
    endpoint: Annotated[str, Field(pattern=ENDPOINT_ID)] | None = None
    """http: a registered reward endpoint (``rwe_…``) with its own URL and secrets."""
    protocol: ProtocolName = "dar.reward.v1"
    """http: the form of requests and answers."""
    template: FreeValue = None
    """http, protocol ``plain``: body of a request; ``{{name}}`` in a string is replaced by a value
    of the sample."""
    pointer: Annotated[str, Field(pattern=r"^(/[^/]*)*$", max_length=256)] | None = None
    """http, protocol ``plain``: JSON pointer to the reward in an answer, like ``/data/0/score``.
    In a name, ``~1`` is a slash and ``~0`` a tilde."""
    grader: FreeObject | None = None
    """http, protocol ``openai_grader``: sent as ``grader``."""
    coerce: bool = False
    """http: whether rewards that are numeric strings or booleans are read as numbers."""
    prompt_format: Literal["auto", "text"] = "auto"
    """http: ``auto`` sends conversations as ``messages``; ``text`` sends every prompt as the text
    that the policy saw."""
    strip_thinking: bool = False
    """http, builtin: whether completions are scored without their ``<think>…</think>`` blocks; an
    unclosed block extends to the end."""
    batch: RewardBatching = RewardBatching()
    limits: RewardLimits = RewardLimits()
    timeouts: RewardTimeouts = RewardTimeouts()
    retry: RewardRetry = RewardRetry()
    cache: RewardCaching = RewardCaching()
    """http: whether rewards are cached."""
    reply: Literal["sync", "either"] = "sync"
    """http: how the service may answer; ``either`` also allows a 202, with the result sent later to
    a callback or fetched by polling."""
    require_signed_responses: bool = False
    """http: whether an answer must carry a signature of the endpoint's secret."""
    columns: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=64)]
        | None
    ) = None
    """http: columns of the training file that are sent along; null: only ``ground_truth``."""

    fn: Annotated[str, Field(pattern=COMPONENT_NAME)] | None = None
    """builtin: name of the function, as listed in docs/rewards-sources.md."""
    params: FreeObject = Field(default_factory=dict)
    """builtin: its parameters."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """hf_model: a sequence classifier with one label: a folder under the models directory, or a hub
    id."""

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
                "missing_field",
                "a component of kind {kind} needs {needed}",
                {"kind": self.kind, "needed": needed},
            )
        if self.url is not None and self.endpoint is not None:
            raise PydanticCustomError("exclusive_fields", "send url or endpoint, not both")
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
                        "{name} belongs to protocol {protocol}, but this component uses {own}; leave it out",
                        {"name": name, "protocol": protocol, "own": self.protocol},
                    )
                # A registered endpoint may bring them.
                if not is_given and protocol == self.protocol and self.endpoint is None:
                    raise PydanticCustomError(
                        "missing_field",
                        "protocol {protocol} needs {name}",
                        {"protocol": protocol, "name": name},
                    )
        if self.protocol != "dar.reward.v1" and self.reply != "sync":
            raise PydanticCustomError(
                "sync_protocol",
                "protocol {own} has no later answers; send reply sync",
                {"own": self.protocol},
            )


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
    """How the rewards of the components become one: their weighted sum."""

    _mode = _retired("mode", "weighted_sum")
    clip: Bounds | None = None
    """Bounds that the sum is clipped to."""
    on_partial_skip: Literal["drop_group", "zero"] = "drop_group"
    """What happens when a component skips some, but not all, of a prompt's completions that other
    components score. ``drop_group`` leaves out all completions of the prompt, or only the component
    if it is not required, because sums over different components cannot be compared. ``zero``
    adds 0 for the skipped ones, with a warning and a metric. A completion that all components
    skip is left out alone."""
    tie_eps: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """As ``hyperparameters.tie_tolerance``; the larger of the two is used."""


class FailurePolicy(Input):
    """How samples without a reward are handled.

    Only ``fallback_value`` makes a failure a number.
    """

    on_error: OnError = "drop_sample"
    """What happens to a sample that could not be scored: it is dropped, its whole group is dropped,
    the job fails, or it gets this reward (``{"fallback_value": 0.0}``), with a warning and a metric
    each time."""
    min_valid: Annotated[int, Field(ge=1, le=1024)] = 2
    """A group with fewer scored samples is dropped."""
    refill: Annotated[float, Field(ge=1, le=4)] = 1.0
    """Most groups sampled for a step, as a multiple of the batch size. The prompts of dropped
    groups are sampled again, once per step; no other prompts are drawn. With 1.5, at most half a
    batch of prompts is sampled again; with 1, none."""
    max_failed_fraction: Annotated[float, Field(gt=0, le=1)] = 0.05
    """The job pauses if a larger share of the samples of the last ``window_groups`` groups
    failed."""
    window_groups: Annotated[int, Field(ge=1, le=100_000)] = 200
    """Number of groups over which ``max_failed_fraction`` is computed."""
    max_empty_steps: Annotated[int, Field(ge=1, le=1000)] = 3
    """The job pauses after this many steps in a row without a usable group."""
    on_budget: Literal["pause", "fail"] = "pause"
    """What happens when ``max_failed_fraction`` is exceeded or ``max_empty_steps`` is reached:
    ``pause`` or ``fail``."""


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
