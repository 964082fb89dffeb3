"""What workers and the service say to each other: leases, directives, batches, checkpoints, outcomes."""

from typing import Annotated, Any, Literal

from pydantic import Field

from dar.protocol.base import Count, Input, Instant, Number, Output
from dar.protocol.checkpoints import SHA256, Manifest
from dar.protocol.events import Level
from dar.protocol.reward_stats import MAX_FAILURES, ComponentRequests, FailedRequest
from dar.protocol.rewards import MAX_SAMPLES, Identifier
from dar.protocol.samples import ReportedSample
from dar.protocol.spec import JobSpec

Name = Annotated[str, Field(min_length=1, max_length=128)]
Phase = Literal[
    "starting", "sampling", "waiting_for_reward", "training", "evaluating", "checkpointing"
]
WAKE_TASK = "worker.wake"
"""Name of the Celery task that says «look for queued jobs»; it carries nothing."""
WAKE_QUEUE = "dar.wake"
FIRST_RESULT_ID = 1000
"""Directives that carry results are numbered from here, so that those of the job itself have room below."""


class Claim(Input):
    """A slot asks for a job."""

    node: Name
    slot: Name
    incarnation: Name
    """Changes with every start of the worker process: a new one frees what its predecessor held."""
    boot_id: Name
    """Changes with every start of the machine: a new one frees what the whole node held."""


REWARD_MODELS = "reward_models"
"""Inputs under this name are the files of reward models: ``reward_models/<component>/<file>``."""


class ModelSource(Output):
    """Where the weights of a job's model come from."""

    kind: Literal["folder", "hub"]
    name: str
    """Folder under the models directory, or hub id; empty for a model made of a full checkpoint."""
    checkpoint_id: str | None
    """A fine-tuned model with full weights: its files are the inputs ``model/…``."""
    adapter_ids: list[str]
    """Adapters to be merged in this order: their files are the inputs ``adapters/<n>/…``."""


class ComponentAccess(Output):
    """How a component's registered endpoint is reached; kept in memory only."""

    url: str
    secrets: Annotated[list[str], Field(repr=False)]
    """Sign its requests, the newest first."""
    headers: Annotated[dict[str, str], Field(repr=False)]
    """Secret headers, sent to this URL alone."""
    endpoint_id: str | None = None
    """None: not a registered one."""
    revision: int = 0
    """Of the endpoint; rewards that an earlier revision gave are not used."""
    is_deterministic: bool = False
    """Whether the last probe found, at this revision, that repeats and other orders change no reward."""


class Lease(Output):
    """A job given to a slot for a limited time; answer to a claim."""

    lease_id: str
    job_id: str
    attempt: int
    """Counts executions of the job; the fencing token of every write."""
    token: str
    """Bearer token of this attempt, valid for its job only."""
    ttl_seconds: float
    spec: JobSpec
    seed: int
    total_steps: int
    model: ModelSource
    resume_checkpoint_id: str | None
    reward_secret: str | None
    """Signs requests to inline reward URLs; kept in memory only."""
    rewards: dict[str, ComponentAccess] = Field(default_factory=dict)
    """By component, for those that name a registered endpoint."""


class InputFile(Output):
    """A file that an attempt needs."""

    name: str
    """``training_file``, ``validation_file``, ``model/<file>``, ``adapters/<n>/<file>``, ``reward_models/<component>/<file>``
    or ``resume/<file>``."""
    bytes: int
    sha256: str


class Inputs(Output):
    """All files of an attempt."""

    files: list[InputFile]


class AttemptProgress(Input):
    """What an attempt does right now."""

    phase: Phase
    step: Count
    message: Annotated[str, Field(max_length=2000)] | None = None
    """What is waited for, and why."""


class Heartbeat(Input):
    """Renews a lease."""

    attempt: Number
    progress: AttemptProgress | None = None


class LeaseState(Output):
    """Answer to a heartbeat."""

    ttl_seconds: float


class Directive(Output):
    """Something the service wants of a running attempt."""

    id: int
    """1: cancel, 2: pause. From `FIRST_RESULT_ID` on: results of reward requests, in the order in which they came."""
    type: Literal["cancel", "pause", "reward_result"]
    request_id: str | None = None
    """reward_result: which request it answers."""
    result: str | None = None
    """reward_result: the body that the reward service sent."""


class Directives(Output):
    """Answer of the long poll."""

    directives: list[Directive]
    cursor: str
    """What was told so far: the ``after`` of the next poll."""


MOST_REWARD_REQUESTS = 64
"""Reward requests in one announcement, or notes in one report of progress."""


class RewardAnnouncement(Input):
    """A reward request that may be answered by a callback; announced before it is sent."""

    request_id: Identifier
    component: Name
    step: Count
    sample_ids: Annotated[list[Identifier], Field(min_length=1, max_length=MAX_SAMPLES)]
    """What a result must be about."""
    token_sha256: SHA256
    """Of the token that opens the callback."""
    deadline: Instant
    """No result is taken after it."""


class AnnounceRewardRequests(Input):
    """Requests that an attempt is about to send."""

    attempt: Number
    requests: Annotated[
        list[RewardAnnouncement], Field(min_length=1, max_length=MOST_REWARD_REQUESTS)
    ]


class RewardRequestState(Output):
    """A stored request, as the attempt that announced it should go on with it."""

    request_id: str
    callback_url: str
    deadline: float
    """Seconds since 1970; that of the first announcement, unless the request was begun anew since."""
    is_accepted: bool
    """The reward service has it already: wait for the result and do not send it again."""
    poll_url: str | None
    """Where the reward service said that the result can be fetched."""
    result: str | None
    """The body that the reward service sent, if it has already."""


class RewardRequestStates(Output):
    """Answer to an announcement, in its order."""

    requests: list[RewardRequestState]


class RewardProgress(Input):
    """What became of an announced request: the reward service took it (202), or answered it on another way."""

    request_id: Identifier
    state: Literal["accepted", "closed"]
    poll_url: Annotated[str, Field(max_length=2048)] | None = None


class NoteRewardProgress(Input):
    """What became of requests that an attempt announced, in the order in which it happened."""

    attempt: Number
    requests: Annotated[list[RewardProgress], Field(min_length=1, max_length=MOST_REWARD_REQUESTS)]


class RewardProgressNoted(Output):
    """Answer to a report of progress: all of it is noted but what concerns unknown requests."""

    unknown: list[str]
    """Ids of requests that the job has not announced, each once."""


class MetricsRow(Input):
    """The metrics of one step."""

    type: Literal["metrics"]
    seq: Number
    at: Instant
    step: Number
    values: dict[str, float | None]
    """By registered name; null stands for a value that is no number."""


class SamplesRow(Input):
    """Samples of one step."""

    type: Literal["samples"]
    seq: Number
    at: Instant
    step: Number
    samples: Annotated[list[ReportedSample], Field(min_length=1, max_length=256)]


class EventRow(Input):
    """Something worth telling the user."""

    type: Literal["event"]
    seq: Number
    at: Instant
    level: Level
    message: Annotated[str, Field(max_length=4000)]
    data: dict[str, Any] | None = None


class NewCheckpointRow(Input):
    """A checkpoint lies on the worker's disk; tells the supervisor to upload it."""

    type: Literal["checkpoint"]
    seq: Number
    at: Instant
    step: Count
    folder: Annotated[str, Field(max_length=200)]
    manifest_sha256: SHA256


class RewardsRow(Input):
    """The requests to reward services since the last one of these."""

    type: Literal["rewards"]
    seq: Number
    at: Instant
    step: Number
    """The step that was reported, or in which training ended."""
    requests: Annotated[list[ComponentRequests], Field(max_length=1024)]
    failures: Annotated[list[FailedRequest], Field(max_length=MAX_FAILURES)]


Row = Annotated[
    MetricsRow | SamplesRow | EventRow | NewCheckpointRow | RewardsRow, Field(discriminator="type")
]
"""One line of a spool; ``seq`` counts from 1 without gaps within an attempt."""


class Batch(Input):
    """Consecutive rows of one attempt."""

    attempt: Number
    rows: Annotated[list[Row], Field(max_length=500)]


class BatchAck(Output):
    """Answer to a batch."""

    acked_seq: int
    """Everything up to here is committed and need not be sent again."""


class RegisterCheckpoint(Input):
    """Announces a checkpoint before its files are uploaded."""

    attempt: Number
    manifest: Manifest
    manifest_sha256: SHA256


class CheckpointUpload(Output):
    """What the service has of a checkpoint so far."""

    checkpoint_id: str
    status: Literal["pending", "available"]
    received: dict[str, int]
    """Bytes received of each file; an upload goes on from there."""


class AttemptOf(Input):
    """Names the attempt that writes."""

    attempt: Number


class Complete(Input):
    """The attempt trained to the end."""

    attempt: Number
    last_seq: Count
    checkpoint_id: str


class Fail(Input):
    """The attempt ended badly."""

    attempt: Number
    kind: Literal["user", "transient"]
    """``user``: the spec or its data cannot work, so there is no retry. ``transient``: try again, with backoff."""
    code: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=8000)]
    param: str | None = None


class Release(Input):
    """The attempt gives its job back, or confirms a cancellation or a pause."""

    attempt: Number
    reason: Literal["drained", "waiting_for_reward", "cancelled", "paused", "paused_reward"]
    """``paused``: as the user asked. ``paused_reward``: too few rewards to go on with; ``message`` and ``code`` say why."""
    message: Annotated[str, Field(max_length=2000)] | None = None
    code: Annotated[str, Field(max_length=64)] | None = None
    is_outage: bool = False
    """``paused_reward``: whether the reward service may simply come back, so that it is worth looking soon."""


class Outcome(Output):
    """What became of the job after complete, fail or release."""

    status: str
    status_detail: str | None
