"""A reward source behind a URL: one signed POST per batch, hard time limits, retries only where they can help.

Every way to fail ends as a `Failed` for the samples of that request, or as an error when the service refuses for good;
none ends as a number.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx2

from dar.errors import RewardContractError, RewardMisconfiguredError
from dar.protocol.reward_spec import RewardBatching, RewardLimits, RewardRetry, RewardTimeouts
from dar.protocol.rewards import MAX_REQUEST_BYTES, Reply, decode_response
from dar.rewards.answers import failure_of, read_answer, read_polled, refusal_of
from dar.rewards.asynchronous import Inbox, LaterReply, Polled
from dar.rewards.base import Failed, RewardContext, RewardResult, RewardSample
from dar.rewards.concurrency import all_of
from dar.rewards.retry import AttemptFailedError, RetrySchedule
from dar.rewards.signing import decode_secret, signed_headers
from dar.rewards.wire import (
    CALLBACK_BYTES,
    Batch,
    EncodedRequest,
    as_result,
    batches,
    encode_request,
    encode_sample,
    request_id_of,
)
from dar.version import __version__

logger = logging.getLogger(__name__)
KEEPALIVE_SECONDS = 15.0
"""Idle connections are closed after this; below the 60 to 75 s of common servers, so that we close first."""
CONNECTING = "connection.connect_tcp.started"
"""Trace event of httpx2 that a request gets a new connection; without it, it goes over a kept-alive one."""
ANSWERED = "http11.receive_response_headers.complete"
"""Trace event of httpx2 that the head of an answer has come."""
SECONDS_PER_MEGABYTE = 3.0
"""What an attempt's limit grows by with each MB of body above the first."""


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How a reward service is driven; the parts are those of the job spec."""

    columns: Sequence[str] | None = None
    """Columns of the prompt's row that are sent beside ``ground_truth``; None: no others."""
    batch: RewardBatching = field(default_factory=RewardBatching)
    limits: RewardLimits = field(default_factory=RewardLimits)
    timeouts: RewardTimeouts = field(default_factory=RewardTimeouts)
    retry: RewardRetry = field(default_factory=RewardRetry)
    allow_async: bool = False
    """Whether the service may answer 202 and give the result later."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A 200, or a 202 where that is allowed."""

    status: int
    body: bytes


class HttpReward:
    """A reward service that speaks ``dar.reward.v1``.

    Args:
        name: Component name.
        url: Where requests are posted.
        secret: ``whsec_…``; None sends unsigned requests.
        options: Batching, limits, timeouts and retries.
        on_wait: Called with a message whenever a retry is being waited for.
        inbox: Takes callbacks, where results may come later; None: they can only be polled for.

    Raises:
        ConfigurationError: The secret is malformed.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        secret: str | None = None,
        options: HttpOptions | None = None,
        on_wait: Callable[[str], None] | None = None,
        inbox: Inbox | None = None,
    ) -> None:
        self._inbox = inbox
        self._name = name
        self._url = url
        self._options = options or HttpOptions()
        self._keys = () if secret is None else (decode_secret(secret),)
        self.on_wait = on_wait
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        self._label = f"reward service {parts.scheme}://{host}{parts.path}"
        self._max_samples = self._options.batch.max_samples
        self._slots = asyncio.Semaphore(self._options.limits.concurrency)
        self._paused_until = 0.0
        self._client: httpx2.AsyncClient | None = None

    @property
    def name(self) -> str:
        """Component name."""
        return self._name

    async def score(
        self, samples: Sequence[RewardSample], context: RewardContext
    ) -> list[RewardResult]:
        """Score ``samples``: one result each, in order.

        Raises:
            RewardMisconfiguredError: The service refuses for good; requests in flight are cancelled.
        """
        encoded = [
            encode_sample(sample, self._options.columns, context.steps_done) for sample in samples
        ]
        found: dict[str, RewardResult] = {}
        room = self._options.batch.max_bytes - CALLBACK_BYTES * self._options.allow_async
        work = batches(encoded, max_samples=self._max_samples, max_bytes=room)
        await all_of(self._score_batch(batch, context, found) for batch in work)
        return [found[sample.id] for sample in samples]

    async def aclose(self) -> None:
        """Close all connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _score_batch(
        self, batch: Batch, context: RewardContext, found: dict[str, RewardResult]
    ) -> None:
        try:
            found.update(await self._deliver(batch, context))
        except AttemptFailedError as failure:
            if failure.kind in {"permanent", "name"}:
                raise RewardMisconfiguredError(
                    f"{self._label}: {failure.full_reason}", code=failure.code
                ) from failure
            if failure.kind != "too_large" or len(batch) == 1:
                found.update(self._all_failed(batch, failure))
                return
        else:
            return
        half = len(batch) // 2
        self._max_samples = min(self._max_samples, half)
        await self._score_batch(batch[:half], context, found)
        await self._score_batch(batch[half:], context, found)

    def _all_failed(self, batch: Batch, failure: AttemptFailedError) -> dict[str, RewardResult]:
        logger.warning("%s: %d samples failed: %s", self._label, len(batch), failure.code)
        message = f"{self._label}: {failure.full_reason}"
        failed = Failed(failure.code, message, is_transient=failure.kind == "transient")
        return dict.fromkeys((sample.id for sample in batch), failed)

    async def _deliver(self, batch: Batch, context: RewardContext) -> dict[str, RewardResult]:
        """Send one request until it is answered or given up."""
        request_id = request_id_of(batch, self._name, context)
        now = datetime.now(UTC)
        deadline = now + timedelta(seconds=self._options.timeouts.deadline)
        later: LaterReply | None = None
        reply = Reply(modes=["sync"], deadline=deadline)
        if self._options.allow_async:
            ids = [sample.id for sample in batch]
            later = LaterReply(self._url, request_id, ids, deadline, self._inbox)
            await later.open(self._name, context.step)
            reply = later.reply
        request = encode_request(
            batch, self._name, context, request_id=request_id, created_at=now, reply=reply
        )
        if len(request.body) > MAX_REQUEST_BYTES:
            size = len(request.body)
            raise AttemptFailedError("too_large", "too_large", f"a request of {size} bytes")
        left = (reply.deadline - datetime.now(UTC)).total_seconds()
        schedule = RetrySchedule(self._options.retry, left, self._report_wait)
        while True:
            try:
                return await self._answered(request, schedule, later)
            except AttemptFailedError as failure:
                wait = schedule.wait_after(failure)
                if wait is None:
                    raise
            await asyncio.sleep(wait)

    async def _answered(
        self, request: EncodedRequest, schedule: RetrySchedule, later: LaterReply | None
    ) -> dict[str, RewardResult]:
        """One attempt, and the wait for its result where that comes later; only the attempt takes a slot."""
        if later is None or not later.is_accepted:
            async with self._slots:
                results = await self._attempt(request, schedule, later)
            if results is not None:
                return results
        assert later is not None
        return {
            result.id: as_result(result)
            for result in await later.result(lambda url, left: self._poll(request, url, left))
        }

    async def _poll(self, request: EncodedRequest, url: str, left: float) -> Polled:
        timestamp = int(datetime.now(UTC).timestamp())
        headers = {
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": f"dar-service/{__version__}",
            **signed_headers(self._keys, request.request_id, timestamp, b""),
        }
        try:
            async with (
                asyncio.timeout(min(self._options.timeouts.attempt, left)),
                self._connect().stream("GET", url, headers=headers) as response,
            ):
                return await read_polled(response)
        except TimeoutError:
            raise AttemptFailedError("transient", "timeout", "no complete answer") from None
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise failure_of(error) from error

    def _report_wait(self, failure: AttemptFailedError, attempt: int, wait: float) -> None:
        if failure.retry_after_seconds is not None:
            self._paused_until = max(self._paused_until, time.monotonic() + wait)
        if self.on_wait is not None:
            attempts = self._options.retry.attempts
            self.on_wait(
                f"{self._label}: {failure.reason}; attempt {attempt} of {attempts} in {wait:.1f} s"
            )

    async def _attempt(
        self, request: EncodedRequest, schedule: RetrySchedule, later: LaterReply | None
    ) -> dict[str, RewardResult] | None:
        """The results of one attempt; None: they come later."""
        await self._wait_until_welcome(schedule)
        timeouts = self._options.timeouts
        extra = max(0.0, len(request.body) / 1e6 - 1) * SECONDS_PER_MEGABYTE
        seconds = min(timeouts.attempt + extra, schedule.remaining_seconds)
        if seconds <= 0:
            raise AttemptFailedError(
                "transient", "deadline", f"no answer within {timeouts.deadline:g} s"
            )
        try:
            async with asyncio.timeout(seconds):
                answer = await self._post(request, schedule.attempt, time.monotonic() + seconds)
        except TimeoutError:
            raise AttemptFailedError(
                "transient", "timeout", f"no complete answer within {seconds:.3g} s"
            ) from None
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise failure_of(error) from error
        if answer.status == 202 and later is not None:
            later.accept(answer.body)
            return None
        try:
            results = decode_response(answer.body, request_id=request.request_id, ids=request.ids)
        except RewardContractError as error:
            raise AttemptFailedError("contract", error.error_code, error.message) from None
        if later is not None:
            later.close()
        return {result.id: as_result(result) for result in results}

    async def _wait_until_welcome(self, schedule: RetrySchedule) -> None:
        """A ``Retry-After`` holds back every request to the service, not only the one it answered."""
        while (pause := self._paused_until - time.monotonic()) > 0:
            await asyncio.sleep(min(pause, max(0.0, schedule.remaining_seconds)))
            if schedule.remaining_seconds <= 0:
                return

    def _headers(self, request: EncodedRequest, number: int, seconds: float) -> Mapping[str, str]:
        timestamp = int(datetime.now(UTC).timestamp())
        return {
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": f"dar-service/{__version__}",
            "idempotency-key": request.request_id,
            "x-dar-attempt": str(number),
            "x-dar-deadline-ms": str(int(seconds * 1000)),
            **signed_headers(self._keys, request.request_id, timestamp, request.body),
        }

    async def _post(self, request: EncodedRequest, number: int, ends_at: float) -> Answer:
        """The answer to one attempt.

        A server may close a kept-alive connection just when it is used again. That says nothing about the service, and
        the request's id makes a repetition harmless: it is sent once more at once, as the same attempt.
        """
        seen: set[str] = set()

        async def trace(event: str, _: Mapping[str, Any]) -> None:
            seen.add(event)

        headers = self._headers(request, number, ends_at - time.monotonic())
        try:
            return await self._post_once(request, headers, {"trace": trace})
        except (httpx2.NetworkError, httpx2.RemoteProtocolError):
            if CONNECTING in seen or ANSWERED in seen:
                raise
        headers = self._headers(request, number, ends_at - time.monotonic())
        return await self._post_once(request, headers)

    async def _post_once(
        self,
        request: EncodedRequest,
        headers: Mapping[str, str],
        extensions: dict[str, Any] | None = None,
    ) -> Answer:
        async with self._connect().stream(
            "POST", self._url, content=request.body, headers=headers, extensions=extensions
        ) as response:
            if response.status_code != 200 and not (
                response.status_code == 202 and self._options.allow_async
            ):
                raise await refusal_of(response)
            return Answer(response.status_code, await read_answer(response))

    def _connect(self) -> httpx2.AsyncClient:
        """The client, made at its first use so that it belongs to the event loop that uses it."""
        if self._client is None:
            timeouts, concurrency = self._options.timeouts, self._options.limits.concurrency
            self._client = httpx2.AsyncClient(
                http1=True,
                http2=False,
                trust_env=False,
                follow_redirects=False,
                timeout=httpx2.Timeout(
                    timeouts.read, connect=timeouts.connect, pool=timeouts.attempt
                ),
                limits=httpx2.Limits(
                    max_connections=concurrency,
                    max_keepalive_connections=concurrency,
                    keepalive_expiry=KEEPALIVE_SECONDS,
                ),
            )
        return self._client
