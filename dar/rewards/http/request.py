"""One request to a reward service: encode, sign, send, retry, decode."""

import asyncio
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from urllib.parse import urlsplit

from dar.errors import AuthenticationError, RewardContractError, RewardMisconfiguredError
from dar.protocol.reward_spec import RewardBatching, RewardLimits, RewardRetry, RewardTimeouts
from dar.protocol.rewards import MAX_REQUEST_BYTES
from dar.rewards.base import (
    Failed,
    RequestBatch,
    RequestRecord,
    RewardContext,
    RewardObserver,
    RewardProtocol,
    RewardResult,
    RewardSample,
)
from dar.rewards.http.async_results import Inbox, LaterReply, Polled
from dar.rewards.http.breaker import BreakerOptions, CallOutcome
from dar.rewards.http.connection import Timings
from dar.rewards.http.egress import EgressPolicy, Resolver
from dar.rewards.http.endpoint import ConcurrencySlot, Endpoint, Patience
from dar.rewards.http.log import log_attempt, trace_id
from dar.rewards.http.redaction import Redactor
from dar.rewards.http.responses import (
    Answer,
    as_result,
    decoded,
    own_faults,
    quotable,
    redacted,
    without_secrets,
)
from dar.rewards.http.retry import (
    AttemptFailedError,
    FailureKind,
    RetryBudgetOptions,
    RetrySchedule,
    parse_retry_after,
)
from dar.rewards.http.signing import signed_headers, verify
from dar.rewards.http.wire import EncodedSample, request_id_of
from dar.version import __version__


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How a reward service is called; the first fields are those of the job spec."""

    columns: Sequence[str] | None = None
    """Columns of the prompt's row that are sent besides ``ground_truth``; None: no others."""
    batch: RewardBatching = field(default_factory=RewardBatching)
    limits: RewardLimits = field(default_factory=RewardLimits)
    timeouts: RewardTimeouts = field(default_factory=RewardTimeouts)
    retry: RewardRetry = field(default_factory=RewardRetry)
    protocol: RewardProtocol | None = None
    """Encodes requests and decodes answers; None: ``dar.reward.v1``."""
    prompt_format: Literal["auto", "text"] = "auto"
    """``text`` sends a conversation as the text that the policy saw, if the sample holds it."""
    strip_thinking: bool = False
    """Whether completions are sent without their thinking; see
    `dar.rewards.base.strip_thinking`."""
    allow_async: bool = False
    """Whether the service may answer 202 and send the result later."""
    require_signed_responses: bool = False
    """Whether an answer must be signed with one of the secrets."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Secret headers."""
    guard: EgressPolicy | None = None
    """Where requests may go; None: anywhere, for scripts on a user's own machine."""
    breaker: BreakerOptions = field(default_factory=BreakerOptions)
    budget: RetryBudgetOptions = field(default_factory=RetryBudgetOptions)
    is_shared: bool = True
    """Whether connections, limits and breaker are shared with other sources of this process that
    name the same endpoint."""
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    """Trusted certificate authorities; None: the system's."""
    resolver: Resolver | None = None
    """Looks up host names; None: the system's resolver."""


REDACTED_IN_A_ROW = 8
"""Results without a turn of other requests between them."""
SECONDS_PER_MEGABYTE = 3.0
"""Extra time of an attempt for each MB of body above the first."""
_OUTCOMES: Mapping[FailureKind, CallOutcome] = {
    "transient": "failed",
    "contract": "failed",
    "name": "failed",
    "refused": "ok",
    "too_large": "neutral",
    "permanent": "neutral",
}
"""What the breaker counts for a failed attempt. A service that rejects these samples alone works;
a permanent failure is reported with `CircuitBreaker.trip` as well."""


@dataclass(frozen=True, slots=True)
class Sender:
    """Settings shared by all requests of one component."""

    name: str
    label: str
    url: str
    options: HttpOptions
    protocol: RewardProtocol
    keys: tuple[bytes, ...]
    endpoint: Endpoint
    observer: RewardObserver | None
    inbox: Inbox | None
    waits: Callable[[str], None]
    """Called with a message when a request waits."""


@dataclass(slots=True)
class _Attempt:
    """One attempt, for its record."""

    number: int
    started_at: float
    status: int | None = None
    bytes_in: int = 0
    in_flight_seconds: float | None = None
    timings: Timings = field(default_factory=Timings)


class RetryingRequest:
    """A request for some samples, with retries.

    Samples that the service marks as retryable are sent again in further requests.

    Args:
        sender: Settings of the component.
        context: Job, step and mode.
        ready_at: When the samples were ready, on the monotonic clock.
        slot: Its place among the requests in flight.
    """

    def __init__(
        self, sender: Sender, context: RewardContext, ready_at: float, slot: ConcurrencySlot
    ) -> None:
        self._slot = slot
        self._sender = sender
        self._options = sender.options
        self._endpoint = sender.endpoint
        self._context = context
        self._ready_at = ready_at
        self._queued_seconds = 0.0
        deadline, budget = sender.options.timeouts.deadline, sender.endpoint.budget
        self._schedule = RetrySchedule(sender.options.retry, deadline, self._waits, budget)
        grace = sender.options.breaker.pause_grace_seconds
        self._patience = Patience(grace, self._schedule, self._report_wait)
        self._batch: RequestBatch | None = None
        self._body = b""
        self._later: LaterReply | None = None
        self._token: Redactor | None = None
        self._request_id = ""
        self._count = 0
        self._current = _Attempt(0, ready_at)

    async def results(self, samples: Sequence[EncodedSample]) -> dict[str, RewardResult]:
        """The result of each sample, by id.

        Samples with a transient error of their own are sent again, in a new request, while attempts
        are left.

        Raises:
            AttemptFailedError: The first request failed, and no attempt is left.
            RewardMisconfiguredError: No request can succeed until the configuration changes.
        """
        found: dict[str, RewardResult] = {}
        waiting, number = list(samples), 0
        while waiting:
            try:
                results = await self._request(waiting, number)
            except AttemptFailedError as failure:
                if number == 0 or failure.kind in {"permanent", "name"}:
                    raise
                failed = self.failed(failure)
                found.update({sample.id: failed for sample in waiting})
                return found
            found.update(
                (sample.id, result) for sample, result in zip(waiting, results, strict=True)
            )
            waiting = [sample for sample in waiting if _may_be_repeated(found[sample.id])]
            number += 1
            pause = self._schedule.pause(number)
            if not waiting or not self._schedule.next_request(pause):
                return found
            self._report_wait(f"{len(waiting)} samples are sent again in {pause:.1f} s")
            await asyncio.sleep(pause)
        return found

    def failed(self, failure: AttemptFailedError) -> Failed:
        """The result of samples whose request failed."""
        message = f"{self._sender.label}: {failure.full_reason}"
        return Failed(failure.code, message, is_transient=failure.kind == "transient")

    async def _request(self, samples: list[EncodedSample], number: int) -> list[RewardResult]:
        """Send one request until it is answered or no attempt is left."""
        self._batch = None
        self._later = None
        self._body = b""
        self._count = len(samples)
        self._request_id = request_id_of(samples, self._sender.name, self._context, number=number)
        while True:
            try:
                return await self._attempt(samples)
            except AttemptFailedError as failure:
                without_secrets(failure, self._redact)
                after = self._capped(failure.retry_after_seconds)
                if failure.holds_back_all and after is not None:
                    self._endpoint.hold_back(after)
                wait = self._schedule.wait_after(failure)
                self._record_failure(failure, is_final=wait is None)
                if wait is None:
                    raise
            await asyncio.sleep(wait)

    def _capped(self, retry_after: float | None) -> float | None:
        """A ``Retry-After`` in seconds, up to the longest wait that a service can request."""
        return (
            None if retry_after is None else min(retry_after, self._options.retry.retry_after_cap)
        )

    def _waits(self, failure: AttemptFailedError, attempt: int, wait: float) -> None:
        attempts = self._options.retry.attempts
        self._report_wait(f"{failure.reason}; attempt {attempt} of {attempts} in {wait:.1f} s")

    async def _attempt(self, samples: list[EncodedSample]) -> list[RewardResult]:
        self._current = _Attempt(self._schedule.attempt, time.monotonic())
        await self._slot.acquire()
        if self._options.allow_async and self._later is None:
            await self._announce([sample.id for sample in samples])
        call = await self._endpoint.admit(self._patience)
        outcome: CallOutcome = "neutral"
        reason = ""
        try:
            self._current.started_at = time.monotonic()
            if self._batch is None:
                self._begin(samples)
            with own_faults(self._redact):
                answer = await self._send()
                results = await self._decoded(answer) if answer.status == 200 else None
            outcome = "neutral" if self._current.status is None else "ok"
        except AttemptFailedError as failure:
            without_secrets(failure, self._redact)
            outcome, reason = _OUTCOMES[failure.kind], failure.code
            if failure.kind == "permanent":
                message = f"{self._sender.label}: {failure.full_reason}"
                self._endpoint.breaker.trip(RewardMisconfiguredError(message, code=failure.code))
            raise
        finally:
            self._endpoint.breaker.done(call, outcome, reason)
        if results is None:
            self._slot.release()
            self._current.in_flight_seconds = time.monotonic() - self._current.started_at
            with own_faults(self._redact):
                results = await self._later_result()
        self._record("ok", is_final=True)
        return [result async for result in self._shown(results)]

    def _redact(self, text: str) -> str:
        """Remove the secrets of the endpoint, and the token of this request's callback."""
        shown = self._endpoint.redact(text)
        return shown if self._token is None else self._token(shown)

    async def _shown(self, results: Sequence[RewardResult]) -> AsyncIterator[RewardResult]:
        """The results without secrets. Other requests have a turn, as feedback may be long."""
        for count, result in enumerate(results, start=1):
            yield redacted(result, self._redact)
            if count % REDACTED_IN_A_ROW == 0:
                await asyncio.sleep(0)

    def _report_wait(self, message: str) -> None:
        self._sender.waits(f"{self._sender.label}: {message}")

    async def _announce(self, ids: list[str]) -> None:
        """Announce the request to the inbox. Time without the DAR service does not count."""
        # The breaker first: it could not extend the deadline once it is announced.
        await self._endpoint.passable(self._patience)
        seconds, started = self._schedule.remaining_seconds, time.monotonic()
        later = LaterReply(self._sender.url, self._request_id, ids, seconds, self._sender.inbox)
        await later.open(self._sender.name, self._context.step)
        self._schedule.extend(time.monotonic() - started)
        # An earlier process may have announced it with an earlier deadline.
        self._schedule.end_by(later.remaining_seconds)
        self._later = later
        self._token = Redactor([later.token])

    def _begin(self, samples: list[EncodedSample]) -> None:
        """Encode the body, which is the same on every attempt."""
        now = datetime.now(UTC)
        deadline = now + timedelta(seconds=self._schedule.remaining_seconds)
        reply: Mapping[str, Any] | None = None
        if self._later is not None:
            reply, deadline = self._later.reply.model_dump(exclude_none=True), self._later.deadline
        self._batch = RequestBatch(
            request_id=self._request_id,
            component=self._sender.name,
            context=self._context,
            samples=tuple(self._as_sent(sample.sample) for sample in samples),
            columns=self._options.columns,
            created_at=now,
            deadline=deadline,
            # With text, the protocol encodes a second time: the first encoding holds conversations.
            # Request ids are digests of it, so encoding the texts at once would change the ids.
            encoded=()
            if self._options.prompt_format == "text"
            else tuple(sample.json for sample in samples),
            reply=reply,
        )
        self._body = self._sender.protocol.encode(self._batch)
        self._endpoint.budget.first_attempt()
        self._queued_seconds = time.monotonic() - self._ready_at
        if len(self._body) > MAX_REQUEST_BYTES:
            reason = f"a request of {len(self._body)} bytes"
            raise AttemptFailedError("too_large", "too_large", reason)

    def _as_sent(self, sample: RewardSample) -> RewardSample:
        if self._options.prompt_format == "text" and sample.prompt_text is not None:
            return replace(sample, prompt=sample.prompt_text, messages=None)
        return sample

    async def _send(self) -> Answer:
        if self._later is not None and self._later.is_accepted:
            return Answer(202, {}, b"")
        timeouts = self._options.timeouts
        extra = max(0.0, len(self._body) / 1e6 - 1) * SECONDS_PER_MEGABYTE
        seconds = min(timeouts.attempt + extra, self._schedule.remaining_seconds)
        ends_at = time.monotonic() + seconds
        limits = {
            "connect": timeouts.connect,
            "read": timeouts.read,
            "write": timeouts.read,
            "pool": timeouts.attempt,
        }
        try:
            async with asyncio.timeout(seconds):
                answer = await self._endpoint.post(
                    self._body, lambda: self._headers(ends_at), limits, self._current.timings
                )
        except TimeoutError:
            reason = f"no complete answer within {seconds:.3g} s"
            raise AttemptFailedError("transient", "timeout", reason) from None
        self._current.status, self._current.bytes_in = answer.status, len(answer.body)
        if answer.status == 202:
            self._accept(answer)
        return answer

    def _accept(self, answer: Answer) -> None:
        if self._later is None:
            raise AttemptFailedError(
                "contract",
                "contract.status",
                "HTTP 202, but only a 200 carries rewards",
                status=202,
            )
        self._later.accept(answer.body)

    def _headers(self, ends_at: float) -> Mapping[str, str]:
        request_id = self._request_id
        timestamp = int(datetime.now(UTC).timestamp())
        return {
            **self._plain_headers(),
            "content-type": "application/json",
            "idempotency-key": request_id,
            "traceparent": f"00-{trace_id(request_id)}-{secrets.token_hex(8)}-01",
            "x-dar-attempt": str(self._schedule.attempt),
            "x-dar-deadline-ms": str(max(0, int((ends_at - time.monotonic()) * 1000))),
            **signed_headers(self._sender.keys, request_id, timestamp, self._body),
        }

    def _poll_headers(self) -> Mapping[str, str]:
        timestamp = int(datetime.now(UTC).timestamp())
        signed = signed_headers(self._sender.keys, self._request_id, timestamp, b"")
        return {**self._plain_headers(), **signed}

    def _plain_headers(self) -> dict[str, str]:
        return {
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": f"dar-service/{__version__}",
        }

    async def _decoded(self, answer: Answer) -> list[RewardResult]:
        batch = self._batch
        assert batch is not None
        self._check_signature(answer)
        try:
            results = await decoded(
                lambda body: self._sender.protocol.decode(body, batch), answer.body
            )
        except RewardContractError as error:
            quote = quotable(answer.body) if error.error_code == "contract.json" else ""
            raise AttemptFailedError(
                "contract", error.error_code, error.message, quote=quote, status=200
            ) from None
        if self._later is not None:
            self._later.close()
        return results

    def _check_signature(self, answer: Answer) -> None:
        if not self._options.require_signed_responses:
            return
        try:
            verify(self._sender.keys, answer.headers, answer.body)
        except AuthenticationError as error:
            reason = f"its answer lacks a valid signature: {error.message}"
            raise AttemptFailedError("contract", "contract.signature", reason, status=200) from None

    async def _later_result(self) -> list[RewardResult]:
        """Wait for the result after a 202."""
        assert self._later is not None

        async def poll(url: str, seconds: float) -> Polled:
            parts = urlsplit(url)
            target = parts.path or "/"
            if parts.query:
                target += f"?{parts.query}"
            timeouts = self._options.timeouts
            most = min(timeouts.attempt, seconds)
            limits = {"connect": timeouts.connect, "read": timeouts.read, "pool": most}
            try:
                async with asyncio.timeout(most):
                    polled = await self._endpoint.get(target, self._poll_headers(), limits)
            except TimeoutError:
                raise AttemptFailedError("transient", "timeout", "no answer to a poll") from None
            except AttemptFailedError as failure:
                if failure.kind in {"permanent", "too_large"}:
                    failure.kind = "refused"  # the poll concerns this request, not the service
                failure.retry_after_seconds = self._capped(failure.retry_after_seconds)
                raise
            if polled.status == 200:
                self._check_signature(polled)
            after = self._capped(parse_retry_after(polled.headers.get("retry-after")))
            return Polled(polled.body if polled.status == 200 else None, after)

        return [as_result(result) for result in await self._later.result(poll, self._poll_ended)]

    def _poll_ended(self, failure: AttemptFailedError) -> None:
        """Report that polling has failed, and only a callback can still bring the result."""
        without_secrets(failure, self._redact)
        if self._sender.observer is not None:
            self._sender.observer.poll_ended(
                self._sender.name, self._request_id, failure.code, failure.full_reason
            )

    def _record_failure(self, failure: AttemptFailedError, *, is_final: bool) -> None:
        if failure.status is not None:
            self._current.status = failure.status
        self._record(failure.code, is_final=is_final, quote=failure.quote)

    def _record(self, outcome: str, *, is_final: bool, quote: str = "") -> None:
        attempt = self._current
        record = RequestRecord(
            component=self._sender.name,
            request_id=self._request_id,
            step=self._context.step,
            mode=self._context.mode,
            attempt=attempt.number,
            samples=self._count,
            outcome=outcome,
            status=attempt.status,
            seconds=time.monotonic() - attempt.started_at,
            in_flight_seconds=attempt.in_flight_seconds,
            queued_seconds=self._queued_seconds,
            bytes_out=len(self._body),
            bytes_in=attempt.bytes_in,
            is_final=is_final,
            quote=quote,
            dns_seconds=attempt.timings.dns_seconds,
            connect_seconds=attempt.timings.connect_seconds,
            first_byte_seconds=attempt.timings.first_byte_seconds,
        )
        log_attempt(record)
        if self._sender.observer is not None:
            self._sender.observer.request_done(record)


def _may_be_repeated(result: RewardResult) -> bool:
    return isinstance(result, Failed) and result.is_transient
