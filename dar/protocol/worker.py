"""Messages between workers and the service: leases, directives, batches, checkpoints, outcomes."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from dar.protocol.base import Count, Input, Instant, Number, Output
from dar.protocol.checkpoints import SHA256, FileName, Manifest
from dar.protocol.events import Level
from dar.protocol.reward_stats import MAX_FAILURES, ComponentRequests, FailedRequest
from dar.protocol.rewards import MAX_SAMPLES, Identifier
from dar.protocol.samples import ReportedSample
from dar.protocol.spec import JobSpec

Name = Annotated[str, Field(min_length=1, max_length=128)]
Phase = Literal[
    "starting",
    "calibrating",
    "sampling",
    "waiting_for_reward",
    "training",
    "evaluating",
    "checkpointing",
    "blocked: disk",
]
WAKE_TASK = "worker.wake"
"""Name of the Celery task that wakes a worker to claim a job; it has no arguments."""
WAKE_QUEUE = "dar.wake"
FIRST_RESULT_ID = 1000
"""First number of directives with results; lower numbers are directives to the job itself."""


NAME_TAKEN = "worker_name_taken"
"""Code of the error for a worker whose node and slot another worker has."""
FULL_CODES = frozenset(
    {"InsufficientStorage", "InsufficientCapacity", "QuotaExceeded", "XMinioStorageFull"}
)
"""What S3 stores answer if they are full."""
MOST_DEVICES = 256


MOST_MODELS = 1000
ModelName = Annotated[str, Field(min_length=1, max_length=256)]


class ModelInventory(Input):
    """Models that a worker has, so that it need not download them."""

    names: Annotated[list[ModelName], Field(max_length=MOST_MODELS)]
    """Folders under its models directory, and what its cache has: folders of the service, hub ids,
    and ids of checkpoints with full weights."""
    cache_bytes: Annotated[int, Field(ge=0)]
    """Size of the models in its cache."""
    cache_limit: Annotated[int, Field(ge=0)]
    """Largest size of its cache."""


class WorkerFault(Input):
    """Why a worker can run no job."""

    code: Annotated[str, Field(min_length=1, max_length=64)]
    message: Annotated[str, Field(max_length=2000)]


class WorkerReport(Input):
    """What a worker reports about itself and its machine."""

    version: Name
    machine: Name
    """A random name in the worker's folder: the same after every restart, another one on another
    machine."""
    devices: Annotated[list[Name], Field(max_length=MOST_DEVICES)]
    """Its GPUs; none: it uses the CPU."""
    disk_free: Annotated[int, Field(ge=0)]
    """Bytes in the file system of its folder."""
    disk_total: Annotated[int, Field(ge=0)]
    memory_free: Annotated[int, Field(ge=0)] | None
    """Bytes; null: not known."""
    interval_seconds: Annotated[float, Field(gt=0, le=86_400)]
    """Longest time until its next claim or heartbeat."""
    fault: WorkerFault | None = None
    """Why it can run no job; null: its self-check passes."""
    is_leaving: bool = False
    """Whether it stops now."""
    models: ModelInventory | None = None
    """Null: a worker of an earlier version."""


class Claim(Input):
    """Request of a slot for a job."""

    node: Name
    slot: Name
    incarnation: Name
    """Changes with every start of the worker process. A new one frees the leases of the previous
    one."""
    boot_id: Name
    """Changes with every start of the machine. A new one frees all leases of the node."""
    report: WorkerReport | None = None
    """Null: a worker of an earlier version."""
    wants_job: bool = True
    """False: it only reports."""


REWARD_MODELS = "reward_models"
"""Inputs under this name are the files of reward models: ``reward_models/<component>/<file>``."""


class ModelSource(Output):
    """The source of the weights of a job's model."""

    kind: Literal["folder", "hub"]
    name: str
    """Folder under the models directory, or hub id; empty for a model made of a full checkpoint."""
    checkpoint_id: str | None
    """A fine-tuned model with full weights; its files are the inputs ``model/…``."""
    adapter_ids: list[str]
    """Adapters to merge in this order; their files are the inputs ``adapters/<n>/…``."""
    revisions: dict[str, str] = Field(default_factory=dict)
    """Commits of the hub's models with which the job was begun, by hub id."""


class ComponentAccess(Output):
    """URL and secrets of a component's reward service; kept in memory only."""

    url: str
    secrets: Annotated[list[str], Field(repr=False)]
    """Secrets that sign its requests, the newest first."""
    headers: Annotated[dict[str, str], Field(repr=False)]
    """Secret headers, sent to this URL alone."""
    endpoint_id: str | None = None
    """None: it is not registered."""
    revision: int = 0
    """Revision of the endpoint. Cached rewards of earlier revisions are not used."""
    is_deterministic: bool = False
    """Whether the last probe of this revision found that repetition and order change no reward."""


class Lease(Output):
    """A job that a slot holds for a limited time; response to a claim."""

    lease_id: str
    job_id: str
    attempt: int
    """Number of the execution of the job; the fencing token of every write."""
    token: str
    """Bearer token of this attempt, valid only for its job."""
    ttl_seconds: float
    spec: JobSpec
    seed: int
    total_steps: int
    model: ModelSource
    resume_checkpoint_id: str | None
    reward_secret: str | None
    """Null: ``rewards`` has the secrets. A service of an earlier version sends its secret for all
    inline URLs."""
    rewards: dict[str, ComponentAccess] = Field(default_factory=dict)
    """Access to the reward services of this job, by component name."""
    request_id: str | None = None
    """Of the request that submitted the job, for logs."""


class InputFile(Output):
    """A file that an attempt needs."""

    name: str
    """``training_file``, ``validation_file``, ``model/<file>``, ``adapters/<n>/<file>``,
    ``reward_models/<component>/<file>`` or ``resume/<file>``."""
    bytes: int
    sha256: str
    url: Annotated[str | None, Field(repr=False)] = None
    """Where the store answers with the content, for a limited time; null: the service sends it."""


class Inputs(Output):
    """All files of an attempt."""

    files: list[InputFile]
    resume_checkpoint_id: str | None = None
    """The checkpoint of the files under ``resume``. It may be an older one than that of the lease,
    which was damaged. None: the attempt begins at step 0."""


class DamagedInputs(Output):
    """Response to a check of an attempt's files and checkpoints: those that are damaged."""

    damaged: list[str]
    """``training_file``, ``validation_file``, or the prefix of a checkpoint's files: ``model``,
    ``adapters/<n>``, ``resume``.

    After ``resume`` the list of inputs has the next older checkpoint that is whole, or none.
    """


class AttemptProgress(Input):
    """What an attempt does now."""

    phase: Phase
    step: Count
    """Optimizer steps done."""
    tokens: Count | None = None
    """Completion tokens trained on in these steps; null: not known."""
    message: Annotated[str, Field(max_length=2000)] | None = None
    """What the attempt waits for, and why."""


class AttemptOf(Input):
    """The attempt that writes."""

    attempt: Number


class Heartbeat(AttemptOf):
    """Renews a lease."""

    progress: AttemptProgress | None = None
    models: ModelInventory | None = None
    """Models that the worker has; null: the same as before."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``models`` out if it is null, as a service of an earlier version rejects it."""
        found: dict[str, Any] = handler(self)
        if self.models is None:
            del found["models"]
        return found


Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{7,64}$")]


class PinRevisions(AttemptOf):
    """Commits of hub models that an attempt is about to use."""

    revisions: Annotated[dict[ModelName, Commit], Field(min_length=1, max_length=64)]


class RevisionsPinned(Output):
    """The commits that all attempts of the job use: those that the first of them reported."""

    revisions: dict[str, str]


class LeaseState(Output):
    """Response to a heartbeat."""

    ttl_seconds: float


class Directive(Output):
    """An instruction of the service to a running attempt."""

    id: int
    """1: cancel, 2: pause, 3: drain, 4: stop. From 1000 on: results of reward requests, in the
    order of arrival."""
    type: Literal["cancel", "pause", "drain", "stop", "reward_result"]
    """``drain`` and ``stop`` are sent only to workers that report about themselves."""
    request_id: str | None = None
    """``reward_result``: the id of the request."""
    result: str | None = None
    """``reward_result``: the body that the reward service sent."""


class Directives(Output):
    """Response of the long poll."""

    directives: list[Directive]
    cursor: str
    """Send it as ``after`` in the next poll."""


MOST_REWARD_REQUESTS = 64
"""Most reward requests in one announcement, and most notes in one report of progress."""


class RewardAnnouncement(Input):
    """A reward request whose result may arrive by a callback; announced before it is sent."""

    request_id: Identifier
    component: Name
    step: Count
    sample_ids: Annotated[list[Identifier], Field(min_length=1, max_length=MAX_SAMPLES)]
    """Samples that a result must be about."""
    token_sha256: SHA256
    """Digest of the token that authorizes the callback."""
    deadline: Instant
    """Later results are rejected. It is by the clock of the worker."""
    seconds: Annotated[float, Field(ge=0)] | None = None
    """Time until the deadline, which the service then sets by its own clock; null: from an older
    worker."""


class AnnounceRewardRequests(AttemptOf):
    """Requests that an attempt is about to send."""

    requests: Annotated[
        list[RewardAnnouncement], Field(min_length=1, max_length=MOST_REWARD_REQUESTS)
    ]


class RewardRequestState(Output):
    """A stored reward request: how the attempt that announced it should continue."""

    request_id: str
    callback_url: str
    deadline: float
    """Seconds since 1970, by the service's clock. It is that of the first announcement, unless the
    request was restarted."""
    seconds: float | None = None
    """Time until the deadline; null: from an older service."""
    is_accepted: bool
    """The reward service has accepted it: wait for the result, and do not send it again."""
    poll_url: str | None
    """URL from which the result can be fetched, as the reward service reported it."""
    result: str | None
    """The body that the reward service sent; null: none yet."""
    problem: str | None = None
    """Why the latest callback was not accepted; null: none was refused, or an older service."""


class RewardRequestStates(Output):
    """Response to an announcement, in its order."""

    requests: list[RewardRequestState]


class RewardProgress(Input):
    """Progress of an announced request: accepted with 202, or closed with a result elsewhere."""

    request_id: Identifier
    state: Literal["accepted", "closed"]
    poll_url: Annotated[str, Field(max_length=2048)] | None = None


class NoteRewardProgress(AttemptOf):
    """Progress of requests that an attempt announced, in the order of time."""

    requests: Annotated[list[RewardProgress], Field(min_length=1, max_length=MOST_REWARD_REQUESTS)]


class RewardProgressNoted(Output):
    """Response to a report of progress. All of it is stored, except for unknown requests."""

    unknown: list[str]
    """Ids of requests that the job has not announced, each once."""


class _SpooledRow(Input):
    type: str
    seq: Number
    at: Instant


class MetricsRow(_SpooledRow):
    """The metrics of one step."""

    type: Literal["metrics"]
    step: Number
    values: dict[str, float | None]
    """Values by registered name; null stands for infinity or NaN."""


class SamplesRow(_SpooledRow):
    """Samples of one step."""

    type: Literal["samples"]
    step: Number
    samples: Annotated[list[ReportedSample], Field(min_length=1, max_length=256)]


class EventRow(_SpooledRow):
    """A message for the user."""

    type: Literal["event"]
    level: Level
    message: Annotated[str, Field(max_length=4000)]
    data: dict[str, Any] | None = None
    step: Count | None = None
    """The step that it is about; null: a worker of an earlier version sent it."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``step`` out if it is null, so that the row has the digest of earlier versions."""
        found: dict[str, Any] = handler(self)
        if self.step is None:
            found.pop("step", None)
        return found


class NewCheckpointRow(_SpooledRow):
    """A checkpoint on the worker's disk, which the supervisor uploads."""

    type: Literal["checkpoint"]
    step: Count
    folder: Annotated[str, Field(max_length=200)]
    manifest_sha256: SHA256


class RewardsRow(_SpooledRow):
    """Statistics of requests to reward services since the last such row."""

    type: Literal["rewards"]
    step: Number
    """The step of the report, or the step in which training ended."""
    requests: Annotated[list[ComponentRequests], Field(max_length=1024)]
    failures: Annotated[list[FailedRequest], Field(max_length=MAX_FAILURES)]
    unfinished: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    """Counts by metric name if training ended within the step; null: the step has metrics."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``unfinished`` out if it is null.

        So such a row has the digest of earlier versions, and an older service accepts it.
        """
        found: dict[str, Any] = handler(self)
        if self.unfinished is None:
            found.pop("unfinished", None)
        return found


Row = Annotated[
    MetricsRow | SamplesRow | EventRow | NewCheckpointRow | RewardsRow, Field(discriminator="type")
]
"""One line of a spool; ``seq`` counts from 1 without gaps within an attempt."""


class Batch(AttemptOf):
    """Consecutive rows of one attempt."""

    rows: Annotated[list[Row], Field(max_length=500)]


class BatchAck(Output):
    """Response to a batch."""

    acked_seq: int
    """Rows up to this number are committed and need not be sent again."""
    is_fenced: bool = False
    """Whether the attempt has lost its job. Its rows are stored, and its trainer must stop."""


MOST_LOG_CHARACTERS = 65536


class TrainerLog(AttemptOf):
    """The end of a trainer's log, in place of the one that was sent before."""

    text: Annotated[str, Field(max_length=MOST_LOG_CHARACTERS)]
    bytes: Annotated[int, Field(ge=0, le=2**53)]
    """Size of the whole log."""


class RegisterCheckpoint(AttemptOf):
    """Announces a checkpoint before its files are uploaded."""

    manifest: Manifest
    manifest_sha256: SHA256


class CheckpointUpload(Output):
    """The parts of a checkpoint that the service has received."""

    checkpoint_id: str
    status: Literal["pending", "available"]
    received: dict[str, int]
    """Bytes received of each file; an upload continues from there."""
    part_bytes: int | None = None
    """Size of the parts in which the files, except the manifest, may be sent directly to the store;
    null: they are sent to the service."""


class CheckpointParts(AttemptOf):
    """Asks for the requests with which a checkpoint's files are sent directly to the store."""

    files: dict[FileName, Annotated[list[SHA256], Field(min_length=1, max_length=10_000)]]
    """SHA-256 of each part, by file."""


class DirectPart(Output):
    """A PUT request with which a worker sends a part of a file to the store."""

    name: str
    offset: int
    bytes: int
    url: Annotated[str, Field(repr=False)]
    """Valid for a limited time. It is a secret."""
    headers: dict[str, str]
    """Must be sent as they are."""


class DirectParts(Output):
    """Requests for the next parts of a checkpoint. When none is left, the files are complete."""

    parts: list[DirectPart]


class Complete(AttemptOf):
    """The attempt finished training, or was stopped after a checkpoint."""

    last_seq: Count
    checkpoint_id: str


FailureOwner = Literal["user", "worker", "reward", "service", "storage", "database"]
"""Who can mend the cause of a failed attempt.

``user``: the job itself, its spec, data or model. ``worker``: the machine that it ran on.
``reward``: a reward service. ``service``: this software. ``storage``: the service's files, a full
disk or a damaged checkpoint. ``database``: the service's database.
"""


NO_PROGRESS = "no_progress"
"""Code of the failure of an attempt whose trainer hung; the attempt is ``lost``."""


class Fail(AttemptOf):
    """The attempt failed."""

    kind: Literal["user", "transient"]
    """``user``: the spec or its data cannot work, so there is no retry.

    ``transient``: the job is tried again, with backoff.
    """
    code: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=8000)]
    """One sentence for the user, without tracebacks and paths of the worker."""
    param: str | None = None
    owner: FailureOwner | None = None
    """Null: not known."""
    counts: bool | None = None
    """Whether the failure counts against the job: three in a row without a newer checkpoint end it.
    Null: it counts unless another owner than the job or the trainer is known."""


class Release(AttemptOf):
    """The attempt returns its job to the queue, or confirms a cancellation or a pause."""

    reason: Literal["drained", "waiting_for_reward", "cancelled", "paused", "paused_reward"]
    """``paused``: by the user.

    ``paused_reward``: too few rewards to continue; ``message`` and ``code`` say why.
    """
    message: Annotated[str, Field(max_length=2000)] | None = None
    code: Annotated[str, Field(max_length=64)] | None = None
    is_outage: bool = False
    """``paused_reward``: whether the failure may pass by itself, so that an early probe is
    useful."""


class Outcome(Output):
    """The status of the job after complete, fail or release."""

    status: str
    status_detail: str | None
