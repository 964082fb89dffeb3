"""One request through a job's own client, recorded; every check of a reward service is built on it.

A job's client hides what a check has to find: it waits, retries, opens a breaker and stops after a
rejection. So `ProbeClient` uses the part of the client that makes one request, below batching, with
a breaker that never opens. Egress policy, limits, signatures and decoding are those of a job.
"""

import asyncio
import secrets
import ssl
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Self

import httpcore2

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_probe import ProbeExchange, ProbeMessage
from dar.protocol.reward_spec import RewardComponent, RewardRetry
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import (
    Failed,
    RequestBatch,
    RewardContext,
    RewardResult,
    RewardSample,
    strip_thinking,
)
from dar.rewards.http.breaker import BreakerOptions, BreakerState, CircuitBreaker
from dar.rewards.http.connection import Timings
from dar.rewards.http.egress import EgressPolicy, Resolver
from dar.rewards.http.endpoint import Endpoint, EndpointConfig
from dar.rewards.http.redaction import REDACTED
from dar.rewards.http.request import RetryingRequest
from dar.rewards.http.responses import Answer, Incoming, start_of
from dar.rewards.http.retry import AttemptFailedError
from dar.rewards.http.signing import signed_headers
from dar.rewards.http.wire import batches, encode_sample
from dar.rewards.http_reward import HttpReward, http_options
from dar.rewards.probe.callbacks import AcceptanceInbox, ProbeInbox

SHOWN = 4096
"""Characters of a body that are shown."""
CONTEXT = RewardContext(step=1, mode="validate")
ONCE = RewardRetry(attempts=1)
_TWICE = RewardRetry(attempts=2, base=0.001, cap=0.001)
_NEVER = BreakerOptions(min_calls=1_000_000)
_EPOCH = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True)
class ProbeTarget:
    """The reward service of a component, and how it is reached."""

    component: RewardComponent
    url: str
    secrets: Sequence[str] = field(default=(), repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    guard: EgressPolicy | None = None
    inbox: ProbeInbox | None = None
    """Takes callbacks; None: no callback is offered."""
    example: RewardSample | None = None
    """Gives prompt and columns to the built-in completions; None: a built-in prompt, no columns."""
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    """Trusted authorities; None: those of the system."""
    resolver: Resolver | None = None
    """Replaces the system's name resolution."""


@dataclass(slots=True)
class WireRecord:
    """What one request sent and received."""

    is_forged: bool = False
    """Signed with random secrets."""
    loses_first: bool = False
    """The first answer is dropped, so that the same request is sent again."""
    lost: Answer | None = None
    sent: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    answer: Answer | None = None
    page: bytes = b""
    """Start of an answer that is not JSON."""
    page_headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0


_WIRE: ContextVar[WireRecord | None] = ContextVar("wire", default=None)


@dataclass(frozen=True, slots=True)
class ProbeCall:
    """A finished request."""

    samples: tuple[RewardSample, ...]
    results: tuple[RewardResult, ...]
    """One for each sample; empty if the client stopped waiting after a 202."""
    failure: AttemptFailedError | None
    seconds: float
    """Time until the answer, or until the result that followed a 202."""
    wire: WireRecord

    @property
    def code(self) -> str:
        """``ok``, or the code of the failure."""
        return "ok" if self.failure is None else self.failure.code

    @property
    def is_accepted(self) -> bool:
        """Whether the answer was a 202."""
        return self.wire.answer is not None and self.wire.answer.status == 202

    @property
    def is_refused(self) -> bool:
        """Whether the URL, the credentials or the service must change before a retry can help."""
        return self.failure is not None and self.failure.kind in {"permanent", "name"}


class _NeverOpens(CircuitBreaker):
    def trip(self, error: RewardMisconfiguredError) -> None:
        """Ignored: a refusal must not end the requests that follow."""


class _RecordingEndpoint(Endpoint):
    """Records requests and answers; can forge a signature or drop an answer."""

    def __init__(self, connection: EndpointConfig, keys: int) -> None:
        super().__init__(connection, {})
        self.breaker = _NeverOpens(_NEVER, _ignore)
        self.retry_after_seconds = 0.0
        self._random_keys = [secrets.token_bytes(32) for _ in range(keys)]

    def hold_back(self, seconds: float) -> None:
        """Record a ``Retry-After``; it does not delay the requests that measure the limit."""
        self.retry_after_seconds = max(self.retry_after_seconds, seconds)

    async def post(
        self,
        body: bytes,
        headers: Callable[[], Mapping[str, str]],
        timeouts: Mapping[str, float],
        timings: Timings | None = None,
    ) -> Answer:
        """See the base class."""
        wire = _WIRE.get()
        assert wire is not None

        def recorded() -> Mapping[str, str]:
            sent = dict(headers())
            if wire.is_forged:
                stamp = int(sent["webhook-timestamp"])
                sent |= signed_headers(self._random_keys, sent["webhook-id"], stamp, body)
            wire.sent, wire.body = sent, body
            return sent

        started = time.monotonic()
        try:
            answer = await super().post(body, recorded, timeouts, timings)
        finally:
            wire.seconds = time.monotonic() - started
        if wire.loses_first and wire.lost is None and answer.status == 200:
            wire.lost = answer
            raise AttemptFailedError("transient", "lost", "the answer was dropped on purpose")
        wire.answer = answer
        return answer

    async def _read(self, response: httpcore2.Response) -> Answer:
        wire = _WIRE.get()
        incoming = Incoming(response)
        if wire is not None:
            wire.page_headers = incoming.headers
        media_type = incoming.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_page = incoming.status == 200 and not media_type.endswith("json")
        if wire is not None and is_page and incoming.encoding == "identity":
            wire.page = await start_of(incoming)
        return await super()._read(response)


def _ignore(state: BreakerState, reason: str) -> None:
    del state, reason


class ProbeClient(HttpReward):
    """A component's client that sends single requests. Use as an async context manager.

    Raises:
        RewardMisconfiguredError: The URL cannot be used.
        ConfigurationError: A secret or a header cannot be used.
    """

    def __init__(self, target: ProbeTarget) -> None:
        access = ComponentAccess(
            url=target.url, secrets=list(target.secrets), headers=dict(target.headers)
        )
        # Not shared: the state that a job keeps of the service must not replace a request here.
        options = http_options(target.component, access, guard=target.guard, is_shared=False)
        super().__init__(
            target.component.name,
            target.url,
            secrets=access.secrets,
            options=replace(options, tls=target.tls, resolver=target.resolver),
            inbox=target.inbox,
        )

    async def __aenter__(self) -> Self:
        self._recording = _RecordingEndpoint(self._endpoint_config(), len(self._keys)).acquire()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._recording.release()

    @property
    def label(self) -> str:
        """The service in messages; its URL has no query."""
        return self._label

    @property
    def is_signed(self) -> bool:
        """Whether requests are signed."""
        return bool(self._keys)

    @property
    def max_samples(self) -> int:
        """Most samples in one request."""
        return self._max_samples

    @property
    def retry_after_seconds(self) -> float:
        """The longest ``Retry-After`` so far."""
        return self._recording.retry_after_seconds

    def redact(self, text: str) -> str:
        """``text`` without secrets."""
        return self._recording.redact(text)

    def split(self, samples: Sequence[RewardSample]) -> Iterator[tuple[RewardSample, ...]]:
        """The samples in as few requests as the limits on count and bytes allow."""
        encoded = [encode_sample(sample, self._options.columns, 0) for sample in samples]
        limits = {"max_samples": self._max_samples, "max_bytes": self._max_bytes}
        for batch in batches(encoded, **limits):
            yield tuple(sample.sample for sample in batch)

    async def send(
        self,
        samples: Sequence[RewardSample],
        *,
        context: RewardContext = CONTEXT,
        retry: RewardRetry = ONCE,
        is_forged: bool = False,
        loses_first: bool = False,
        stops_at_202: bool = False,
    ) -> ProbeCall:
        """Send one request with all of ``samples`` and wait for its rewards.

        Args:
            samples: At most `max_samples`.
            context: Step, mode and job that the request names.
            retry: Attempts at the request.
            is_forged: Sign it with random secrets.
            loses_first: Drop the first answer, so that the same bytes are sent again under the
                same id, as a job's client does.
            stops_at_202: Return when the service accepts the request, without its result.
        """
        wire = WireRecord(is_forged, loses_first)
        if self._options.strip_thinking:
            samples = list(map(strip_thinking, samples))
        encoded = [encode_sample(sample, self._options.columns, 0) for sample in samples]
        acceptance = AcceptanceInbox(self.inbox) if stops_at_202 and self.inbox else None
        sender = replace(
            self._sender(self._recording),
            options=replace(self._options, retry=_TWICE if loses_first else retry),
            inbox=acceptance or self.inbox,
        )
        slot = self._recording.slot()
        await slot.acquire()
        started = time.monotonic()
        delivery = RetryingRequest(sender, context, started, slot)
        token = _WIRE.set(wire)
        failure: AttemptFailedError | None = None
        results: tuple[RewardResult, ...]
        try:
            scoring = delivery.results(encoded)
            found = await (scoring if acceptance is None else _until_accepted(scoring, acceptance))
            results = tuple(found[sample.id] for sample in samples if found)
        except AttemptFailedError as error:
            failure, results = error, (delivery.failed(error),) * len(samples)
        except RewardMisconfiguredError as error:
            failure = AttemptFailedError("permanent", error.error_code, error.message)
            failed = Failed(error.error_code, error.message, is_transient=False)
            results = (failed,) * len(samples)
        finally:
            _WIRE.reset(token)
            slot.release()
        is_answered = wire.answer is not None and wire.answer.status == 200
        seconds = wire.seconds if is_answered else time.monotonic() - started
        return ProbeCall(tuple(samples), results, failure, seconds, wire)

    def lost_results(self, call: ProbeCall) -> list[RewardResult]:
        """The results in the answer that was dropped.

        Raises:
            RewardContractError: The answer breaks the contract.
        """
        assert call.wire.lost is not None
        batch = RequestBatch(
            request_id=call.wire.sent["webhook-id"],
            component=self.name,
            context=CONTEXT,
            samples=call.samples,
            columns=self._options.columns,
            created_at=_EPOCH,
            deadline=_EPOCH,
        )
        return self._protocol.decode(call.wire.lost.body, batch)

    def exchange(self, step: int, call: ProbeCall) -> ProbeExchange:
        """Request and answer, without secrets."""
        wire = call.wire
        hidden = dict.fromkeys(self._options.headers, REDACTED)
        headers = {**{name.lower(): text for name, text in hidden.items()}, **wire.sent}
        request = ProbeMessage(
            headers=self._shown_headers(headers), body=self._shown(wire.body), bytes=len(wire.body)
        )
        return ProbeExchange(step=step, request=request, response=self._response(call))

    def _response(self, call: ProbeCall) -> ProbeMessage | None:
        answer, failure = call.wire.answer, call.failure
        if answer is not None:
            return ProbeMessage(
                status=answer.status,
                headers=self._shown_headers(answer.headers),
                body=self._shown(answer.body),
                bytes=len(answer.body),
            )
        if failure is None or failure.status is None:
            return None
        body = self._shown(call.wire.page) or self.redact(failure.quote)
        headers = self._shown_headers(call.wire.page_headers)
        return ProbeMessage(status=failure.status, headers=headers, body=body)

    def _shown(self, body: bytes) -> str:
        # Redacted before it is cut: half a secret would not be recognized.
        return self.redact(body[: 4 * SHOWN].decode("utf-8", "replace"))[:SHOWN]

    def _shown_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        shown = list(headers.items())[:64]
        return {self.redact(name)[:64]: self.redact(value)[:512] for name, value in shown}


async def _until_accepted(
    scoring: Coroutine[Any, Any, dict[str, RewardResult]], inbox: AcceptanceInbox
) -> dict[str, RewardResult]:
    """The results; none if a 202 came first, whose result is then closed."""
    results = asyncio.create_task(scoring)
    accepted = asyncio.create_task(inbox.is_accepted.wait())
    try:
        await asyncio.wait({results, accepted}, return_when=asyncio.FIRST_COMPLETED)
        return results.result() if results.done() else {}
    finally:
        results.cancel()
        accepted.cancel()
        await asyncio.gather(results, accepted, return_exceptions=True)
        inbox.close_all()
