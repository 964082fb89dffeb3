"""A job as the service returns it: OpenAI's ``fine_tuning.job`` with more fields."""

from typing import Any, Literal

from pydantic import Field

from dar.protocol.base import Output, UnixSeconds
from dar.protocol.job_config import JobOrigin
from dar.protocol.status import AttemptStatus, JobStatus, StatusDetail
from dar.protocol.worker import FailureOwner

LogLevel = Literal["debug", "info", "warning", "error", "critical"]


class JobLog(Output):
    """The end of a trainer's log, as it was written: for finding the cause of a failure."""

    object: Literal["fine_tuning.job.log"]
    job_id: str
    attempt: int
    updated_at: UnixSeconds
    """When the worker sent it; while the trainer runs, it does so every few seconds."""
    bytes: int
    """Size of the whole log, which is on the worker's disk."""
    text: str
    """At most its last 64 KiB, without secrets."""
    missed_bytes: int = 0
    """With ``after``: bytes between it and the text, which are on the worker's disk only."""


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
    calibration_completions: int = 0
    """Completions that were sampled to choose alpha and beta for ``kl_budget``."""
    calibration_tokens: int = 0
    """Tokens of these completions, which are not trained on."""


class ForecastPoint(Output):
    """Where training with an alpha is expected to end."""

    alpha: float
    reward: float
    """Mean reward."""
    kl: float
    """Mean KL of a completion to the reference, in nats."""


class Forecast(Output):
    """How alpha and beta were chosen for ``kl_budget``, and where training is expected to end."""

    step: int
    """Steps that were done before."""
    phase: Literal["base", "policy"]
    """Whose completions were scored: the base model's, or the trained policy's."""
    method: Literal["frontier", "deviation"]
    """``deviation``: there are too few rewards for a forecast, so alpha is their deviation divided
    by sqrt(2 kl_budget)."""
    ending: Literal["reached", "untrusted", "saturated"]
    """``untrusted``: the completions are too few to say which alpha ends at the budget.
    ``saturated``: no alpha does."""
    kl_budget: float
    alpha: float
    beta: float
    reward_std: float
    """Pooled deviation of the rewards from their prompt's mean."""
    prompts: int
    completions: int
    tokens: int
    """Tokens of these completions."""
    spent_completions: int
    """Completions that were sampled for this and earlier calibrations of the run; none are if rows
    of the data set take their place."""
    spent_tokens: int
    """Their tokens."""
    samples_per_prompt: int | None
    """Usable rewards of the prompt with the fewest; null with ``deviation``."""
    start_reward: float | None
    """Mean reward of these prompts before training; null with ``deviation``."""
    reward: float | None
    """Expected mean reward at the end; null with ``deviation``."""
    kl: float | None
    """Expected KL to the reference at the end; null with ``deviation``."""
    frontier: list[ForecastPoint]
    """Other budgets, as far as the completions suffice."""


class JobUsage(Output):
    """What all attempts of a job have used."""

    tokens: int
    """Completion tokens trained on up to its present step."""
    reward_calls: int
    """Requests to reward services, repeated ones and those of rewound steps included."""


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
    """Name of the result: the weights of the last step; with ``keep_best``, of the best
    checkpoint."""
    best_checkpoint: str | None = None
    """Id of the best checkpoint; see `Checkpointing.keep_best`."""
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
    failures: dict[str, int] = Field(default_factory=dict)
    """Number of attempts that were lost, failed or had no rewards, by owner; see `Attempt`."""
    progress: Progress
    forecast: Forecast | None
    """Of a job with a ``kl_budget``, once it has calibrated."""
    origin: JobOrigin | None = None
    """The job that this one was made from, by a fork or a rerun."""
    usage: JobUsage | None = None
    etag: str | None = None
    """Of labels and limits, for the header ``If-Match`` of a change."""
    actions: list[Literal["cancel", "pause", "resume"]]
    """Actions that the job allows in its current state."""
    is_stoppable: bool = False
    """Whether the job can be stopped, so that it succeeds with the model that it has so far."""
    is_startable: bool = False
    """Whether the job has not run yet and waits until a request starts it; see ``auto_start``."""
    links: dict[str, str]
    """Paths of the job's events, metrics, samples and other resources."""


class Attempt(Output):
    """One execution of a job by one worker."""

    id: str
    object: Literal["fine_tuning.job.attempt"]
    number: int
    status: AttemptStatus
    node: str
    slot: str
    started_at: UnixSeconds
    ended_at: UnixSeconds | None
    start_step: int
    """Steps that were done before."""
    owner: FailureOwner | None
    """Who can mend the cause of a failure; null: there is none, or it is not known."""
    code: str | None
    message: str | None
    """Why it was lost, failed or had no rewards."""
