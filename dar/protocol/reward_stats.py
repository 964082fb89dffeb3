"""Statistics of reward services: reported by trainers, shown by the API."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from dar.protocol.base import Count, Input, NonNegative, Number, Output, UnixSeconds
from dar.protocol.reward_spec import COMPONENT_NAME

Family = Literal[
    "timeout", "connect", "tls", "dns", "http_4xx", "http_429", "http_5xx", "contract", "nonfinite", "length", "egress",
    "callback_late", "other",
]  # fmt: skip
"""Classes of failure: few and fixed, as they become names of metrics and labels."""
FAMILIES: tuple[Family, ...] = get_args(Family)

REQUEST_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper bounds of the buckets of request times; a last bucket holds longer ones."""
MAX_FAILURES = 64
"""Failed requests listed in one report; all are counted."""

ComponentName = Annotated[str, Field(pattern=COMPONENT_NAME)]
RequestOutcome = Literal["ok"] | Family


class ComponentRequests(Input):
    """Finished requests of one component and outcome since the last report."""

    component: ComponentName
    outcome: RequestOutcome
    samples: Count
    """Samples in these requests."""
    retries: Count
    """Attempts after the first of each request."""
    buckets: Annotated[
        list[Count], Field(min_length=len(REQUEST_SECONDS) + 1, max_length=len(REQUEST_SECONDS) + 1)
    ]
    """Requests by duration, over all attempts: up to each of `REQUEST_SECONDS`, and longer."""
    seconds: NonNegative
    """Total duration."""
    queued_seconds: NonNegative
    """Total wait before the first attempt."""

    @property
    def count(self) -> int:
        """Number of requests."""
        return sum(self.buckets)


class FailedRequest(Input):
    """A failed request."""

    component: ComponentName
    request_id: Annotated[str, Field(max_length=64)]
    code: Annotated[str, Field(max_length=64)]
    """Like ``timeout``, ``http_503`` or ``contract.length``."""
    family: Family
    status: Annotated[int, Field(ge=100, le=999)] | None
    attempts: Number
    samples: Count
    seconds: NonNegative
    quote: Annotated[str, Field(max_length=512)] = ""
    """Start of the answer, without secrets."""


class RewardFailure(Output):
    """A failed request to a reward service, as shown by the API."""

    id: str
    object: Literal["fine_tuning.job.reward_failure"]
    request_id: str
    """Its ``webhook-id``, the same on every attempt."""
    created_at: UnixSeconds
    step: int
    """Step of the report with the failure: that of the samples, or the next that was reported."""
    attempt: int
    """Number of the job's attempt that sent it."""
    rewound: bool = False
    """Whether the step is after the checkpoint from which a later attempt started, or with which
    the job has ended."""
    component: str
    code: str
    error_class: str
    """One of ``timeout``, ``connect``, ``tls``, ``dns``, ``http_4xx``, ``http_429``, ``http_5xx``,
    ``contract``, ``nonfinite``, ``length``, ``egress``, ``callback_late``, ``other``."""
    status: int | None
    """HTTP status; null: no answer arrived."""
    attempts: int
    samples: int
    latency_seconds: float
    """Duration of all attempts and the waits between them."""
    quote: str
    """Start of the answer, without secrets."""


class ComponentStats(Output):
    """Statistics of a component's reward service."""

    component: str
    requests: int
    failed_requests: int
    retries: int
    cached: int
    """Completions that were not sent: in the cache, or equal to another one of the step."""
    cache_hits: int
    """Completions with a cached reward."""
    p50_seconds: float | None
    """Median request time of the newest step with requests."""
    p95_seconds: float | None


class RewardStats(Output):
    """Statistics of a job's rewards over all steps; a repeated step counts once.

    A step in which an attempt ended, as when failures pause the job, counts until it is repeated.
    """

    object: Literal["fine_tuning.job.reward_stats"]
    job_id: str
    steps: int
    """Reported steps."""
    rewards: int
    """Samples with a reward."""
    skips: int
    errors: int
    """Samples that could not be scored."""
    errors_by_class: dict[str, int]
    dropped_groups: int
    refilled_groups: int
    components: list[ComponentStats]
