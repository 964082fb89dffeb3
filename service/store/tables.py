"""The tables. Every object of a user has its ``project_id``; instants are aware and in UTC."""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    ColumnElement,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    and_,
    text,
)
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import Mapped, mapped_column

from dar.protocol.spec import JobSpec
from dar.protocol.status import JOB_STATUSES, TERMINAL
from service.store.columns import Base as Base
from service.store.columns import Id, RowId, quoted
from service.store.reward_tables import InstallationSecretRow as InstallationSecretRow
from service.store.reward_tables import JobEndpointRow as JobEndpointRow
from service.store.reward_tables import RewardDeliveryRow as RewardDeliveryRow
from service.store.reward_tables import RewardEndpointRow as RewardEndpointRow
from service.store.reward_tables import RewardRequestRow as RewardRequestRow
from service.store.reward_tables import RewardSecretRow as RewardSecretRow
from service.store.reward_tables import SecretKeyRow as SecretKeyRow


class ProjectRow(Base):
    """The owner of files, jobs and keys."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    created_at: Mapped[datetime]
    reward_generation: Mapped[int] = mapped_column(default=0)
    """How often its reward secret was rotated (`service.store.project_secrets`)."""
    old_reward_secret_until: Mapped[datetime | None]
    """Until when the secret before the last rotation signs too."""


class ApiKeyRow(Base):
    """A bearer key, stored as its SHA-256."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str | None] = mapped_column(ForeignKey("projects.id"))
    """None for a worker's key, which is valid for every project."""
    scopes: Mapped[str] = mapped_column(String(200))
    """Separated by spaces, for example ``read submit``."""
    sha256: Mapped[str] = mapped_column(String(64))
    is_configured: Mapped[bool]
    """From the settings or a key file; revoked when those name another key."""
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    name: Mapped[str | None] = mapped_column(String(64))
    node: Mapped[str | None] = mapped_column(String(128))
    """The only node whose workers may use it; None: any, or it is a user's key."""
    last_used_at: Mapped[datetime | None]
    """To about a minute (`service.store.keys.KeyUses`)."""


class FileRow(Base):
    """An uploaded training file."""

    __tablename__ = "files"
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    filename: Mapped[str] = mapped_column(String(256))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    num_rows: Mapped[int]
    columns: Mapped[dict[str, Any]]
    """See `service.jobs.datasets.Dataset.columns`."""
    created_at: Mapped[datetime]


class FileUploadRow(Base):
    """A training file that arrives in parts."""

    __tablename__ = "file_uploads"
    __table_args__ = (
        CheckConstraint(
            "status IN ('pending', 'completed', 'cancelled', 'expired')", name="status"
        ),
        Index(None, "status", "expires_at"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    filename: Mapped[str] = mapped_column(String(256))
    purpose: Mapped[str] = mapped_column(String(32))
    mime_type: Mapped[str] = mapped_column(String(256))
    bytes: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[str] = mapped_column(String(12))
    file_id: Mapped[str | None] = mapped_column(Id)
    """The file that it has become; the file may have been deleted since."""
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]


class FileUploadPartRow(Base):
    """A part of an upload. Its content is in the artifact store until the upload has ended."""

    __tablename__ = "file_upload_parts"
    __table_args__ = (Index(None, "upload_id", "created_at"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("file_uploads.id"))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]


class JobRow(Base):
    """A training job. This row is its only state; the broker and the workers follow it."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"status IN ({quoted(JOB_STATUSES)})", name="status"),
        CheckConstraint(
            f"(finished_at IS NOT NULL) = (status IN ({quoted(TERMINAL)}))", name="finished"
        ),
        UniqueConstraint("project_id", "idempotency_key"),
        UniqueConstraint("project_id", "model_name"),
        Index(None, "project_id", "created_at", "id"),
        Index(None, "status", "queued_at", "id"),
        Index(None, "api_key_id", "body_sha256", "created_at"),
        Index(None, "finished_at"),
        Index(None, "deleted_at"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    api_key_id: Mapped[str] = mapped_column(Id)
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    status: Mapped[str] = mapped_column(String(20))
    status_detail: Mapped[str | None] = mapped_column(String(32))
    status_message: Mapped[str | None] = mapped_column(Text)
    error: Mapped[dict[str, Any] | None]
    cancel_requested_at: Mapped[datetime | None]
    stop_requested_at: Mapped[datetime | None]
    """Since when the job is to end with the model that it has; see `service.store.stops`."""

    model: Mapped[str] = mapped_column(String(256))
    model_source: Mapped[dict[str, Any]]
    model_name: Mapped[str] = mapped_column(String(256))
    """Name of the result, shown as ``fine_tuned_model`` once the job has succeeded."""
    training_file: Mapped[str] = mapped_column(Id)
    """Id of the file; empty for a hub data set."""
    spec: Mapped[dict[str, Any]]
    """The resolved spec, with every default written out."""
    labels: Mapped[dict[str, Any] | None]
    """The user's ``metadata``; SQLAlchemy reserves that name."""
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int]
    total_steps: Mapped[int]
    keep_last: Mapped[int]
    keep_every: Mapped[int | None]

    step: Mapped[int] = mapped_column(default=0)
    tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    queued_at: Mapped[datetime] = mapped_column(
        default=lambda context: context.get_current_parameters()["created_at"]
    )
    """Since when the job has waited for a worker; the oldest is claimed first. An attempt that is
    lost, fails or is drained leaves it unchanged."""
    not_before: Mapped[datetime]
    """Earliest claim; of a job that waits for its reward service, the service's next probe."""
    not_before_set_at: Mapped[datetime | None] = mapped_column(
        default=lambda context: context.get_current_parameters()["created_at"]
    )
    """When ``not_before`` was set; in the future if the clock was set back since then."""
    failed_attempts: Mapped[int] = mapped_column(default=0)
    """Attempts in a row that were lost or failed without a newer checkpoint, by any fault."""
    fruitless_attempts: Mapped[int] = mapped_column(default=0)
    """Those of them that the job itself caused; see `service.store.poison`."""
    counts_from: Mapped[int] = mapped_column(default=1)
    """First attempt after the newest one that made progress, or after a resume of a failed job."""
    failures: Mapped[dict[str, Any] | None]
    """Number of attempts that were lost, failed or had no rewards, by owner."""
    reward_calls: Mapped[int] = mapped_column(BigInteger, default=0)
    """Requests to reward services so far, of all attempts."""
    reward_waits: Mapped[int] = mapped_column(default=0)
    """Consecutive attempts that ended because the reward service was down."""
    latest_checkpoint_id: Mapped[str | None] = mapped_column(Id)
    best_checkpoint_id: Mapped[str | None] = mapped_column(Id)
    result_checkpoint_id: Mapped[str | None] = mapped_column(Id)
    """Weights of the result of a job that has succeeded; null: those of its latest checkpoint."""
    event_seq: Mapped[int] = mapped_column(default=0)
    """``seq`` of the newest event."""
    metrics_event_step: Mapped[int] = mapped_column(default=0)
    """Newest step for which the present attempt has a ``metrics`` event. A step has one in each
    attempt that trained it."""
    forecast: Mapped[dict[str, Any] | None]
    """Of a job with a KL budget: the newest choice of alpha and beta; see `Forecast`."""
    samples_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    """Size of its stored samples."""
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Memory that its trainer needs at least on a worker without GPUs; null: not known."""
    loading_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """The same on a worker with GPUs, which reads the weights into memory first."""
    pace: Mapped[dict[str, Any] | None]
    """How fast its steps are; see `service.store.pace`. Null: no step was reported yet."""
    origin: Mapped[dict[str, Any] | None]
    """The job that it repeats or goes on from; see `JobOrigin`."""
    ingredients: Mapped[dict[str, Any] | None]
    """Hashes of what it was submitted with; see `JobIngredients`. Null: an earlier version stored
    the job."""
    deleted_at: Mapped[datetime | None]
    """When a user deleted it. Nobody sees it since then; its rows are being removed."""

    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    body_sha256: Mapped[str] = mapped_column(String(64))
    retry_count: Mapped[int]
    """``x-stainless-retry-count`` of the request that submitted the job."""

    @property
    def parsed_spec(self) -> JobSpec:
        """The spec as a model."""
        return JobSpec.model_validate(self.spec)


class SubmissionClaimRow(Base):
    """The recent submissions of one body without an ``Idempotency-Key``, by one API key."""

    __tablename__ = "submission_claims"
    __table_args__ = (Index(None, "seen_at"),)

    api_key_id: Mapped[str] = mapped_column(Id, primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    calls: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """See `service.store.submission_claims.SubmittedCall`; the newest last."""
    seen_at: Mapped[datetime]
    """When the newest try arrived."""


class JobInputRow(Base):
    """A checkpoint that a job starts from, kept as long as the job may need it."""

    __tablename__ = "job_inputs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    checkpoint_id: Mapped[str] = mapped_column(
        ForeignKey("checkpoints.id"), primary_key=True, index=True
    )


class AttemptRow(Base):
    """One execution of a job by one worker slot. Its number is the fencing token of every write."""

    __tablename__ = "attempts"
    __table_args__ = (
        CheckConstraint(
            "status IN ('running', 'succeeded', 'failed', 'lost', 'drained', 'cancelled')",
            name="status",
        ),
        Index(
            "uq_attempts_running",
            "job_id",
            unique=True,
            sqlite_where=text("status = 'running'"),
            postgresql_where=text("status = 'running'"),
        ),
        Index(None, "status", "lease_until"),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    lease_id: Mapped[str] = mapped_column(Id, unique=True)
    status: Mapped[str] = mapped_column(String(20))
    node: Mapped[str] = mapped_column(String(128))
    slot: Mapped[str] = mapped_column(String(128))
    incarnation: Mapped[str] = mapped_column(String(128))
    boot_id: Mapped[str] = mapped_column(String(128))
    token_sha256: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    lease_until: Mapped[datetime]
    start_step: Mapped[int]
    resume_checkpoint_id: Mapped[str | None] = mapped_column(Id)
    acked_seq: Mapped[int] = mapped_column(default=0)
    """All rows of the attempt up to this one are committed."""
    outcome: Mapped[dict[str, Any] | None]
    """The reply to the call that ended the attempt; a repeated call gets the same reply."""
    unfinished: Mapped[dict[str, Any] | None]
    """``step`` in which the attempt ended, which has no metrics, and its reward counts, as
    ``values`` by metric name."""
    owner: Mapped[str | None] = mapped_column(String(12))
    """Who can mend the cause of a failure; see `FailureOwner`."""
    failure: Mapped[dict[str, Any] | None]
    """``code`` and ``message`` of an attempt that was lost, failed or had no rewards."""


class WorkerRow(Base):
    """A worker: one slot of one node."""

    __tablename__ = "workers"
    __table_args__ = (CheckConstraint("duty IN ('ban', 'drain', 'work')", name="duty"),)

    node: Mapped[str] = mapped_column(String(128), primary_key=True)
    slot: Mapped[str] = mapped_column(String(128), primary_key=True)
    incarnation: Mapped[str] = mapped_column(String(128))
    """The process that claims now."""
    earlier: Mapped[dict[str, Any]]
    """``incarnations`` that it has replaced, the newest last; they never claim again."""
    boot_id: Mapped[str] = mapped_column(String(128))
    machine: Mapped[str | None] = mapped_column(String(128))
    report: Mapped[dict[str, Any] | None]
    """Its last `WorkerReport`; None: a worker of an earlier version."""
    is_fit: Mapped[bool]
    """Whether it reports no fault."""
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    alive_until: Mapped[datetime]
    """Without a claim or a heartbeat until then it counts as gone."""
    duty: Mapped[str] = mapped_column(String(8))
    """What an operator has ordered: ``work``, ``drain`` or ``ban``."""
    duty_reason: Mapped[str | None] = mapped_column(Text)
    faults: Mapped[int]
    """Attempts in a row that failed by its own fault."""
    fault: Mapped[dict[str, Any] | None]
    """``code`` and ``message`` of the last of them."""
    retry_at: Mapped[datetime | None]
    """It gets no job before."""


class WorkerModelRow(Base):
    """A model that a worker has, of the last list that it sent."""

    __tablename__ = "worker_models"
    __table_args__ = (Index(None, "name"),)

    node: Mapped[str] = mapped_column(String(128), primary_key=True)
    slot: Mapped[str] = mapped_column(String(128), primary_key=True)
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    """Folder, hub id, or id of a checkpoint with full weights."""


class JobEventRow(Base):
    """An event of a job. Events are only appended."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(Id, unique=True)
    created_at: Mapped[datetime]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None]
    attempt: Mapped[int | None]
    """The attempt whose trainer sent it; None: the service's own event, or one of an earlier
    version."""
    step: Mapped[int | None]
    """The step that it belongs to, of a trainer's event."""


class TrainerLogRow(Base):
    """The end of a trainer's log."""

    __tablename__ = "trainer_logs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    updated_at: Mapped[datetime]
    bytes: Mapped[int] = mapped_column(BigInteger)
    """Size of the whole log."""
    text: Mapped[str] = mapped_column(Text)


class SpoolRow(Base):
    """Digest of a row of a trainer, to distinguish a replayed row from a contradicting one."""

    __tablename__ = "spool_rows"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[bytes] = mapped_column(LargeBinary(16))


class MetricRow(Base):
    """All metrics of one step as JSON. One row for each metric is 4 to 10 times slower."""

    __tablename__ = "metric_rows"
    __table_args__ = (Index(None, "job_id", "id"), Index(None, "job_id", "step", "attempt"))

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    """Order of arrival, which is the cursor of readers."""
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    seq: Mapped[int]
    step: Mapped[int]
    at: Mapped[float] = mapped_column(Float(53))
    values_json: Mapped[str] = mapped_column(Text)


class MetricRollupRow(Base):
    """The extremes of all series of an attempt in one bucket of steps."""

    __tablename__ = "metric_rollups"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    level: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """The bucket has ``2**level`` steps."""
    bucket: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Its first step / ``2**level``."""
    extremes_json: Mapped[str] = mapped_column(Text)
    """``Extremes`` of `service.store.metric_rollups` by the name of the series."""


class SampleRow(Base):
    """A completion kept for viewing."""

    __tablename__ = "samples"
    __table_args__ = (
        Index(None, "job_id", "id"),
        Index(None, "job_id", "step"),
        Index(None, "job_id", "prompt_id"),
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    step: Mapped[int]
    created_at: Mapped[datetime]
    reward: Mapped[float | None] = mapped_column(Float(53))
    advantage: Mapped[float | None] = mapped_column(Float(53))
    body: Mapped[dict[str, Any]]
    prompt_id: Mapped[str | None] = mapped_column(String(24))
    """Of the prompt's text (`prompt_id_of`); None: it is older than this column."""
    group_number: Mapped[int | None]
    """Number of the prompt in the step; None: it is older than this column."""
    group_index: Mapped[int | None]
    """Number of the completion among those of its prompt; None as above."""


class RewardFailureRow(Base):
    """A request to a reward service that failed after all its attempts."""

    __tablename__ = "reward_failures"
    __table_args__ = (Index(None, "job_id", "created_at", "id"), Index(None, "job_id", "step"))

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    step: Mapped[int]
    created_at: Mapped[datetime]
    component: Mapped[str] = mapped_column(String(32))
    request_id: Mapped[str] = mapped_column(String(64))
    code: Mapped[str] = mapped_column(String(64))
    family: Mapped[str] = mapped_column(String(16))
    status: Mapped[int | None]
    attempts: Mapped[int]
    samples: Mapped[int]
    seconds: Mapped[float] = mapped_column(Float(53))
    quote: Mapped[str] = mapped_column(Text)


class CheckpointRow(Base):
    """The resumable state of a job at a step."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'available', 'deleting', 'deleted')", name="status"),
        UniqueConstraint("job_id", "attempt", "step"),
        Index(None, "status"),
        Index(None, "name"),
        Index(None, "expires_at"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    step: Mapped[int]
    name: Mapped[str] = mapped_column(String(256))
    """``fine_tuned_model_checkpoint``; a later job can use it as its ``model``."""
    status: Mapped[str] = mapped_column(String(12))
    kind: Mapped[str] = mapped_column(String(8))
    bytes: Mapped[int] = mapped_column(BigInteger)
    manifest: Mapped[dict[str, Any]]
    manifest_bytes: Mapped[int]
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    verified_at: Mapped[datetime | None]
    """When every stored byte was last compared with the manifest; null: it is due now."""
    damage: Mapped[str | None] = mapped_column(Text)
    """What is wrong with the stored files. Such a checkpoint is set aside: it has the status
    ``available``, but nothing resumes from it, lists it or sends its files."""
    damaged_at: Mapped[datetime | None]
    ordinal: Mapped[int] = mapped_column(default=0)
    """See `service.store.best_checkpoint.Standing`; 0: it is older than this column."""
    reward: Mapped[float | None] = mapped_column(Float(53))
    kl: Mapped[float | None] = mapped_column(Float(53))
    is_pinned: Mapped[bool] = mapped_column(default=False)
    expires_at: Mapped[datetime | None]
    """When it is removed, unless it is pinned, promoted or needed; null: never for its age."""

    @hybrid_property
    def is_whole(self) -> bool:
        """Whether it is stored and not known to be damaged."""
        return self.status == "available" and self.damage is None

    @is_whole.inplace.expression
    @classmethod
    def _is_whole(cls) -> ColumnElement[bool]:
        return and_(cls.status == "available", cls.damage.is_(None))


class ModelAliasRow(Base):
    """A name that a user has given to a checkpoint, which is a model by this name."""

    __tablename__ = "model_aliases"
    __table_args__ = (Index(None, "checkpoint_id"),)

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(96), primary_key=True)
    checkpoint_id: Mapped[str] = mapped_column(ForeignKey("checkpoints.id", ondelete="CASCADE"))
    created_at: Mapped[datetime]
    """When it was given to this checkpoint."""


class StorageIdRow(Base):
    """The id that is written into the installation's artifact store (`service.storage_owner`)."""

    __tablename__ = "storage_ids"
    __table_args__ = (CheckConstraint("number = 1", name="number"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """1: there is one row."""
    value: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
