"""The one interface of all reward sources: samples go in, and each comes out as a reward, a skip or an error.

A missing reward is a third value. Nothing here or above it turns a failure into a number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, Protocol

from dar.protocol.samples import FinishReason, RewardStatus

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RewardSample:
    """One completion to be scored. Exactly one of ``prompt`` and ``messages`` is given."""

    id: str
    """Unique within the step."""
    group_id: str
    """The same for the completions of one prompt."""
    index: int
    """Which completion of its group, from 0."""
    prompt: str | None
    messages: Sequence[Message] | None
    completion: str
    """The bare text, without special tokens."""
    finish_reason: FinishReason
    completion_tokens: int
    completion_ids: Sequence[int] | None = None
    """Its tokens; None: not known here, as behind a reward service."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the prompt's row."""
    prompt_text: str | None = None
    """Of a conversation: the text that the policy saw; None: not known here."""


@dataclass(frozen=True, slots=True)
class RewardContext:
    """What the samples of one call have in common."""

    step: int
    """Optimizer step that the samples are for, from 1; in an evaluation the steps done before it, from 0."""
    mode: Literal["train", "eval", "validate"] = "train"
    job_id: str | None = None
    staleness: int = 0
    """Optimizer steps between the policy that sampled and the one that is trained on the samples."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps that the policy had done when it sampled."""
        return (self.step if self.mode == "eval" else self.step - 1) - self.staleness


@dataclass(frozen=True, slots=True)
class RequestBatch:
    """What one request asks, in the words of no protocol yet."""

    request_id: str
    component: str
    context: RewardContext
    samples: tuple[RewardSample, ...]
    columns: Sequence[str] | None
    """Columns of the rows that are sent beside ``ground_truth``; None: no others."""
    created_at: datetime
    deadline: datetime
    encoded: Sequence[bytes] = ()
    """The samples as JSON of ``dar.reward.v1``, where they are encoded already."""
    reply: Mapping[str, Any] | None = None
    """How the service may answer; None: at once, until ``deadline``."""


class RewardProtocol(Protocol):
    """What is spoken with a reward service: from samples to the bytes of a request, and from an answer to results."""

    @property
    def name(self) -> str:
        """Its name in a job spec."""
        ...

    @property
    def max_samples(self) -> int | None:
        """Most samples in one request; None: the protocol has no bound of its own."""
        ...

    def encode(self, batch: RequestBatch) -> bytes:
        """The body of a request.

        Raises:
            RewardMisconfiguredError: The samples cannot be put into words of this protocol.
        """
        ...

    def decode(self, body: bytes, batch: RequestBatch) -> "list[RewardResult]":
        """The results in an answer: one for each sample, in their order.

        Raises:
            RewardContractError: The answer breaks the protocol; nothing of it is used.
        """
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """The source gave a finite number."""

    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    """Parts that the source reported beside the reward; for viewing only."""
    feedback: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """The source says that its reward does not apply to the sample."""

    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The source could not score the sample."""

    code: str
    """Kind of failure, like ``timeout``, ``http_503`` or ``contract.length``."""
    message: str
    is_transient: bool
    """Whether the same request may succeed later."""


RewardResult = Scored | Skipped | Failed


class RewardSource(Protocol):
    """Something that scores samples."""

    @property
    def name(self) -> str:
        """Component name; unique in a job."""
        ...

    async def score(
        self, samples: Sequence[RewardSample], context: RewardContext
    ) -> list[RewardResult]:
        """Score ``samples``: one result each, in order.

        Raises:
            RewardMisconfiguredError: The source refuses us for good, so no later call can succeed.
        """
        ...

    async def aclose(self) -> None:
        """Free connections; the source is not used afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class SampleReward:
    """A sample's total over all components."""

    reward: float | None
    """None: missing."""
    status: RewardStatus
    """What the sources said. It stays ``error`` where a fallback stands in for the reward."""
    message: str | None
    components: Mapping[str, float | None]
    """Raw reward of each component, None where it is missing; a part reported beside it is ``<component>/<part>``."""
    feedback: Mapping[str, str] = field(default_factory=dict)
    """What the sources said about the sample, by component; for viewing only."""
    is_fallback: bool = False
    """Whether ``reward`` is the job's ``fallback_value``, because the sample could not be scored."""
    zeroed: Sequence[str] = ()
    """Components that skipped the sample and count as 0 in its sum, because the job says ``on_partial_skip: zero``."""
    left_out: Sequence[str] = ()
    """Components that failed for the sample and that its sum goes without, as they are not required or only watched."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One attempt at a request, as it ended."""

    component: str
    request_id: str
    step: int
    mode: str
    attempt: int
    """Number of the attempt, from 1."""
    samples: int
    outcome: str
    """``ok``, or the failure's code, like ``timeout``, ``http_503`` or ``contract.length``."""
    status: int | None
    """Of the answer; None: none came."""
    seconds: float
    """From the attempt's start to its end; waits before it are not in it."""
    queued_seconds: float
    """From the request's readiness to its first attempt: what concurrency, rate, gate and breaker held it back."""
    bytes_out: int
    bytes_in: int
    is_final: bool
    """Whether no further attempt follows."""
    quote: str = ""
    """First characters of what the service said, without our secrets; at most 512. For the owner of the job only."""
    dns_seconds: float | None = None
    """From the attempt's start until its addresses were known; None: no connection was opened for it."""
    connect_seconds: float | None = None
    """Until the connection was open, TLS included."""
    first_byte_seconds: float | None = None
    """Until the head of an answer was there; None: none came."""
    in_flight_seconds: float | None = None
    """Until a 202, after which the result is only waited for; None: there was none, the attempt was in flight to its end."""


class RewardObserver(Protocol):
    """Is told what happens between us and reward services; called from the event loop, so it must not block."""

    def request_done(self, record: RequestRecord) -> None:
        """An attempt has ended."""
        ...

    def spared(self, component: str, hits: int, copies: int) -> None:
        """So many samples were not sent: ``hits`` were remembered, and ``copies`` were equal to one that was sent."""
        ...

    def breaker_changed(self, component: str, state: str, reason: str) -> None:
        """The circuit breaker of a component's endpoint is now ``closed``, ``open``, ``half_open`` or ``misconfigured``."""
        ...

    def waiting(self, component: str, message: str) -> None:
        """A request waits: for its next attempt, for a ``Retry-After``, or for the breaker."""
        ...


OPENING, CLOSING = "<think>", "</think>"


def strip_thinking(sample: RewardSample) -> RewardSample:
    """``sample`` without its thinking.

    Every block goes, and with the one at the beginning the white space behind it; a block that is not closed goes to the end. Where
    the prompt ends with ``<think>``, as many chat templates let it, the completion begins inside of a block; so it does where a block
    is closed that was never opened. The tokens go too, as they would still hold it; their number stays that of the whole
    completion.
    """
    told = sample.prompt_text or sample.prompt or ""
    completion = _without(sample.completion, is_inside=told.rstrip().endswith(OPENING))
    return replace(sample, completion=completion, completion_ids=None)


def _without(text: str, *, is_inside: bool) -> str:
    opening, closing = text.find(OPENING), text.find(CLOSING)
    is_inside = is_inside or (closing >= 0 and not 0 <= opening < closing)
    if is_inside:
        text = OPENING + text
    kept: list[str] = []
    rest, has_more = text, True
    while has_more:
        before, found, rest = rest.partition(OPENING)
        kept.append(before)
        _, closed, rest = rest.partition(CLOSING)
        has_more = bool(found and closed)
    has_begun = kept[0].strip()
    return "".join(kept) if has_begun or len(kept) == 1 else "".join(kept).lstrip()
