"""Reward endpoints: reward services, registered with their secrets; jobs name them ``rwe_…``."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dar.protocol.base import FreeObject, FreeValue, Input, Output, UnixSeconds
from dar.protocol.reward_probe import ProbeFinding
from dar.protocol.reward_spec import (
    FIELDS_OF_KIND,
    ProtocolName,
    RewardBatching,
    RewardCaching,
    RewardComponent,
    RewardLimits,
    RewardRetry,
    RewardTimeouts,
    RewardURL,
    check_pointer,
)
from dar.protocol.rewards import check_one_prompt

MAX_HEADERS = 16
MAX_NAME = 128
MAX_HEADER_CHARACTERS = 4096
OPTIONS = tuple(name for name in FIELDS_OF_KIND["http"] if name not in {"url", "endpoint"})
"""Fields of a component that an endpoint can provide."""
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}", re.ASCII)
_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?", re.ASCII)
_RESERVED = frozenset(
    {
        *("host", "transfer-encoding", "connection", "te", "trailer", "upgrade", "keep-alive"),
        *("expect", "accept", "accept-encoding", "idempotency-key", "traceparent"),
    }
)
_RESERVED_PREFIXES = ("content-", "webhook-", "x-dar-", "proxy-")


def _check_header_name(name: str) -> str:
    if not _TOKEN.fullmatch(name):
        raise PydanticCustomError(
            "header_name",
            "not a header name of RFC 9110: letters, digits and hyphens, at most 128 of them",
        )
    lowered = name.lower()
    if lowered in _RESERVED or lowered.startswith(_RESERVED_PREFIXES):
        raise PydanticCustomError(
            "reserved_header",
            "{name} is set by this service; send the secret in another header",
            {"name": lowered},
        )
    return lowered


def _check_header_value(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if len(text) > MAX_HEADER_CHARACTERS or not _VALUE.fullmatch(text):
        raise PydanticCustomError(
            "header_value",
            "must be 1 to {most} visible ASCII characters, with spaces only between them",
            {"most": MAX_HEADER_CHARACTERS},
        )
    return value


def _check_distinct(headers: object) -> object:
    """Refuse a name that is given twice: one of the two values would be lost."""
    names: dict[str, str] = {}
    for name in headers if isinstance(headers, Mapping) else ():
        known = names.setdefault(str(name).lower(), str(name))
        if known != name:
            raise PydanticCustomError(
                "duplicate_header",
                "{one} and {other} are the same header, as case does not count in names; send one",
                {"one": known[:MAX_NAME], "other": str(name)[:MAX_NAME]},
            )
    return headers


HeaderName = Annotated[str, AfterValidator(_check_header_name)]
HeaderValue = Annotated[SecretStr, AfterValidator(_check_header_value)]
Pointer = Annotated[str, AfterValidator(check_pointer)]
Name = Annotated[str, Field(min_length=1, max_length=64)]


class EndpointOptions(Input):
    """How a reward service is called; a component of a job has the same fields."""

    protocol: ProtocolName = "dar.reward.v1"
    """Format of requests and answers."""
    template: FreeValue = None
    """Protocol ``plain``: the body of a request."""
    pointer: str | None = None
    """Protocol ``plain``: JSON pointer to the reward in an answer."""
    grader: FreeObject | None = None
    """Protocol ``openai_grader``: sent as ``grader``."""
    coerce: bool = False
    """Whether numeric strings and booleans are accepted as rewards."""
    prompt_format: Literal["auto", "text"] = "auto"
    """``auto`` sends conversations as ``messages``; ``text`` sends every prompt as text."""
    batch: RewardBatching = RewardBatching()
    limits: RewardLimits = RewardLimits()
    timeouts: RewardTimeouts = RewardTimeouts()
    retry: RewardRetry = RewardRetry()
    cache: RewardCaching = RewardCaching()
    reply: Literal["sync", "either"] = "sync"
    """How the service may answer; ``either`` also allows a 202 with a later result."""
    require_signed_responses: bool = False
    """Whether answers must be signed with the endpoint's secret."""
    columns: list[str] | None = None
    """Columns of the training file that are sent; null: only ``ground_truth``."""


class CreateRewardEndpoint(EndpointOptions):
    """Body of ``POST /v1/reward_endpoints``. Its fields are defaults of components."""

    name: Name
    """Shown to people; need not be unique."""
    url: RewardURL
    """Where requests are posted."""
    pointer: Pointer | None = None
    """Protocol ``plain``: JSON pointer to the reward in an answer."""
    headers: Annotated[dict[HeaderName, HeaderValue], BeforeValidator(_check_distinct)] = Field(
        default_factory=dict, max_length=MAX_HEADERS
    )
    """Secret headers, like ``{"authorization": "Bearer …"}``; write-only, and sent only to this
    URL's origin."""
    signing_secret: SecretStr | None = None
    """Signs requests (``whsec_…``); null: a new one is made."""

    @model_validator(mode="after")
    def _usable(self) -> "CreateRewardEndpoint":
        check_options(self.model_dump(include=set(OPTIONS), exclude_unset=True))
        return self


class UpdateRewardEndpoint(Input):
    """Body of ``PATCH /v1/reward_endpoints/{id}``; the sent fields replace the old ones."""

    name: Name | None = None
    url: RewardURL | None = None
    """A new origin (scheme, host or port) drops all secret headers that are not sent again."""
    headers: Annotated[dict[HeaderName, HeaderValue | None], BeforeValidator(_check_distinct)] = (
        Field(default_factory=dict, max_length=MAX_HEADERS)
    )
    """Headers by name; null removes one, others stay."""
    protocol: ProtocolName | None = None
    template: FreeValue = None
    pointer: Pointer | None = None
    grader: FreeObject | None = None
    coerce: bool | None = None
    prompt_format: Literal["auto", "text"] | None = None
    batch: RewardBatching | None = None
    limits: RewardLimits | None = None
    timeouts: RewardTimeouts | None = None
    retry: RewardRetry | None = None
    cache: RewardCaching | None = None
    reply: Literal["sync", "either"] | None = None
    require_signed_responses: bool | None = None
    columns: list[str] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The sent fields of the endpoint; null resets a field to its default."""
        return self.model_dump(mode="json", include=set(OPTIONS), exclude_unset=True)


class RotateSecret(Input):
    """Body of ``POST /v1/reward_endpoints/{id}/rotate_secret``; may be empty."""

    keep_old_secret_active_for_24_hours: bool = True
    """Whether both secrets sign requests for a day, until the reward service has the new one."""


class RewardSecret(Output):
    """A secret of an endpoint, without its value."""

    kind: Literal["signing", "header"]
    name: str | None
    """Name of the header."""
    fingerprint: str
    """Equal for equal values at this endpoint."""
    created_at: UnixSeconds
    expires_at: UnixSeconds | None
    """When a replaced signing secret stops signing."""


class RewardEndpoint(Output):
    """A registered reward service."""

    id: str
    object: Literal["reward_endpoint"]
    created_at: UnixSeconds
    updated_at: UnixSeconds
    name: str
    url: str
    protocol: str
    template: Any
    pointer: str | None
    grader: dict[str, Any] | None
    coerce: bool
    prompt_format: str
    batch: RewardBatching
    limits: RewardLimits
    timeouts: RewardTimeouts
    retry: RewardRetry
    cache: RewardCaching
    reply: str
    require_signed_responses: bool
    columns: list[str] | None
    revision: int
    """Counts changes other than of the name, and purges of cached rewards."""
    state: Literal["ok", "misconfigured"]
    """``misconfigured``: the service last rejected a request or probe, and only a change can help.
    A change, a passing probe or a reward sets it back to ``ok``."""
    secrets: list[RewardSecret]


class NewRewardEndpoint(RewardEndpoint):
    """An endpoint with its new signing secret, which no other answer contains."""

    signing_secret: str = Field(repr=False)


class ChangedRewardEndpoint(RewardEndpoint):
    """An endpoint after a change."""

    dropped_headers: list[str]
    """Secret headers that were dropped because the URL's origin changed; send them again."""


class LastProbe(Output):
    """The latest probe of an endpoint."""

    at: UnixSeconds
    ok: bool
    errors: list[ProbeFinding]
    warnings: list[ProbeFinding]
    latency_ms: dict[str, float | None]
    determinism: dict[str, float | None]
    """Largest differences between rewards of equal samples; empty: not measured."""
    revision: int
    """The probed revision of the endpoint."""


class RewardEndpointStats(Output):
    """Jobs and latest probe of an endpoint."""

    id: str
    object: Literal["reward_endpoint.stats"]
    state: Literal["ok", "misconfigured"]
    jobs: dict[str, int]
    """Number of jobs that name it, by status."""
    steps: int
    """Optimizer steps of those jobs."""
    last_job_id: str | None
    last_probe: LastProbe | None


class ProbeSample(Input):
    """A completion for a probe. Exactly one of ``prompt`` and ``messages`` is given."""

    prompt: str | None = None
    messages: Annotated[list[FreeObject], Field(min_length=1)] | None = None
    completion: str
    ground_truth: FreeValue = None
    columns: FreeObject = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_prompt(self) -> "ProbeSample":
        check_one_prompt(self.prompt, self.messages)
        return self


ProbeSamples = Annotated[list[ProbeSample], Field(min_length=2, max_length=8)]


class ProbeEndpoint(Input):
    """Body of ``POST /v1/reward_endpoints/{id}/probe``; may be empty."""

    samples: ProbeSamples | None = None
    """Two to eight completions; null: built-in ones."""
    light: bool = False
    """Take only steps 1 to 4, as a submission does."""


class ProbeInline(ProbeEndpoint):
    """Body of ``POST /v1/reward_endpoints/probe``."""

    component: RewardComponent
    """An ``http`` component, as in a job."""


def check_options(options: Mapping[str, Any]) -> None:
    """Check that a component of a job may have these fields.

    Raises:
        PydanticCustomError: The first error.
    """
    try:
        RewardComponent.model_validate({"name": "endpoint", "url": "https://host", **options})
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in found["loc"])
        raise PydanticCustomError(
            "endpoint_options",
            "{what}",
            {"what": f"{where}: {found['msg']}" if where else found["msg"]},
        ) from None


def merged(component: RewardComponent, options: Mapping[str, Any]) -> RewardComponent:
    """Fill in the fields that a component leaves out from its endpoint.

    Args:
        component: The component as it was sent.
        options: The endpoint's fields (`EndpointOptions`) as JSON.

    Raises:
        ValidationError: The fields do not fit together.
    """
    own = component.model_dump(mode="json", exclude_unset=True)
    both = {**options, **own}
    for name, value in own.items():
        default = options.get(name)
        if name in {"batch", "limits", "timeouts", "retry", "cache"} and isinstance(
            default, Mapping
        ):
            both[name] = {**default, **value}
    # Validated without the endpoint: everything that it may provide must be here now.
    RewardComponent.model_validate({**both, "endpoint": None, "url": "https://host"})
    return RewardComponent.model_validate(both)
