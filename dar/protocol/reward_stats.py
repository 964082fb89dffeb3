"""How reward services did: what a trainer reports of its requests, and what the API shows of it."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from dar.protocol.base import Count, Input, NonNegative, Number, Output, UnixSeconds
from dar.protocol.reward_spec import COMPONENT_NAME

Family = Literal[
    "timeout", "connect", "tls", "dns", "http_4xx", "http_429", "http_5xx", "contract", "nonfinite", "length", "egress",
    "callback_late", "other",
]  # fmt: skip
"""Classes of failure: few and fixed, so that they can name metrics and label series."""
FAMILIES: tuple[Family, ...] = get_args(Family)

REQUEST_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper bounds of the buckets that request times are counted in; a last bucket holds what took longer."""
MAX_FAILURES = 64
"""Failed requests of one report that are told one by one; all are counted."""

ComponentName = Annotated[str, Field(pattern=COMPONENT_NAME)]
RequestOutcome = Literal["ok"] | Family


class ComponentRequests(Input):
    """The finished requests of one component and outcome since the last report."""

    component: ComponentName
    outcome: RequestOutcome
    samples: Count
    """In all of these requests."""
    retries: Count
    """Attempts beyond the first of each."""
    buckets: Annotated[
        list[Count],
        Field(min_length=len(REQUEST_SECONDS) + 1, max_length=len(REQUEST_SECONDS) + 1),
    ]
    """Requests by time, over all their attempts: up to each of `REQUEST_SECONDS`, and longer."""
    seconds: NonNegative
    """All their times together."""
    queued_seconds: NonNegative
    """What they waited before they were sent."""

    @property
    def count(self) -> int:
        """How many requests."""
        return sum(self.buckets)


class FailedRequest(Input):
    """A request that was given up."""

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
    """First bytes of what the service said, without secrets."""


class RewardFailure(Output):
    """A request to a reward service that was given up, as the API shows it."""

    id: str
    object: Literal["fine_tuning.job.reward_failure"]
    request_id: str
    """Its ``webhook-id``, the same on every attempt."""
    created_at: UnixSeconds
    step: int
    """Step of the report that told of it: the one that the samples were for, or the next that was reported."""
    attempt: int
    """Which execution of the job sent it."""
    component: str
    code: str
    error_class: str
    """One of ``timeout``, ``connect``, ``tls``, ``dns``, ``http_4xx``, ``http_429``, ``http_5xx``, ``contract``, ``nonfinite``,
    ``length``, ``egress``, ``callback_late``, ``other``."""
    status: int | None
    """HTTP status; null where no answer came."""
    attempts: int
    samples: int
    latency_seconds: float
    """Over all attempts and the waits between them."""
    quote: str
    """First bytes of what the service said, without secrets."""


class ComponentStats(Output):
    """How the reward service of a component did."""

    component: str
    requests: int
    failed_requests: int
    retries: int
    cached: int
    """Completions that the service was not asked about: remembered, or equal to another one of the step."""
    cache_hits: int
    """Those that were remembered from before."""
    p50_seconds: float | None
    """Median request time of the newest step that had requests."""
    p95_seconds: float | None


class RewardStats(Output):
    """How the rewards of a job came, over all its steps; a step that was made twice counts once."""

    object: Literal["fine_tuning.job.reward_stats"]
    job_id: str
    steps: int
    """Steps that were reported."""
    rewards: int
    """Samples with a reward."""
    skips: int
    errors: int
    """Samples that could not be scored."""
    errors_by_class: dict[str, int]
    dropped_groups: int
    refilled_groups: int
    components: list[ComponentStats]
