"""How a probe asks: through a job's own client, once and without retries, with what went over the wire kept for the report.

A job's client hides what a probe is to find: it waits, repeats, leaves a failing service alone and believes a refusal. So the part of
it that makes one request (`RetryingRequest`) is used here below batching, with a breaker that never opens; guard, limits, signatures and
decoding are a job's.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import httpcore2

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_probe import ProbeExchange, ProbeMessage
from dar.protocol.reward_spec import RewardRetry
from dar.rewards.base import RequestBatch, RewardContext, RewardResult, RewardSample, strip_thinking
from dar.rewards.http.breaker import BreakerOptions, BreakerState, CircuitBreaker
from dar.rewards.http.connection import Timings
from dar.rewards.http.endpoint import Endpoint, EndpointConfig
from dar.rewards.http.redaction import REDACTED
from dar.rewards.http.request import RetryingRequest
from dar.rewards.http.responses import READ_BYTES, Answer, Incoming
from dar.rewards.http.retry import AttemptFailedError
from dar.rewards.http.signing import signed_headers
from dar.rewards.http.wire import batches, encode_sample
from dar.rewards.http_reward import HttpReward

SHOWN = 4096
"""Characters of a body that are shown."""
QUOTE_SECONDS = 2.0
"""How long the start of an answer that is no JSON is waited for."""
CONTEXT = RewardContext(step=1, mode="validate")
_ONCE = RewardRetry(attempts=1)
_TWICE = RewardRetry(attempts=2, base=0.001, cap=0.001)
_NEVER = BreakerOptions(min_calls=1_000_000)
_EPOCH = datetime.fromtimestamp(0, UTC)


@dataclass(slots=True)
class Wire:
    """What one request was on the wire."""

    is_forged: bool = False
    """It is signed with a secret that nobody has."""
    loses_first: bool = False
    """Its first answer is to be lost, so that it is sent again as it is."""
    lost: Answer | None = None
    sent: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    answer: Answer | None = None
    page: bytes = b""
    """Start of an answer that is no JSON."""
    page_headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    posts: int = 0


_WIRE: ContextVar[Wire | None] = ContextVar("wire", default=None)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for the rewards of some samples, as it ended."""

    samples: tuple[RewardSample, ...]
    results: tuple[RewardResult, ...]
    """One for each sample; empty where the request failed."""
    failure: AttemptFailedError | None
    seconds: float
    """From its sending to its answer, or to the result that followed."""
    wire: Wire

    @property
    def code(self) -> str:
        """``ok``, or the failure's code."""
        return "ok" if self.failure is None else self.failure.code

    @property
    def is_later(self) -> bool:
        """Whether it was answered with 202."""
        return self.wire.answer is not None and self.wire.answer.status == 202


class _NeverOpens(CircuitBreaker):
    """Every request of a probe stands for itself."""

    def trip(self, error: RewardMisconfiguredError) -> None:
        """Nothing: the next step asks again."""


class _Tapped(Endpoint):
    """An endpoint that notes what goes over the wire, and can forge a signature or lose an answer."""

    def __init__(self, connection: EndpointConfig, keys: int) -> None:
        super().__init__(connection, {})
        self.breaker = _NeverOpens(_NEVER, _ignore)
        self.wished_pause = 0.0
        self._strangers = [secrets.token_bytes(32) for _ in range(keys)]

    def hold_back(self, seconds: float) -> None:
        """Note a ``Retry-After``; requests that are there to find such limits are not held back by one."""
        self.wished_pause = max(self.wished_pause, seconds)

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

        def noted() -> Mapping[str, str]:
            sent = dict(headers())
            if wire.is_forged:
                stamp = int(sent["webhook-timestamp"])
                sent |= signed_headers(self._strangers, sent["webhook-id"], stamp, body)
            wire.sent, wire.body = sent, body
            return sent

        wire.posts += 1
        started = time.monotonic()
        try:
            answer = await super().post(body, noted, timeouts, timings)
        finally:
            wire.seconds = time.monotonic() - started
        if wire.loses_first and wire.lost is None and answer.status == 200:
            wire.lost = answer
            raise AttemptFailedError("transient", "lost", "the answer was lost on purpose")
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
            wire.page = await _start_of(incoming)
        return await super()._read(response)


def _ignore(state: BreakerState, reason: str) -> None:
    del state, reason


async def _start_of(incoming: Incoming) -> bytes:
    start = bytearray()
    with suppress(
        TimeoutError, httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.ReadTimeout
    ):
        async with asyncio.timeout(QUOTE_SECONDS), incoming.chunks() as chunks:
            async for chunk in chunks:
                start += chunk
                if len(start) >= READ_BYTES:
                    break
    return bytes(start[:READ_BYTES])


class Line(HttpReward):
    """A component's client, as a probe uses it."""

    async def open(self) -> None:
        """Make what all requests share; in the event loop that makes them."""
        self._tapped = _Tapped(self._endpoint_config(), len(self._keys))
        self._tapped.acquire()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._tapped.release()

    @property
    def is_signed(self) -> bool:
        """Whether requests are signed."""
        return bool(self._keys)

    @property
    def max_samples(self) -> int:
        """Most samples of one request."""
        return self._max_samples

    @property
    def wished_pause(self) -> float:
        """The longest ``Retry-After`` so far, in seconds."""
        return self._tapped.wished_pause

    def redact(self, text: str) -> str:
        """``text`` without secrets."""
        return self._tapped.redact(text)

    def fitting(self, samples: Sequence[RewardSample]) -> tuple[RewardSample, ...]:
        """As many of the samples, from the first on, as one request may hold."""
        encoded = [encode_sample(sample, self._options.columns, 0) for sample in samples]
        limits = {"max_samples": self._max_samples, "max_bytes": self._max_bytes}
        first = next(batches(encoded, **limits))
        return tuple(sample.sample for sample in first)

    async def ask(
        self, samples: Sequence[RewardSample], *, is_forged: bool = False, loses_first: bool = False
    ) -> Asked:
        """Send one request with all of ``samples`` under a fresh id, and wait for its rewards.

        Args:
            samples: No more than `max_samples`.
            is_forged: Sign it with a secret that nobody has.
            loses_first: Treat its first answer as lost, so that a job's client sends it again: the same bytes under the same id.
        """
        wire = Wire(is_forged, loses_first)
        if self._options.strip_thinking:
            samples = list(map(strip_thinking, samples))
        encoded = [encode_sample(sample, self._options.columns, 0) for sample in samples]
        slot = self._tapped.slot()
        await slot.acquire()
        options = replace(self._options, retry=_TWICE if loses_first else _ONCE)
        sender = replace(self._sender(self._tapped), options=options)
        delivery = RetryingRequest(sender, CONTEXT, time.monotonic(), slot)
        token = _WIRE.set(wire)
        started = time.monotonic()
        failure: AttemptFailedError | None = None
        results: tuple[RewardResult, ...] = ()
        try:
            found = await delivery.results(encoded)
            results = tuple(found[sample.id] for sample in samples)
        except AttemptFailedError as error:
            failure = error
        except RewardMisconfiguredError as error:
            failure = AttemptFailedError("permanent", error.error_code, error.message)
        finally:
            _WIRE.reset(token)
            slot.release()
        is_answered = wire.answer is not None and wire.answer.status == 200
        seconds = wire.seconds if is_answered else time.monotonic() - started
        return Asked(tuple(samples), results, failure, seconds, wire)

    def lost_results(self, asked: Asked) -> list[RewardResult]:
        """The results in the answer that was lost.

        Raises:
            RewardContractError: It breaks the contract.
        """
        assert asked.wire.lost is not None
        batch = RequestBatch(
            request_id=asked.wire.sent["webhook-id"],
            component=self.name,
            context=CONTEXT,
            samples=asked.samples,
            columns=self._options.columns,
            created_at=_EPOCH,
            deadline=_EPOCH,
        )
        return self._protocol.decode(asked.wire.lost.body, batch)

    def exchange(self, step: int, asked: Asked) -> ProbeExchange:
        """What went over the wire, without secrets."""
        wire = asked.wire
        hidden = dict.fromkeys(self._options.headers, REDACTED)
        headers = {**{name.lower(): text for name, text in hidden.items()}, **wire.sent}
        request = ProbeMessage(
            headers=self._shown_headers(headers), body=self._shown(wire.body), bytes=len(wire.body)
        )
        return ProbeExchange(step=step, request=request, response=self._response(asked))

    def _response(self, asked: Asked) -> ProbeMessage | None:
        answer, failure = asked.wire.answer, asked.failure
        if answer is not None:
            return ProbeMessage(
                status=answer.status,
                headers=self._shown_headers(answer.headers),
                body=self._shown(answer.body),
                bytes=len(answer.body),
            )
        if failure is None or failure.status is None:
            return None
        body = self._shown(asked.wire.page) or self.redact(failure.quote)
        headers = self._shown_headers(asked.wire.page_headers)
        return ProbeMessage(status=failure.status, headers=headers, body=body)

    def _shown(self, body: bytes) -> str:
        # Redacted before it is cut to its length: half a secret is one as well.
        return self.redact(body[: 4 * SHOWN].decode("utf-8", "replace"))[:SHOWN]

    def _shown_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {name[:64]: self.redact(value)[:512] for name, value in list(headers.items())[:64]}
