"""The reward cache: rewards of earlier requests, and one request for equal samples of a step.

    HttpReward.score -> ResultCache.score -> (samples not in the cache) -> requests

Samples are equal if they differ only in ids, index in the group, job and step. Of equal samples of
a step one is sent, and all get its result. Only rewards are stored: a skip or a failure may depend
on when the request was made.
"""

import asyncio
import contextlib
import hashlib
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from dar.protocol.reward_spec import RewardComponent
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import RewardContext, RewardResult, RewardSample, Scored
from dar.rewards.cache.store import MAX_BYTES, CacheStore
from dar.rewards.http.wire import to_json, without_surrogates
from dar.rewards.threads import wait_for_all

RequestRewards = Callable[[Sequence[RewardSample], RewardContext], Awaitable[list[RewardResult]]]
NATIVE = "dar.reward.v1"
_SORTED = orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY


class SampleKey:
    """Computes cache keys of samples.

    Args:
        service: What else a reward depends on, as JSON: the service, its revision and the protocol.
        columns: Columns of the row that are sent besides ``ground_truth``.
        sends_text: Whether a conversation may be sent as the text that the policy saw.
        sends_ids: Whether the completion's token ids are sent.
    """

    def __init__(
        self,
        service: Mapping[str, Any],
        columns: Sequence[str] | None = None,
        *,
        sends_text: bool = False,
        sends_ids: bool = False,
    ) -> None:
        self._prefix = hashlib.sha256(_bytes_of(service) + b"\n")
        self._columns = tuple(columns or ())
        self._sends_text = sends_text
        self._sends_ids = sends_ids

    @classmethod
    def of(cls, component: RewardComponent, access: ComponentAccess | None) -> "SampleKey":
        """The keys of an http component.

        Args:
            component: From a job spec.
            access: URL and credentials of its registered endpoint; None for an inline URL.
        """
        service = {
            "endpoint": component.url if access is None else access.endpoint_id or access.url,
            "revision": 0 if access is None else access.revision,
            "component": component.name,  # it is sent, and the reward may depend on it
            **component.model_dump(
                mode="json",
                include={
                    *("protocol", "template", "pointer", "grader", "coerce", "prompt_format"),
                    *("columns", "require_signed_responses"),
                },
            ),
        }
        return cls(
            service,
            component.columns,
            sends_text=component.protocol != NATIVE or component.prompt_format == "text",
            sends_ids=component.protocol == "trl",
        )

    def __call__(self, sample: RewardSample) -> bytes:
        """The key of a sample: 32 bytes, the same on every machine."""
        content: dict[str, Any] = {
            "prompt": sample.prompt,
            "messages": None if sample.messages is None else [dict(one) for one in sample.messages],
            "completion": sample.completion,
            # Both are sent, and a service may penalise a truncated completion.
            "finish_reason": sample.finish_reason,
            "completion_tokens": sample.completion_tokens,
            "ground_truth": sample.columns.get("ground_truth"),
            "columns": {n: sample.columns[n] for n in self._columns if n in sample.columns},
        }
        if self._sends_text:
            content["prompt_text"] = sample.prompt_text
        if self._sends_ids and sample.completion_ids is not None:
            content["completion_ids"] = list(sample.completion_ids)
        digest = self._prefix.copy()
        digest.update(_bytes_of(content))
        return digest.digest()


def _bytes_of(content: object) -> bytes:
    with contextlib.suppress(orjson.JSONEncodeError):
        return orjson.dumps(content, option=_SORTED)
    readable = without_surrogates(content)  # as on the wire
    with contextlib.suppress(orjson.JSONEncodeError):
        return orjson.dumps(readable, option=_SORTED)
    return to_json(readable)


@dataclass(frozen=True, slots=True)
class CachedResult:
    """A result and its origin."""

    result: RewardResult
    is_hit: bool
    """Whether it was stored before the call."""


@dataclass(slots=True, eq=False)
class Flight:
    """The samples that one call requests, on behalf of all calls with equal samples."""

    context: RewardContext
    keys: tuple[bytes, ...] = ()
    """Keys of its samples."""
    task: "asyncio.Task[dict[bytes, CachedResult]] | None" = None
    waiting: int = 0
    """Number of calls that wait for it."""


@dataclass(frozen=True, slots=True)
class CacheSavings:
    """Samples of one call that were not sent."""

    hits: int
    """Rewards from the cache."""
    copies: int
    """Samples equal to one that was sent."""


class ResultCache:
    """The cache of one component, for one event loop.

    Args:
        store: Stores the rewards.
        key: Computes the key of a sample.
        ttl_seconds: How long a reward is used.
    """

    def __init__(
        self, store: CacheStore, key: Callable[[RewardSample], bytes], *, ttl_seconds: float
    ) -> None:
        self._store = store
        self._key = key
        self._ttl_seconds = ttl_seconds
        self._flights: dict[tuple[RewardContext, bytes], Flight] = {}

    async def score(
        self,
        samples: Sequence[RewardSample],
        context: RewardContext,
        request: RequestRewards,
        report: Callable[[CacheSavings], None],
    ) -> list[RewardResult]:
        """The results of ``samples``, in order.

        Requests only samples that are neither cached nor in flight.

        Cancelling a call does not cancel samples that other calls wait for.

        Args:
            samples: Completions to score.
            context: Their context; samples of one context belong to one step.
            request: Requests the rewards of samples that are not cached.
            report: Called with the number of samples that were not sent.

        Raises:
            RewardMisconfiguredError: ``request`` raised it; also raised in all calls that wait for
                it.
        """
        # The first call with a key in a step leads: its flight requests the sample.
        # A later call with that key joins the flight: it waits for the same request.
        # A call may wait for several flights.
        # A flight is a task of its own: if its first call is cancelled, the others still wait.
        keys = [self._key(sample) for sample in samples]
        first: dict[bytes, RewardSample] = {}
        for key, sample in zip(keys, samples, strict=True):
            first.setdefault(key, sample)
        own = Flight(context)
        joined = {key: self._flights.setdefault((context, key), own) for key in first}
        led = {key: first[key] for key, flight in joined.items() if flight is own}
        if led:
            own.keys = tuple(led)
            own.task = asyncio.create_task(self._fly(own, led, request))
        flights = set(joined.values())
        for flight in flights:
            flight.waiting += 1
        try:
            await wait_for_all([flight.task for flight in flights if flight.task is not None])
        finally:
            await self._leave(flights)
        known = {key: _result_of(flight)[key] for key, flight in joined.items()}
        hits = sum(known[key].is_hit for key in keys)
        sent = sum(not known[key].is_hit for key in led)
        if hits or len(keys) > sent:
            report(CacheSavings(hits, len(keys) - hits - sent))
        return [known[key].result for key in keys]

    async def aclose(self) -> None:
        """Write pending rewards and close the store."""
        await self._store.aclose()

    async def _fly(
        self, flight: Flight, led: Mapping[bytes, RewardSample], request: RequestRewards
    ) -> dict[bytes, CachedResult]:
        try:
            stored = await self._store.get(list(led), self._ttl_seconds)
            cached = {key: _decoded(value) for key, value in stored.items()}
            known = {
                key: CachedResult(result, is_hit=True)
                for key, result in cached.items()
                if result is not None
            }
            missing = {key: sample for key, sample in led.items() if key not in known}
            if missing:
                results = await request(list(missing.values()), flight.context)
                fresh = dict(zip(missing, results, strict=True))
                encoded = {key: _encoded(result) for key, result in fresh.items()}
                self._store.put({k: value for k, value in encoded.items() if value is not None})
                known |= {key: CachedResult(one, is_hit=False) for key, one in fresh.items()}
            return known
        finally:
            self._close(flight)

    def _close(self, flight: Flight) -> None:
        """Let no further call join ``flight``."""
        for key in flight.keys:
            if self._flights.get((flight.context, key)) is flight:
                del self._flights[flight.context, key]

    async def _leave(self, flights: set[Flight]) -> None:
        """Stop waiting for ``flights``, and cancel those that no call waits for."""
        empty: list[asyncio.Task[dict[bytes, CachedResult]]] = []
        for flight in flights:
            flight.waiting -= 1
            if flight.waiting == 0 and flight.task is not None:
                self._close(flight)
                flight.task.cancel()
                empty.append(flight.task)
        for task in empty:
            # Its error has been raised already, or no call waits for it.
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def _result_of(flight: Flight) -> dict[bytes, CachedResult]:
    assert flight.task is not None
    return flight.task.result()


def _encoded(result: RewardResult) -> bytes | None:
    """The stored form of a reward; None: the result is not stored."""
    if not isinstance(result, Scored):
        return None
    numbers = (result.reward, *result.components.values())
    if not all(map(math.isfinite, numbers)):
        return None
    return orjson.dumps([result.reward, dict(result.components), result.feedback])


def _decoded(value: bytes) -> Scored | None:
    """The reward of a stored value; None: the value is invalid."""
    try:
        reward, components, feedback = orjson.loads(value)
        return Scored(reward, components, feedback)
    except ValueError:
        return None


@dataclass(frozen=True)
class CachePlace:
    """Where the rewards of a job are cached."""

    job: Path | None
    """Folder of the job's own cache; None: in memory."""
    endpoints: Path | None = None
    """Parent folder of caches shared by jobs, one per registered endpoint; None: not shared."""
    max_bytes: int = MAX_BYTES
    """Limit of each file."""


@dataclass(slots=True)
class Caches:
    """The caches of a scorer's components; those with the same folder share a store."""

    place: CachePlace
    stores: dict[Path | None, CacheStore] = field(default_factory=dict)

    def of(self, component: RewardComponent, access: ComponentAccess | None) -> ResultCache | None:
        """The cache of an http component; None: every sample is sent."""
        options = component.cache
        is_deterministic = access is not None and access.is_deterministic
        if not (is_deterministic if options.enabled == "auto" else options.enabled):
            return None
        folder = self.place.job
        shared = self.place.endpoints
        if options.scope == "endpoint" and access is not None and access.endpoint_id and shared:
            folder = shared / f"endpoint-{access.endpoint_id}"
        if folder not in self.stores:
            self.stores[folder] = CacheStore(folder, max_bytes=self.place.max_bytes)
        return ResultCache(
            self.stores[folder], SampleKey.of(component, access), ttl_seconds=options.ttl_seconds
        )
