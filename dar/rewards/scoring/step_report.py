"""`StepObserver`: requests to reward services, summed up per step.

It turns records of requests into metrics and rows for the service. The first failure of each class
and every change of a circuit breaker become events at once.
"""

import itertools
import math
import statistics
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dar.protocol.events import Level
from dar.protocol.reward_stats import (
    MAX_FAILURES,
    REQUEST_SECONDS,
    ComponentRequests,
    FailedRequest,
    RequestOutcome,
)
from dar.rewards.base import RequestRecord, SampleReward
from dar.rewards.scoring.failures import code_of, family_of

Span = tuple[float, float]
Emit = Callable[[Level, str, Mapping[str, Any] | None], None]
BREAKER_STATES: Mapping[str, int] = {"closed": 0, "half_open": 1, "open": 2, "misconfigured": 3}
QUOTED_CHARACTERS = 512


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request with its last attempt."""

    record: RequestRecord
    seconds: float
    """Duration of all attempts, without the waits between them."""

    @property
    def retries(self) -> int:
        """Attempts beyond the first."""
        return max(0, self.record.attempt - 1)


@dataclass(frozen=True, slots=True)
class StepRequests:
    """Requests since the last report."""

    requests: Sequence[ComponentRequests] = ()
    failures: Sequence[FailedRequest] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Values by metric name."""


class StepObserver:
    """A `dar.rewards.base.RewardObserver` that sums up; thread-safe.

    Args:
        emit: Receives events.
        on_wait: Called with a message whenever a request waits.
        concurrency: Limit of requests in flight, by component.
    """

    def __init__(
        self,
        emit: Emit,
        on_wait: Callable[[str], None] | None = None,
        *,
        concurrency: Mapping[str, int] | None = None,
    ) -> None:
        self._emit = emit
        self._on_wait = on_wait
        self._concurrency = dict(concurrency or {})
        self._lock = threading.Lock()
        self._requests: list[FinishedRequest] = []
        self._seconds: dict[str, float] = {}
        """Duration of the attempts so far, of unfinished requests."""
        self._reported: set[tuple[str, str]] = set()
        self._breakers = dict.fromkeys(self._concurrency, "closed")
        self._spans: defaultdict[str, list[Span]] = defaultdict(list)
        """Start and end of attempts in flight on the monotonic clock, by component."""
        self._unsent: Counter[str] = Counter()
        """Samples that were not sent, by metric name."""
        self._scored: defaultdict[int, Counter[str]] = defaultdict(Counter)
        """Samples of steps that are not reported yet, by metric name."""

    def request_done(self, record: RequestRecord) -> None:
        """Count an attempt; the first failure of each class becomes an event, final or not."""
        is_new = False
        now = time.monotonic()
        with self._lock:
            start, until_202 = now - record.seconds, record.in_flight_seconds
            end = now if until_202 is None else start + until_202
            self._spans[record.component].append((start, end))
            seconds = self._seconds.pop(record.request_id, 0.0) + record.seconds
            if record.is_final:
                self._requests.append(FinishedRequest(record, seconds))
            else:
                self._seconds[record.request_id] = seconds
            if record.outcome != "ok":
                kind = (record.component, family_of(record.outcome))
                is_new = kind not in self._reported
                self._reported.add(kind)
        if is_new:
            self._emit_failure(record)

    def not_sent(self, component: str, hits: int, copies: int) -> None:
        """See `RewardObserver`."""
        with self._lock:
            self._unsent[f"reward_requests/{component}/cached"] += hits + copies
            self._unsent[f"reward_requests/{component}/cache_hits"] += hits

    def breaker_changed(self, component: str, state: str, reason: str) -> None:
        """Emit an event for a change of state."""
        with self._lock:
            if self._breakers.get(component, "closed") == state:
                return
            self._breakers[component] = state
        data = {"kind": "reward_breaker", "component": component, "state": state, "reason": reason}
        level: Level = "info" if state == "closed" else "warn"
        words = {
            "closed": "answers again; requests continue",
            "open": "fails too often; requests wait",
            "half_open": "is tried with one request",
            "misconfigured": "rejects all requests",
        }
        because = f" ({reason})" if reason else ""
        self._emit(level, f"reward component {component} {words.get(state, state)}{because}", data)

    def scored(self, step: int, rewards: Sequence[SampleReward]) -> None:
        """See `RewardObserver`."""
        with self._lock:
            self._scored[step].update(_sample_counts(rewards))

    def end_step(self, step: int) -> None:
        """Forget the samples of the steps up to ``step``, whose metrics are reported."""
        with self._lock:
            for known in [known for known in self._scored if known <= step]:
                del self._scored[known]

    def take_unfinished(self) -> tuple[StepRequests, dict[str, float]]:
        """The counts since the last call of `take`, for a step that has no metrics.

        Returns:
            The requests, and metrics by name, among them the samples of all steps that have not
            ended. Where a service's rejection ended the run before any sample was counted, those in
            failed requests count as failed.
        """
        found = self.take()
        with self._lock:
            samples = sum(self._scored.values(), Counter())
            self._scored.clear()
        if not samples:
            for one in found.requests:
                if one.outcome != "ok":
                    samples["reward_requests/n_error"] += one.samples
                    samples[f"reward_requests/n_error/{one.outcome}"] += one.samples
        return found, {**found.metrics, **samples}

    def poll_ended(self, component: str, request_id: str, code: str, reason: str) -> None:
        """Emit an event, the first time for each class of failure."""
        kind = (component, f"poll {family_of(code)}")
        with self._lock:
            is_new = kind not in self._reported
            self._reported.add(kind)
        if is_new:
            data = {
                "kind": "reward_poll_ended",
                "component": component,
                "class": family_of(code),
                "code": code,
                "request_id": request_id,
            }
            self._emit(
                "warn",
                f"reward component {component}: polling for the result of request {request_id} "
                f"ended with {code}: {reason}; only its callback can bring the result now",
                data,
            )

    def waiting(self, component: str, message: str) -> None:
        """Show the message."""
        del component  # the message includes it
        if self._on_wait is not None:
            self._on_wait(message)

    def take(self) -> StepRequests:
        """The counts since the last call."""
        with self._lock:
            finished, self._requests = self._requests, []
            breakers = dict(self._breakers)
            spans, self._spans = self._spans, defaultdict(list)
            unsent, self._unsent = self._unsent, Counter()
        metrics = {**_metrics(finished, breakers), **unsent}
        for component, found in spans.items():
            metrics[f"reward_requests/{component}/in_flight"] = _most_at_once(found)
        for component, limit in self._concurrency.items():
            metrics[f"reward_requests/{component}/concurrency"] = limit
        failed = [one for one in finished if one.record.outcome != "ok"]
        return StepRequests(
            requests=_requests(finished),
            failures=list(map(_failure, failed[:MAX_FAILURES])),
            metrics=metrics,
        )

    def _emit_failure(self, record: RequestRecord) -> None:
        data = {
            "kind": "reward_error",
            "component": record.component,
            "class": family_of(record.outcome),
            "code": record.outcome,
            "status": record.status,
            "step": record.step,
            "request_id": record.request_id,
            "attempt": record.attempt,
            "samples": record.samples,
            "seconds": round(record.seconds, 3),
            "bytes_out": record.bytes_out,
            "bytes_in": record.bytes_in,
            "answer": record.quote[:QUOTED_CHARACTERS],
        }
        then = "not retried" if record.is_final else "retried"
        quote = f": {record.quote[:QUOTED_CHARACTERS]}" if record.quote else ""
        self._emit(
            "warn",
            f"reward component {record.component}: a request of {record.samples} samples failed with {record.outcome} and is "
            f"{then}{quote}; further failures of this class are only counted",
            data,
        )


def _requests(finished: Sequence[FinishedRequest]) -> list[ComponentRequests]:
    kinds: defaultdict[tuple[str, RequestOutcome], list[FinishedRequest]] = defaultdict(list)
    for one in finished:
        outcome: RequestOutcome = (
            "ok" if one.record.outcome == "ok" else family_of(one.record.outcome)
        )
        kinds[one.record.component, outcome].append(one)
    return [
        ComponentRequests(
            component=component,
            outcome=outcome,
            samples=sum(one.record.samples for one in found),
            retries=sum(one.retries for one in found),
            buckets=_buckets(found),
            seconds=sum(one.seconds for one in found),
            queued_seconds=sum(one.record.queued_seconds for one in found),
        )
        for (component, outcome), found in sorted(kinds.items())
    ]


def _buckets(finished: Sequence[FinishedRequest]) -> list[int]:
    counts = [0] * (len(REQUEST_SECONDS) + 1)
    for one in finished:
        counts[bisect_left(REQUEST_SECONDS, one.seconds)] += 1
    return counts


def _failure(finished: FinishedRequest) -> FailedRequest:
    record = finished.record
    return FailedRequest(
        component=record.component,
        request_id=record.request_id[:64],
        code=record.outcome[:64],
        family=family_of(record.outcome),
        status=record.status,
        attempts=max(1, record.attempt),
        samples=record.samples,
        seconds=finished.seconds,
        quote=record.quote[:QUOTED_CHARACTERS],
    )


def _metrics(finished: Sequence[FinishedRequest], breakers: Mapping[str, str]) -> dict[str, float]:
    values: dict[str, float] = {
        f"reward_requests/{component}/breaker": BREAKER_STATES.get(state, BREAKER_STATES["open"])
        for component, state in breakers.items()
    }
    by_component: defaultdict[str, list[FinishedRequest]] = defaultdict(list)
    for one in finished:
        by_component[one.record.component].append(one)
    for component, found in by_component.items():
        seconds = sorted(one.seconds for one in found)
        values |= {
            f"reward_requests/{component}/requests": len(found),
            f"reward_requests/{component}/failed_requests": sum(
                one.record.outcome != "ok" for one in found
            ),
            f"reward_requests/{component}/retries": sum(one.retries for one in found),
            f"reward_requests/{component}/p50_seconds": quantile(seconds, 0.5),
            f"reward_requests/{component}/p95_seconds": quantile(seconds, 0.95),
        }
    return values


def _most_at_once(spans: Sequence[Span]) -> int:
    # An end sorts before a start at the same moment, as -1 < 1.
    edges = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    return max(itertools.accumulate(change for _, change in edges), default=0)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of the values do not exceed. ``values`` is not empty."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def sample_metrics(rewards: Sequence[SampleReward]) -> dict[str, float]:
    """Counts of scored, skipped and failed samples, and statistics of raw rewards."""
    values: dict[str, float] = dict(_sample_counts(rewards))
    for name, found in component_rewards(rewards).items():
        values[f"rewards/{name}/missing_fraction"] = (len(rewards) - len(found)) / len(rewards)
        if not found:
            continue
        values |= {
            f"rewards/{name}/mean": sum(found) / len(found),
            f"rewards/{name}/std": statistics.pstdev(found),
            f"rewards/{name}/min": min(found),
            f"rewards/{name}/max": max(found),
        }
    return values


def _sample_counts(rewards: Sequence[SampleReward]) -> dict[str, int]:
    statuses = Counter(reward.status for reward in rewards)
    families = Counter(family_of(code_of(reward)) for reward in rewards if reward.status == "error")
    return {
        "reward_requests/n_valid": statuses["reward"],
        "reward_requests/n_skip": statuses["skip"],
        "reward_requests/n_error": statuses["error"],
        **{f"reward_requests/n_error/{family}": count for family, count in families.items()},
    }


def component_rewards(rewards: Sequence[SampleReward]) -> dict[str, list[float]]:
    """Raw rewards of each component, without missing ones."""
    components: defaultdict[str, list[float]] = defaultdict(list)
    for reward in rewards:
        for name, value in reward.components.items():
            if "/" not in name:  # parts are for viewing only
                components[name] += [] if value is None else [value]
    return dict(components)
