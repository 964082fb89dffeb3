"""Rewards that need not be asked for: remembered ones, and those of samples that are equal to another one of the step.

    HttpReward.score -> ResultCache.score -> (what is left) -> requests

An equal sample is one that the service could not tell from another but by what says nothing about it: ids, place in its group, job and
step. Where equal samples come together one of them travels, and all get its result. Only rewards are remembered: a skip or a failure
says what was the case when it was asked.
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

Ask = Callable[[Sequence[RewardSample], RewardContext], Awaitable[list[RewardResult]]]
NATIVE = "dar.reward.v1"
_SORTED = orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY


class SampleKey:
    """What tells samples apart for a reward service.

    Args:
        asked: Everything else that a reward depends on, as JSON: the service, its revision, and how it is spoken to.
        columns: Columns of the row that are sent beside ``ground_truth``.
        sends_text: Whether the service may get a conversation as the text that the policy saw.
        sends_ids: Whether the service gets the completion's tokens.
    """

    def __init__(
        self,
        asked: Mapping[str, Any],
        columns: Sequence[str] | None = None,
        *,
        sends_text: bool = False,
        sends_ids: bool = False,
    ) -> None:
        self._prefix = hashlib.sha256(_bytes_of(asked) + b"\n")
        self._columns = tuple(columns or ())
        self._sends_text = sends_text
        self._sends_ids = sends_ids

    @classmethod
    def of(cls, component: RewardComponent, access: ComponentAccess | None) -> "SampleKey":
        """The keys of an http component.

        Args:
            component: As a job spec describes it.
            access: How its registered endpoint is reached; None for an inline URL.
        """
        asked = {
            "endpoint": component.url if access is None else access.endpoint_id or access.url,
            "revision": 0 if access is None else access.revision,
            "component": component.name,  # a service is told it, and may go by it
            **component.model_dump(
                mode="json",
                include={
                    *("protocol", "template", "pointer", "grader", "coerce", "prompt_format"),
                    *("columns", "require_signed_responses"),
                },
            ),
        }
        return cls(
            asked,
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
            # Both are sent, and a service may well take off something for a completion that was cut off.
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
class Known:
    """A result, and where it comes from."""

    result: RewardResult
    is_remembered: bool
    """Whether it was known before its sample came."""


@dataclass(slots=True, eq=False)
class Flight:
    """The samples of one call that are asked for together, on behalf of all calls that have equal ones."""

    context: RewardContext
    keys: tuple[bytes, ...] = ()
    """Of its samples."""
    task: "asyncio.Task[dict[bytes, Known]] | None" = None
    waiting: int = 0
    """Calls that wait for it."""


@dataclass(frozen=True, slots=True)
class Spared:
    """Samples of one call that were not sent."""

    hits: int
    """Remembered from before."""
    copies: int
    """Equal to another one that was sent."""


class ResultCache:
    """Results of one component. Belongs to the event loop that uses it.

    Args:
        store: Remembers rewards.
        key: Tells samples apart.
        ttl_seconds: How long a reward is remembered.
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
        ask: Ask,
        tell: Callable[[Spared], None],
    ) -> list[RewardResult]:
        """The results of ``samples``, in order; asks only for what nobody knows or has asked for in this step.

        A call that is cancelled takes nothing from others that wait for the same sample; what nobody waits for any more is
        cancelled with it.

        Args:
            samples: To be scored.
            context: What they have in common; samples of one context are of one step.
            ask: Gets the results of those that are left.
            tell: Is told how many were not sent.

        Raises:
            RewardMisconfiguredError: What ``ask`` raised, here and in all calls that wait for it.
        """
        keys = [self._key(sample) for sample in samples]
        first: dict[bytes, RewardSample] = {}
        for key, sample in zip(keys, samples, strict=True):
            first.setdefault(key, sample)
        own = Flight(context)
        boarded = {key: self._flights.setdefault((context, key), own) for key in first}
        led = {key: first[key] for key, flight in boarded.items() if flight is own}
        if led:
            own.keys = tuple(led)
            own.task = asyncio.create_task(self._fly(own, led, ask))
        flights = set(boarded.values())
        for flight in flights:
            flight.waiting += 1
        try:
            await _all_or_first_error(flights)
        finally:
            await self._leave(flights)
        known = {key: _landed(flight)[key] for key, flight in boarded.items()}
        hits = sum(known[key].is_remembered for key in keys)
        sent = sum(not known[key].is_remembered for key in led)
        if hits or len(keys) > sent:
            tell(Spared(hits, len(keys) - hits - sent))
        return [known[key].result for key in keys]

    async def aclose(self) -> None:
        """Write what is to be remembered."""
        await self._store.aclose()

    async def _fly(
        self, flight: Flight, led: Mapping[bytes, RewardSample], ask: Ask
    ) -> dict[bytes, Known]:
        try:
            stored = await self._store.get(list(led), self._ttl_seconds)
            remembered = {key: _decoded(value) for key, value in stored.items()}
            known = {
                key: Known(result, is_remembered=True)
                for key, result in remembered.items()
                if result is not None
            }
            asked = {key: sample for key, sample in led.items() if key not in known}
            if asked:
                results = await ask(list(asked.values()), flight.context)
                fresh = dict(zip(asked, results, strict=True))
                encoded = {key: _encoded(result) for key, result in fresh.items()}
                self._store.put({k: value for k, value in encoded.items() if value is not None})
                known |= {key: Known(one, is_remembered=False) for key, one in fresh.items()}
            return known
        finally:
            self._close(flight)

    def _close(self, flight: Flight) -> None:
        """Nobody can board ``flight`` any more."""
        for key in flight.keys:
            if self._flights.get((flight.context, key)) is flight:
                del self._flights[flight.context, key]

    async def _leave(self, flights: set[Flight]) -> None:
        """Wait for ``flights`` no longer; those that nobody waits for end here."""
        empty: list[asyncio.Task[dict[bytes, Known]]] = []
        for flight in flights:
            flight.waiting -= 1
            if flight.waiting == 0 and flight.task is not None:
                self._close(flight)
                flight.task.cancel()
                empty.append(flight.task)
        for task in empty:
            # Its error has come out already, or belongs to nobody any more.
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def _landed(flight: Flight) -> dict[bytes, Known]:
    assert flight.task is not None
    return flight.task.result()


async def _all_or_first_error(flights: set[Flight]) -> None:
    tasks = [flight.task for flight in flights if flight.task is not None]
    if not tasks:
        return
    # Unlike awaiting them, this does not cancel them with us.
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        if task.done():
            task.result()


def _encoded(result: RewardResult) -> bytes | None:
    """A reward as it is stored; None: it is not to be stored."""
    if not isinstance(result, Scored):
        return None
    numbers = (result.reward, *result.components.values())
    if not all(map(math.isfinite, numbers)):
        return None
    return orjson.dumps([result.reward, dict(result.components), result.feedback])


def _decoded(value: bytes) -> Scored | None:
    """A stored reward; None: it is none."""
    try:
        reward, components, feedback = orjson.loads(value)
        return Scored(reward, components, feedback)
    except ValueError:
        return None


@dataclass(frozen=True)
class CachePlace:
    """Where the rewards of a job are remembered."""

    job: Path | None
    """Folder of what the job alone remembers; None: in memory."""
    endpoints: Path | None = None
    """Folder of what jobs with the same registered endpoint share, one folder for each; None: as for the job."""
    max_bytes: int = MAX_BYTES
    """Of each file."""


@dataclass(slots=True)
class Caches:
    """The caches of a scorer's components: those that remember at one place share a store."""

    place: CachePlace
    stores: dict[Path | None, CacheStore] = field(default_factory=dict)

    def of(
        self, component: RewardComponent, access: ComponentAccess | None
    ) -> "ResultCache | None":
        """The cache of an http component; None: every sample of it is sent."""
        options = component.cache
        is_known_to_repeat = access is not None and access.is_deterministic
        if not (is_known_to_repeat if options.enabled == "auto" else options.enabled):
            return None
        folder = self.place.job
        shared = self.place.endpoints
        if options.scope == "endpoint" and access is not None and access.endpoint_id and shared:
            folder = shared / f"endpoint-{access.endpoint_id}"
        if folder not in self.stores:
            self.stores[folder] = CacheStore(folder, max_bytes=self.place.max_bytes)
        return ResultCache(
            self.stores[folder],
            SampleKey.of(component, access),
            ttl_seconds=options.ttl_seconds,
        )
