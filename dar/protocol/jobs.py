"""A job as the service returns it: OpenAI's ``fine_tuning.job`` with more fields."""

from typing import Any, Literal

from dar.protocol.base import Output, UnixSeconds
from dar.protocol.status import JobStatus, StatusDetail


class JobError(Output):
    """Why a job failed, or why it was paused for lack of rewards."""

    code: str
    message: str
    param: str | None


class Progress(Output):
    """Progress of a job."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    percent: float
    tokens: int
    """Completion tokens trained on."""


class Job(Output):
    """A training job."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: UnixSeconds
    started_at: UnixSeconds | None
    finished_at: UnixSeconds | None
    estimated_finish: UnixSeconds | None
    status: JobStatus
    status_detail: StatusDetail | None
    status_message: str | None
    """The status as a sentence: what the job does or waits for, and what to do."""
    model: str
    fine_tuned_model: str | None
    training_file: str
    validation_file: str | None
    result_files: list[str]
    organization_id: str
    seed: int
    suffix: str | None
    metadata: dict[str, str] | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any] | None
    """The resolved spec, with all defaults."""
    integrations: list[Any] | None
    trained_tokens: int | None
    error: JobError | None
    attempt: int
    """Number of the current or last attempt; 0 before the first."""
    progress: Progress
    actions: list[Literal["cancel", "pause", "resume"]]
    """Actions that the job allows in its current state."""
    links: dict[str, str]
    """Paths of the job's events, metrics, samples and other resources."""
