"""Prometheus metrics of this process: what workers reported since it started, and jobs by status.

Labels of counters have a few fixed values. Job ids and component names are unbounded, so they would
make the number of series grow without limit; the numbers of one job are in its metrics and in
``reward_stats``. Each replica counts what was reported to it, so sums over replicas are correct.

Gauges of a job exist only while it runs. They are labelled with job and component, and come from
the newest stored report, which is the same in every replica.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from dar.protocol.metrics import current_values
from dar.protocol.reward_stats import FAMILIES, REQUEST_SECONDS, ComponentRequests
from dar.protocol.status import JOB_STATUSES
from dar.protocol.worker import EventRow, FailureOwner, MetricsRow, RewardsRow, Row
from dar.protocol.workers import WORKER_STATES
from dar.version import __version__
from service.artifacts import Room
from service.store.leases import QueueState
from service.store.workers import Fleet

OUTCOMES = ("ok", *FAMILIES)
CALLBACK_OUTCOMES = (
    "accepted", "duplicate", "conflict", "late", "closed", "burned", "invalid", "refused", "unsupported", "too_large",
)  # fmt: skip
"""Those of `service.store.reward_requests.CallbackOutcome` except ``replayed``, which counts as
``refused``, and those that are refused before."""
BREAKER_STATES = ("closed", "half_open", "open", "misconfigured")
RESULTS: Mapping[str, str] = {
    "reward_requests/n_valid": "ok",
    "reward_requests/n_skip": "skip",
    "reward_requests/n_error": "error",
}
"""Metric of a step -> label of its samples."""
GAUGES: Mapping[str, tuple[str, str]] = {
    "in_flight": (
        "dar_reward_inflight",
        "Maximum of concurrent requests to a reward service, in the last step of a running job.",
    ),
    "concurrency": (
        "dar_reward_concurrency_limit",
        "Limit of concurrent requests to a reward service.",
    ),
    "breaker": (
        "dar_reward_breaker_state",
        "Circuit breaker of a reward service: 0 closed, 1 half-open, 2 open, 3 misconfigured.",
    ),
}
"""Last part of the metric ``reward_requests/<component>/<last part>`` -> name and meaning of the
gauge."""
MAX_JOBS = 500
"""Maximum number of running jobs with gauges."""
SHARES: Mapping[str, str] = {
    "rewards/fallback_fraction": "fallback",
    "rewards/zeroed_fraction": "zeroed",
}
"""Metric that is a share of a step's samples -> total that counts those samples."""
Counts = Callable[[], Mapping[str, int]]
CountWorkers = Callable[[], tuple[Fleet, Mapping[str, int]]]
RunningValues = Callable[[], Mapping[str, Mapping[str, float | None]]]
CACHED = "cached"
STATUSES = ("2xx", "3xx", "4xx", "5xx")


class Telemetry(Collector):
    """Counts what workers report. Thread-safe.

    Args:
        count_jobs: Called at each scrape; returns the number of jobs by status.
        running_values: Called at each scrape; returns the newest metrics of running jobs, by job.
        count_workers: Called at each scrape; returns the workers in numbers, and failures by owner.
        room: Called at each scrape; returns the room of the artifact store; None: it has no volume.
        queue: Called at each scrape; returns how long jobs wait, and the leases.
        readers: Called at each scrape; returns how many streams and long polls are open here.
    """

    def __init__(
        self,
        count_jobs: Counts,
        running_values: RunningValues,
        count_workers: CountWorkers,
        room: Callable[[], Room | None],
        queue: Callable[[], QueueState],
        readers: Callable[[], int],
    ) -> None:
        self._count_jobs = count_jobs
        self._count_workers = count_workers
        self._running_values = running_values
        self._room = room
        self._queue = queue
        self._readers = readers
        self._requests: Counter[str] = Counter()
        self._request_seconds = 0.0
        self._lock = threading.Lock()
        self._buckets = {outcome: [0] * (len(REQUEST_SECONDS) + 1) for outcome in OUTCOMES}
        self._seconds = dict.fromkeys(OUTCOMES, 0.0)
        self._queued = [0.0, 0.0]
        self._samples = dict.fromkeys((*RESULTS.values(), CACHED), 0.0)
        self._errors: dict[str, float] = dict.fromkeys(FAMILIES, 0.0)
        self._breakers = dict.fromkeys(BREAKER_STATES, 0.0)
        self._groups = {"rewards/dropped_groups": 0.0, "rewards/refilled_groups": 0.0}
        self._idle = {"reward": 0.0, "generation": 0.0}
        self._totals: Counter[str] = Counter()
        self._callbacks: Counter[str] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def take(self, rows: Sequence[Row]) -> None:
        """Count rows that were just stored."""
        with self._lock:
            for row in rows:
                if isinstance(row, RewardsRow):
                    for requests in row.requests:
                        self._take_requests(requests)
                    self._take_metrics(row.unfinished or {})
                elif isinstance(row, MetricsRow):
                    self._take_metrics(row.values)
                elif isinstance(row, EventRow):
                    state = (row.data or {}).get("state")
                    if (row.data or {}).get("kind") == "reward_breaker" and state in self._breakers:
                        self._breakers[str(state)] += 1

    def note(self, name: str) -> None:
        """Count a pause or a resume: ``reward_pauses`` or ``reward_resumes``."""
        with self._lock:
            self._totals[name] += 1

    def count_callback(self, outcome: str) -> None:
        """Count a callback of a reward service: one of `CALLBACK_OUTCOMES`."""
        with self._lock:
            self._callbacks[outcome] += 1

    def count_request(self, status: int, seconds: float) -> None:
        """Count a response of this process; of a stream, its time is that to its end."""
        with self._lock:
            self._requests[f"{status // 100}xx"] += 1
            self._request_seconds += seconds

    def _take_requests(self, found: ComponentRequests) -> None:
        buckets = self._buckets[found.outcome]
        for place, count in enumerate(found.buckets):
            buckets[place] += count
        self._seconds[found.outcome] += found.seconds
        self._queued[0] += found.count
        self._queued[1] += found.queued_seconds
        self._totals["retries"] += found.retries

    def _take_metrics(self, reported: Mapping[str, float | None]) -> None:
        values = current_values(reported)
        for name, result in RESULTS.items():
            self._samples[result] += values.get(name) or 0
        samples = sum(values.get(name) or 0 for name in RESULTS)
        for name, what in SHARES.items():
            self._totals[what] += round((values.get(name) or 0) * samples)
        for name, value in values.items():
            # Each component that caches rewards has one of each.
            if name.startswith("reward_requests/") and name.endswith(("/cached", "/cache_hits")):
                self._take_cached(name.rpartition("/")[2], value or 0)
        for family in FAMILIES:
            self._errors[family] += values.get(f"reward_requests/n_error/{family}") or 0
        for name in self._groups:
            self._groups[name] += values.get(name) or 0
        for cause in self._idle:
            self._idle[cause] += values.get(f"time/idle_{cause}_seconds") or 0

    def _take_cached(self, kind: str, count: float) -> None:
        if kind == CACHED:
            self._samples[CACHED] += count
        else:
            self._totals["cache_hits"] += int(count)

    def render(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: registering must not query the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        counts = self._count_jobs()
        jobs = GaugeMetricFamily("dar_jobs", "Jobs by status.", labels=["status"])
        for status in JOB_STATUSES:
            jobs.add_metric([status], counts.get(status, 0))
        yield jobs
        yield from self._worker_families()
        yield from self._storage()
        yield from self._queue_families()
        yield from self._process_families()
        yield from self._gauges()
        text = "Callbacks of reward services, by result."
        with self._lock:
            outcomes = {outcome: self._callbacks[outcome] for outcome in CALLBACK_OUTCOMES}
            yield _labelled("dar_reward_callback", text, "status", outcomes)
            yield from self._request_families()
            yield from self._sample_families()

    def _worker_families(self) -> Iterator[Metric]:
        fleet, failures = self._count_workers()
        states = GaugeMetricFamily("dar_workers", "Workers by state.", labels=["state"])
        for state in WORKER_STATES:
            states.add_metric([state], fleet.states.get(state, 0))
        yield states
        text = "1 for each worker that can run no job because of a fault of its own."
        failing = GaugeMetricFamily("dar_worker_failing", text, labels=["node", "slot", "code"])
        for labels in fleet.failing:
            failing.add_metric(labels, 1)
        yield failing
        text = "Failures of attempts of all stored jobs, by who can mend the cause."
        ended = GaugeMetricFamily("dar_attempts_failed", text, labels=["owner"])
        for owner in (*get_args(FailureOwner), "unknown"):
            ended.add_metric([owner], failures.get(owner, 0))
        yield ended

    def _storage(self) -> Iterator[Metric]:
        room = self._room()
        if room is None:
            return
        for name, text, value in (
            ("free", "Free bytes on the volume of the artifact store.", room.free),
            ("total", "Size of the volume of the artifact store in bytes.", room.total),
            ("reserved", "Bytes that uploads leave free on that volume.", room.reserved),
        ):
            yield GaugeMetricFamily(f"dar_storage_{name}_bytes", text, value=value)

    def _queue_families(self) -> Iterator[Metric]:
        state = self._queue()
        text = "Seconds that the oldest job has waited that a worker may claim; 0 without one."
        yield GaugeMetricFamily("dar_queue_age_seconds", text, value=state.oldest_seconds)
        yield GaugeMetricFamily("dar_leases", "Leases of running attempts.", value=state.leases)
        text = "Seconds until the first lease ends unless it is renewed; NaN without a lease."
        left = math.nan if state.lease_seconds is None else state.lease_seconds
        yield GaugeMetricFamily("dar_lease_seconds", text, value=left)

    def _process_families(self) -> Iterator[Metric]:
        """What differs between replicas: a scrape adds the instance."""
        info = GaugeMetricFamily("dar_build_info", "1, with the version.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        text = "Streams and long polls that are open in this process."
        yield GaugeMetricFamily("dar_stream_readers", text, value=self._readers())
        with self._lock:
            counts = {kind: float(self._requests[kind]) for kind in STATUSES}
            seconds = self._request_seconds
        text = "Responses of this process by class of status."
        yield _labelled("dar_http_responses", text, "status", counts)
        text = "Seconds from the requests to the ends of these responses."
        yield _counter("dar_http_response_seconds", text, seconds)

    def _gauges(self) -> Iterator[Metric]:
        running = self._running_values()
        for last, (name, text) in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["job", "component"])
            for job_id, values in running.items():
                for metric, value in values.items():
                    prefix, _, rest = metric.partition("/")
                    component, _, what = rest.partition("/")
                    if prefix == "reward_requests" and what == last and value is not None:
                        gauge.add_metric([job_id, component], value)
            yield gauge

    def _request_families(self) -> Iterator[Metric]:
        seconds = HistogramMetricFamily(
            "dar_reward_request_seconds",
            "Time of a finished request to a reward service, over all its attempts.",
            labels=["outcome"],
        )
        for outcome in OUTCOMES:
            seconds.add_metric(
                [outcome], _cumulative(self._buckets[outcome]), self._seconds[outcome]
            )
        yield seconds
        queued = "Seconds that finished requests waited before they were sent."
        yield _counter("dar_reward_queue_seconds", queued, self._queued[1])
        retries = "Attempts beyond the first of each request."
        yield _counter("dar_reward_retries", retries, self._totals["retries"])
        breakers = "Changes of circuit breakers into each state."
        yield _labelled("dar_reward_breaker_changes", breakers, "state", self._breakers)

    def _sample_families(self) -> Iterator[Metric]:
        totals = self._totals
        yield _labelled("dar_reward_samples", "Samples by result.", "result", self._samples)
        hits = "Samples whose reward was cached before the step, once for each component."
        yield _counter("dar_reward_cache_hits", hits, totals["cache_hits"])
        errors = "Samples that could not be scored, by class of failure."
        yield _labelled("dar_reward_errors", errors, "class", self._errors)
        fallback = "Samples that could not be scored and count with their job's fallback_value."
        yield _counter("dar_reward_fallback", fallback, totals["fallback"])
        zeroed = "Samples that a component skipped, and that count it as 0."
        yield _counter("dar_reward_zeroed", zeroed, totals["zeroed"])
        dropped = "Groups without enough scored samples to learn from."
        yield _counter("dar_reward_groups_dropped", dropped, self._groups["rewards/dropped_groups"])
        refilled = "Groups sampled to replace those without enough scored samples."
        yield _counter(
            "dar_reward_groups_refilled", refilled, self._groups["rewards/refilled_groups"]
        )
        idle = "Seconds in which trainers waited for rewards, or for each other's samples."
        yield _labelled("dar_trainer_idle_seconds", idle, "cause", self._idle)
        pauses = "Jobs paused because they got too few rewards."
        yield _counter("dar_reward_pauses", pauses, totals["reward_pauses"])
        resumes = "Paused jobs that resumed automatically because rewards were available again."
        yield _counter("dar_reward_resumes", resumes, totals["reward_resumes"])


def _cumulative(counts: Sequence[int]) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in REQUEST_SECONDS), "+Inf"]
    total, buckets = 0, []
    for bound, count in zip(bounds, counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _labelled(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
