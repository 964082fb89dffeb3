"""The report of a dry run: what a job would be, what keeps it from running, what it would take."""

from typing import Any, Literal

from dar.protocol.base import ErrorProblem, Output
from dar.protocol.reward_probe import ProbeReport


class DataFacts(Output):
    """What is known about the files of a job."""

    num_rows: int | None
    """Rows of the training file; null: they are on a hub, or the file cannot be used."""
    bytes: int | None
    sha256: str | None
    columns: list[str]
    """Columns that every row has."""
    validation_rows: int | None
    """Rows of the validation file; null: there is none."""


class ComponentCheck(Output):
    """A short probe of a reward service, with the first prompt of the job."""

    component: str
    param: str
    """Place of the component in the spec."""
    status: Literal["ok", "failed", "waiting", "skipped"]
    """``failed``: a job would be refused. ``waiting``: the service does not work now, so a job
    would wait for it. ``skipped``: it was not called, and ``message`` says why."""
    message: str | None
    report: ProbeReport | None


class MemoryFit(Output):
    """Memory that the trainer needs, by arithmetic from the files of the model."""

    parameters: int | None
    """Weights of the model; null: not known."""
    least_bytes: int | None
    """Lower bound on a worker without GPUs: weights, gradients, optimizer and reference."""
    peak_bytes: int | None
    """Estimate of the most that the trainer holds at once in one process, on top of what its
    libraries take: that, and the longest pass over completions. null: not known."""
    peak_gpu_bytes: int | None
    """The same on a GPU."""
    fits: bool | None
    """Whether a worker that is alive has this memory free; null: not known, as for GPUs, which
    report no memory."""
    message: str
    """How these figures were found, or why they are not known."""


class JobEstimate(Output):
    """What a job would take."""

    total_steps: int
    completions: int
    """Completions that are sampled and trained on; 0 for a job without rewards."""
    most_completion_tokens: int
    """Their tokens, if each is as long as it may be."""
    reward_calls: int | None
    """Requests to reward services without repeated ones; null: no rewards."""
    seconds: float | None
    """Running time; null: no earlier job of this project has trained this model."""
    message: str
    """How the time was estimated, or why it is not known."""


class JobValidation(Output):
    """The report of a dry run. Nothing is stored."""

    object: Literal["fine_tuning.job.validation"]
    allowed_to_proceed: bool
    """Whether the same body would be accepted as a job now."""
    problems: list[ErrorProblem]
    """What keeps it from being accepted; ``row`` is a row of an uploaded file, from 1."""
    warnings: list[ErrorProblem]
    """What would make the job wait, or its rewards worse."""
    model: str
    method: dict[str, Any]
    """The resolved spec, with all defaults and the fields of registered reward endpoints."""
    data: DataFacts
    rewards: list[ComponentCheck]
    memory: MemoryFit
    estimate: JobEstimate | None
    """null: the number of steps is not known, as the data cannot be used."""
