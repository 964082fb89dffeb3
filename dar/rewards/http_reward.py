"""`HttpReward`: a reward service as a reward source.

A failed request makes each of its samples a `Failed`. An error is raised only if no request can
succeed until the configuration changes. No failure becomes a number.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dar.errors import ConfigurationError, RewardMisconfiguredError
from dar.protocol.reward_spec import RewardComponent
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import (
    RewardContext,
    RewardObserver,
    RewardProtocol,
    RewardResult,
    RewardSample,
    strip_thinking,
)
from dar.rewards.cache.cache import CacheSavings, ResultCache
from dar.rewards.http.async_results import Inbox
from dar.rewards.http.batching import Batcher, Piece, QueuedRequest
from dar.rewards.http.breaker import BreakerState
from dar.rewards.http.egress import EgressPolicy, parse_url
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
from dar.rewards.protocols.openai_grader import OpenAIGraderProtocol
from dar.rewards.protocols.openrlhf import OpenRLHFProtocol
from dar.rewards.protocols.plain import PlainProtocol
from dar.rewards.protocols.trl import TRLProtocol
from dar.rewards.threads import wait_for_all

__all__ = ["HttpOptions", "HttpReward"]
logger = logging.getLogger(__name__)


class HttpReward:
    """A reward service.

    Args:
        name: Component name.
        url: Requests are posted here.
        secret: A single secret, ``whsec_…``.
        secrets: Requests are signed with each of them, for rotation; without any they are unsigned.
        options: Protocol, batching, limits, timeouts, retries, credentials and egress.
        on_wait: Called with a message whenever a request waits.
        observer: Receives every attempt, change of the breaker and wait.
        inbox: Receives results that are sent to callbacks.
        cache: Rewards of earlier requests; None: every sample is sent.

    Raises:
        ConfigurationError: A secret is malformed, a secret header cannot be sent, or signed answers
            are required but there is no secret.
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
        return self._name

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: the sample limit learned from the service's 413 responses."""
        return {"max_samples": self._max_samples}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the limit of a checkpoint, unless the job's own limit is lower now."""
        learned = state.get("max_samples")
        if isinstance(learned, int) and learned > 0:
            self._max_samples = min(self._max_samples, learned)

    async def score(
        self, samples: Sequence[RewardSample], context: RewardContext
    ) -> list[RewardResult]:
        """Score ``samples``: one result each, in order.

        Concurrent calls share requests. A call waits while too many requests are queued.

        Raises:
            RewardMisconfiguredError: No request can succeed until the configuration changes.
        """
        if self._options.strip_thinking:  # first, so that cache keys match what is sent
            samples = list(map(strip_thinking, samples))
        if self._cache is None or context.mode == "validate":
            return await self._request(samples, context)
        return await self._cache.score(samples, context, self._request, self._not_sent)

    async def _request(
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
            await wait_for_all([piece.outcome for piece in pieces])
        finally:
            await _leave(pieces)
        found = {key: result for piece in pieces for key, result in piece.outcome.result().items()}
        return [found[sample.id] for sample in samples]

    async def aclose(self) -> None:
        """Release the endpoint; its last user closes the connections."""
        endpoint, self._endpoint, self._batcher = self._endpoint, None, None
        if endpoint is not None:
            await endpoint.release(self._breaker_changed)
        if self._cache is not None:
            await self._cache.aclose()

    def waits(self, message: str) -> None:
        """Report that a request of this component waits."""
        if self.on_wait is not None:
            self.on_wait(message)
        if self.observer is not None:
            self.observer.waiting(self._name, message)

    def _not_sent(self, savings: CacheSavings) -> None:
        if self.observer is not None:
            self.observer.not_sent(self._name, savings.hits, savings.copies)

    def _pieces(self, encoded: Sequence[EncodedSample]) -> list[EncodedBatch]:
        """Whole groups; a group that alone exceeds a limit is split."""
        groups: dict[str, EncodedBatch] = {}
        for sample in encoded:
            groups.setdefault(sample.group_id, []).append(sample)
        limits = {"max_samples": self._max_samples, "max_bytes": self._max_bytes}
        return [piece for group in groups.values() for piece in batches(group, **limits)]

    def _open(self) -> Batcher:
        """The batcher. It and the endpoint belong to the event loop of their first use."""
        if self._batcher is None:
            self._endpoint = open_endpoint(self._endpoint_config())
            self._endpoint.listeners.add(self._breaker_changed)
            self._batcher = Batcher(
                self._send,
                max_samples=lambda: self._max_samples,
                max_bytes=self._max_bytes,
                linger_seconds=self._options.batch.linger_ms / 1000,
                slots=self._options.limits.concurrency,
                # The id of a request depends on its samples. After a restart the same samples must
                # share a request, or a later answer would not find its own.
                is_merging=not self._options.allow_async,
            )
        return self._batcher

    def _endpoint_config(self) -> EndpointConfig:
        options = self._options
        return EndpointConfig(
            target=self._target,
            secrets=self._secrets,
            headers=tuple(sorted((name.lower(), value) for name, value in options.headers.items())),
            limits=(options.limits.concurrency, options.limits.rps),
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
            found = await self._score_batch(list(request.samples), request, endpoint, slot)
        finally:
            slot.release()
        for piece in request.pieces:
            if not piece.outcome.done():
                piece.outcome.set_result({sample.id: found[sample.id] for sample in piece.samples})

    async def _score_batch(
        self,
        samples: EncodedBatch,
        request: QueuedRequest,
        endpoint: Endpoint,
        slot: ConcurrencySlot,
    ) -> dict[str, RewardResult]:
        """The results of ``samples``, over several requests if the size limit shrinks meanwhile."""
        found: dict[str, RewardResult] = {}
        waiting = samples
        while waiting:
            limits = {"max_samples": self._max_samples, "max_bytes": self._max_bytes}
            part = next(batches(waiting, **limits))
            retrying = RetryingRequest(
                self._sender(endpoint), request.context, request.ready_at, slot
            )
            try:
                found.update(await retrying.results(part))
            except AttemptFailedError as failure:
                if failure.kind in {"permanent", "name"}:
                    raise self._refused(failure, endpoint) from failure
                if failure.kind == "too_large" and len(part) > 1:
                    self._max_samples = max(1, min(self._max_samples, len(part) // 2))
                    continue
                logger.warning("%s: %d samples failed: %s", self._label, len(part), failure.code)
                found.update(dict.fromkeys((s.id for s in part), retrying.failed(failure)))
            waiting = waiting[len(part) :]
        return found

    def _refused(self, failure: AttemptFailedError, endpoint: Endpoint) -> RewardMisconfiguredError:
        error = RewardMisconfiguredError(f"{self._label}: {failure.full_reason}", code=failure.code)
        if failure.kind == "name":  # for a permanent failure the request has done so
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


async def _leave(pieces: Sequence[Piece]) -> None:
    """Cancel pieces without an outcome, and wait until their requests have ended."""
    if all(piece.outcome.done() for piece in pieces):
        return
    for piece in pieces:
        piece.outcome.cancel()
    await asyncio.sleep(0)  # callbacks of the outcomes cancel requests that no call waits for
    tasks = {piece.task for piece in pieces if piece.task is not None and piece.task.cancelling()}
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task


def http_options(
    component: RewardComponent,
    access: ComponentAccess | None,
    *,
    guard: EgressPolicy | None,
    is_shared: bool = True,
) -> HttpOptions:
    """Options of an http component; see `http_source`."""
    return HttpOptions(
        component.columns,
        component.batch,
        component.limits,
        component.timeouts,
        component.retry,
        protocol=protocol_of(component),
        prompt_format=component.prompt_format,
        strip_thinking=component.strip_thinking,
        allow_async=component.reply == "either",
        require_signed_responses=component.require_signed_responses,
        headers={} if access is None else access.headers,
        guard=guard,
        is_shared=is_shared,
    )


def protocol_of(component: RewardComponent) -> RewardProtocol:
    """The protocol of an http component."""
    coerce = component.coerce
    if component.protocol == "openrlhf":
        return OpenRLHFProtocol(coerce=coerce)
    if component.protocol == "trl":
        return TRLProtocol(coerce=coerce)
    if component.protocol == "plain":
        return PlainProtocol(component.template, component.pointer or "", coerce=coerce)
    if component.protocol == "openai_grader":
        return OpenAIGraderProtocol(component.grader or {}, coerce=coerce)
    return NativeProtocol()
