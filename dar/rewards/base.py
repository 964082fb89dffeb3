"""The interface of all reward sources: each sample gets a reward, a skip or an error.

A missing reward is a value of its own. No failure becomes a number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, Protocol

from dar.protocol.samples import FinishReason, RewardStatus

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RewardSample:
    """A completion to score. Exactly one of ``prompt`` and ``messages`` is given."""

    id: str
    """Unique within the step."""
    group_id: str
    """Shared by the completions of one prompt."""
    index: int
    """Index of the completion in its group, from 0."""
    prompt: str | None
    messages: Sequence[Message] | None
    completion: str
    """Text without special tokens."""
    finish_reason: FinishReason
    completion_tokens: int
    completion_ids: Sequence[int] | None = None
    """Token ids; None: unknown, as in a reward service."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the prompt's row."""
    prompt_text: str | None = None
    """The text that the policy saw, for a conversation; None: unknown."""


@dataclass(frozen=True, slots=True)
class RewardContext:
    """What the samples of one call have in common."""

    step: int
    """Optimizer step that the samples are for, from 1; in an evaluation the number of steps done
    before it, from 0."""
    mode: Literal["train", "eval", "validate"] = "train"
    job_id: str | None = None
    staleness: int = 0
    """Optimizer steps between the policy that sampled and the one trained on the samples."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps that the policy had done when it sampled."""
        return (self.step if self.mode == "eval" else self.step - 1) - self.staleness


@dataclass(frozen=True, slots=True)
class RequestBatch:
    """The content of one request, independent of the protocol."""

    request_id: str
    component: str
    context: RewardContext
    samples: tuple[RewardSample, ...]
    columns: Sequence[str] | None
    """Columns of the rows that are sent besides ``ground_truth``; None: no others."""
    created_at: datetime
    deadline: datetime
    encoded: Sequence[bytes] = ()
    """The samples as JSON of ``dar.reward.v1``, if they are already encoded."""
    reply: Mapping[str, Any] | None = None
    """How the service may answer; None: with a 200 until ``deadline``."""


class RewardProtocol(Protocol):
    """Encodes requests to a reward service and decodes its answers."""

    @property
    def name(self) -> str:
        """Name in a job spec."""
        ...

    @property
    def max_samples(self) -> int | None:
        """Most samples in one request; None: no limit of the protocol."""
        ...

    def encode(self, batch: RequestBatch) -> bytes:
        """The body of a request.

        Raises:
            RewardMisconfiguredError: This protocol cannot express the samples.
        """
        ...

    def decode(self, body: bytes, batch: RequestBatch) -> "list[RewardResult]":
        """The results in an answer: one for each sample, in order.

        Raises:
            RewardContractError: The answer breaks the protocol; no part of it is used.
        """
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """The source returned a finite number."""

    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    """Parts of the reward that the source reported; for viewing only."""
    feedback: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """The source reports that its reward does not apply to the sample."""

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
        """Component name, unique in a job."""
        ...

    async def score(
        self, samples: Sequence[RewardSample], context: RewardContext
    ) -> list[RewardResult]:
        """Score ``samples``: one result each, in order.

        Raises:
            RewardMisconfiguredError: No call can succeed until the configuration changes.
        """
        ...

    async def aclose(self) -> None:
        """Close connections. The source is not used afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class SampleReward:
    """A sample's total over all components."""

    reward: float | None
    """None: missing."""
    status: RewardStatus
    """Outcome of the sources. It stays ``error`` where a fallback value replaces the reward."""
    message: str | None
    components: Mapping[str, float | None]
    """Raw reward of each component, None where it is missing; a part is ``<component>/<part>``."""
    feedback: Mapping[str, str] = field(default_factory=dict)
    """Feedback of the sources, by component; for viewing only."""
    is_fallback: bool = False
    """Whether ``reward`` is the job's ``fallback_value`` because the sample could not be scored."""
    zeroed: Sequence[str] = ()
    """Components that skipped the sample and add 0 to its sum (``on_partial_skip: zero``)."""
    left_out: Sequence[str] = ()
    """Components that failed for the sample and are missing from its sum: not required, or of
    weight 0."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A finished attempt at a request."""

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
    """HTTP status; None: no answer arrived."""
    seconds: float
    """Duration of the attempt, without the waits before it."""
    queued_seconds: float
    """Time from the request being ready to its first attempt: waits for concurrency, rate,
    ``Retry-After`` and breaker."""
    bytes_out: int
    bytes_in: int
    is_final: bool
    """Whether no further attempt follows."""
    quote: str = ""
    """First 512 characters of the answer, without secrets. For the owner of the job only."""
    dns_seconds: float | None = None
    """Time from the start until the addresses were known; None: no connection was opened."""
    connect_seconds: float | None = None
    """Time until the connection was open, TLS included."""
    first_byte_seconds: float | None = None
    """Time until the head of an answer arrived; None: none arrived."""
    in_flight_seconds: float | None = None
    """Time until a 202, after which the result is only waited for; None: no 202, the attempt was in
    flight to its end."""


class RewardObserver(Protocol):
    """Receives events of requests to reward services.

    Called from the event loop: it must not block.
    """

    def request_done(self, record: RequestRecord) -> None:
        """Report a finished attempt."""
        ...

    def not_sent(self, component: str, hits: int, copies: int) -> None:
        """Report samples that were not sent: ``hits`` were cached, ``copies`` equal a sent one."""
        ...

    def breaker_changed(self, component: str, state: str, reason: str) -> None:
        """Report a breaker's state: ``closed``, ``open``, ``half_open`` or ``misconfigured``."""
        ...

    def scored(self, step: int, rewards: Sequence[SampleReward]) -> None:
        """Report the rewards of a group of training samples, before the failure policy."""
        ...

    def poll_ended(self, component: str, request_id: str, code: str, reason: str) -> None:
        """Report that polling for a result has failed while its callback is still awaited."""
        ...

    def waiting(self, component: str, message: str) -> None:
        """Report that a request waits: for its next attempt, a ``Retry-After`` or the breaker."""
        ...


def trl_prompt(sample: RewardSample) -> str | list[dict[str, Any]] | None:
    """The prompt as TRL passes it to reward functions: text, or messages."""
    return sample.prompt if sample.messages is None else [dict(item) for item in sample.messages]


def trl_completion(sample: RewardSample) -> str | list[dict[str, Any]]:
    """The completion as TRL passes it to reward functions: text, or one message."""
    if sample.messages is None:
        return sample.completion
    return [{"role": "assistant", "content": sample.completion}]


OPENING, CLOSING = "<think>", "</think>"


def strip_thinking(sample: RewardSample) -> RewardSample:
    """``sample`` without its ``<think>…</think>`` blocks.

    White space after a block at the beginning is removed too. An unclosed block extends to the end.
    If the prompt ends with ``<think>``, as with many chat templates, or if a block is closed that
    was never opened, the completion starts inside a block. The token ids are removed, as they
    include the blocks; ``completion_tokens`` stays that of the whole completion.
    """
    prompt = sample.prompt_text or sample.prompt or ""
    completion = _without_blocks(sample.completion, is_inside=prompt.rstrip().endswith(OPENING))
    return replace(sample, completion=completion, completion_ids=None)


def _without_blocks(text: str, *, is_inside: bool) -> str:
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
