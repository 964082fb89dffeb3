"""A reward source behind a URL: one signed POST per batch, hard time limits, retries only where they can help.

Every way to fail ends as a `Failed` for the samples of that request, or as an error when the service refuses for good;
none ends as a number.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dar.errors import ConfigurationError, RewardMisconfiguredError
from dar.rewards.base import (
    RewardContext,
    RewardObserver,
    RewardResult,
    RewardSample,
    strip_thinking,
)
from dar.rewards.cache.cache import ResultCache, Spared
from dar.rewards.http.async_results import Inbox
from dar.rewards.http.batching import Batcher, Piece, QueuedRequest
from dar.rewards.http.breaker import BreakerState
from dar.rewards.http.egress import parse_url
from dar.rewards.http.endpoint import ConcurrencySlot, Endpoint, EndpointConfig, open_endpoint
from dar.rewards.http.redaction import check_headers
from dar.rewards.http.request import HttpOptions, RetryingRequest, Sender
from dar.rewards.http.retry import AttemptFailedError
from dar.rewards.http.signing import decode_secret
from dar.rewards.http.wire import (
    CALLBACK_BYTES,
    EncodedBatch,
    EncodedSample,
    batches,
    encode_sample,
)
from dar.rewards.protocols.native import NativeProtocol

__all__ = ["HttpOptions", "HttpReward"]
logger = logging.getLogger(__name__)


class HttpReward:
    """A reward service.

    Args:
        name: Component name.
        url: Where requests are posted.
        secret: ``whsec_…``; short for ``secrets`` with one.
        secrets: Requests are signed with all of them, so that one can replace another; none sends unsigned requests.
        options: Protocol, batching, limits, timeouts, retries, credentials and egress.
        on_wait: Called with a message whenever a retry is being waited for.
        observer: Is told of every attempt, every change of the breaker and every wait.
        inbox: Takes results that come by callback.
        cache: Knows rewards that need not be asked for; None: every sample is sent.

    Raises:
        ConfigurationError: A secret is malformed, a secret header cannot be sent, or signed answers are asked for without a
            secret.
        RewardMisconfiguredError: ``config.url`` or ``egress_denied``: the URL cannot be used.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        secret: str | None = None,
        secrets: Sequence[str] = (),
        options: HttpOptions | None = None,
        on_wait: Callable[[str], None] | None = None,
        observer: RewardObserver | None = None,
        inbox: Inbox | None = None,
        cache: ResultCache | None = None,
    ) -> None:
        self._name = name
        self._url = url
        self._options = options or HttpOptions()
        self._protocol = self._options.protocol or NativeProtocol()
        self._secrets = (*secrets, *(() if secret is None else (secret,)))
        self._keys = tuple(map(decode_secret, self._secrets))
        self._target = parse_url(url, self._options.guard)
        self.on_wait = on_wait
        self.observer = observer
        self.inbox = inbox
        self._cache = cache
        self._label = f"reward service {self._target.label}"
        check_headers(self._options.headers)
        if self._options.require_signed_responses and not self._keys:
            raise ConfigurationError(
                f"{self._label}: signed answers are required, but there is no secret to check them with"
            )
        self._max_bytes = self._options.batch.max_bytes
        if self._options.allow_async:
            self._max_bytes -= CALLBACK_BYTES
        bounds = (self._options.batch.max_samples, self._protocol.max_samples)
        self._max_samples = min(bound for bound in bounds if bound is not None)
        self._endpoint: Endpoint | None = None
        self._batcher: Batcher | None = None

    @property
    def name(self) -> str:
        """Component name."""
        return self._name

    def state(self) -> dict[str, Any]:
        """What was learned about the service, for a checkpoint."""
        return {"max_samples": self._max_samples}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what was learned; a limit that the job has lowered since stays lower."""
        learned = state.get("max_samples")
        if isinstance(learned, int) and learned > 0:
            self._max_samples = min(self._max_samples, learned)

    async def score(
        self, samples: Sequence[RewardSample], context: RewardContext
    ) -> list[RewardResult]:
        """Score ``samples``: one result each, in order.

        May be called again before it has ended: the groups of all calls are put together into requests. It waits while too
        many requests do.

        Raises:
            RewardMisconfiguredError: The service refuses for good.
        """
        if self._options.strip_thinking:  # first, so that what is remembered goes by what is sent
            samples = list(map(strip_thinking, samples))
        if self._cache is None or context.mode == "validate":
            return await self._ask(samples, context)
        return await self._cache.score(samples, context, self._ask, self._spared)

    async def _ask(
        self, samples: Sequence[RewardSample], context: RewardContext
    ) -> list[RewardResult]:
        loop = asyncio.get_running_loop()
        batcher = self._open()
        encoded = [
            encode_sample(sample, self._options.columns, context.steps_done) for sample in samples
        ]
        pieces = [Piece(batch, loop.create_future()) for batch in self._pieces(encoded)]
        try:
            for piece in pieces:
                await batcher.put(piece, context)
            outcomes = await _all_or_first_error(pieces)
        finally:
            await _leave(pieces)
        found = {sample_id: result for found in outcomes for sample_id, result in found.items()}
        return [found[sample.id] for sample in samples]

    async def aclose(self) -> None:
        """Give up the connections; the last user of an endpoint closes them."""
        endpoint, self._endpoint, self._batcher = self._endpoint, None, None
        if endpoint is not None:
            await endpoint.release(self._breaker_changed)
        if self._cache is not None:
            await self._cache.aclose()

    def waits(self, message: str) -> None:
        """A request of this component is waiting."""
        if self.on_wait is not None:
            self.on_wait(message)
        if self.observer is not None:
            self.observer.waiting(self._name, message)

    def _spared(self, spared: Spared) -> None:
        if self.observer is not None:
            self.observer.spared(self._name, spared.hits, spared.copies)

    def _pieces(self, encoded: Sequence[EncodedSample]) -> list[EncodedBatch]:
        """Whole groups, but for those that alone are over a limit."""
        groups: dict[str, EncodedBatch] = {}
        for sample in encoded:
            groups.setdefault(sample.group_id, []).append(sample)
        limits = {"max_samples": self._max_samples, "max_bytes": self._max_bytes}
        return [piece for group in groups.values() for piece in batches(group, **limits)]

    def _open(self) -> Batcher:
        """Endpoint and batcher, made at their first use so that they belong to the event loop that uses them."""
        if self._batcher is None:
            self._endpoint = open_endpoint(self._connection())
            self._endpoint.listeners.add(self._breaker_changed)
            self._batcher = Batcher(
                self._send,
                max_samples=lambda: self._max_samples,
                max_bytes=self._max_bytes,
                linger_seconds=self._options.batch.linger_ms / 1000,
                slots=self._options.limits.concurrency,
                # A later answer finds its request by an id that the samples give, also after a restart.
                is_merging=not self._options.allow_async,
            )
        return self._batcher

    def _connection(self) -> EndpointConfig:
        options = self._options
        return EndpointConfig(
            target=self._target,
            secrets=self._secrets,
            headers=tuple(sorted((name.lower(), value) for name, value in options.headers.items())),
            limits=EndpointConfig.limits_of(options.limits),
            guard=options.guard,
            breaker=options.breaker,
            budget=options.budget,
            tls=options.tls,
            resolver=options.resolver,
            owner=None if options.is_shared else self,
        )

    async def _send(self, request: QueuedRequest) -> None:
        endpoint, batcher = self._endpoint, self._batcher
        assert endpoint is not None
        assert batcher is not None
        slot = endpoint.slot()
        try:
            await slot.acquire()
            batcher.leaves_queue(request)
            found = await self._deliver(list(request.samples), request, endpoint, slot)
        finally:
            slot.release()
        for piece in request.pieces:
            if not piece.outcome.done():
                piece.outcome.set_result({sample.id: found[sample.id] for sample in piece.samples})

    async def _deliver(
        self,
        samples: EncodedBatch,
        request: QueuedRequest,
        endpoint: Endpoint,
        slot: ConcurrencySlot,
    ) -> dict[str, RewardResult]:
        """The results of ``samples``, over as many requests as the limit on their size demands, which may sink on the way."""
        found: dict[str, RewardResult] = {}
        waiting = samples
        while waiting:
            limits = {"max_samples": self._max_samples, "max_bytes": self._max_bytes}
            part = next(batches(waiting, **limits))
            delivery = RetryingRequest(
                self._sender(endpoint), request.context, request.ready_at, slot
            )
            try:
                found.update(await delivery.results(part))
            except AttemptFailedError as failure:
                if failure.kind in {"permanent", "name"}:
                    raise self._refused(failure, endpoint) from failure
                if failure.kind == "too_large" and len(part) > 1:
                    self._max_samples = max(1, min(self._max_samples, len(part) // 2))
                    continue
                logger.warning("%s: %d samples failed: %s", self._label, len(part), failure.code)
                found.update(dict.fromkeys((s.id for s in part), delivery.failed(failure)))
            waiting = waiting[len(part) :]
        return found

    def _refused(self, failure: AttemptFailedError, endpoint: Endpoint) -> RewardMisconfiguredError:
        error = RewardMisconfiguredError(f"{self._label}: {failure.full_reason}", code=failure.code)
        if failure.kind == "name":  # one that is permanent at once was told by the delivery
            endpoint.breaker.trip(error)
        return error

    def _sender(self, endpoint: Endpoint) -> Sender:
        return Sender(
            name=self._name,
            label=self._label,
            url=self._url,
            options=self._options,
            protocol=self._protocol,
            keys=self._keys,
            endpoint=endpoint,
            observer=self.observer,
            inbox=self.inbox,
            waits=self.waits,
        )

    def _breaker_changed(self, state: BreakerState, reason: str) -> None:
        logger.info("%s: breaker %s: %s", self._label, state, reason)
        if self.observer is not None:
            self.observer.breaker_changed(self._name, state, reason)


async def _all_or_first_error(pieces: Sequence[Piece]) -> list[dict[str, RewardResult]]:
    """The outcomes of all, in order; the first error comes out as soon as it is there."""
    await asyncio.wait([piece.outcome for piece in pieces], return_when=asyncio.FIRST_EXCEPTION)
    for piece in pieces:
        if piece.outcome.done():
            piece.outcome.result()
    return [piece.outcome.result() for piece in pieces]


async def _leave(pieces: Sequence[Piece]) -> None:
    """Give up what is not answered, and see to it that nothing of it is left in flight."""
    if all(piece.outcome.done() for piece in pieces):
        return
    for piece in pieces:
        piece.outcome.cancel()
    await asyncio.sleep(
        0
    )  # the outcomes' callbacks cancel the requests that nobody waits for any more
    tasks = {
        piece.task for piece in pieces if piece.task is not None and piece.task.cancelling() > 0
    }
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
