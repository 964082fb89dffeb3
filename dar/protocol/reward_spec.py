"""The ``rewards`` of a job spec: which sources score a job's completions, and how they are called."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator
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
