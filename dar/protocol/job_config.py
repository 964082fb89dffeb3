"""What a job is made of: its resolved spec, and hashes of code, data and model."""

from typing import Annotated, Any, Literal

from pydantic import Field

from dar.protocol.base import FreeObject, Input, Output
from dar.protocol.spec import Limits, Metadata


class JobIngredients(Output):
    """Hashes of what a job was submitted with, SHA-256 in hex."""

    version: str
    """Of the service."""
    code_sha256: str
    """Of the Python files of the package ``dar``. A worker may have another version: its attempts
    say so in their logs."""
    training_file_sha256: str | None
    """null: the data are on a hub."""
    validation_file_sha256: str | None
    model_sha256: str | None
    """Of the model's config.json, the names and sizes of its files, and the names and shapes of its
    tensors; null: a hub model, whose commit is in ``model_source.revisions`` once it has run."""
    checkpoint_sha256: dict[str, str]
    """Of the manifests of the checkpoints that the model is made of, which have the digest of each
    file, by id."""


class JobConfig(Output):
    """All that decides what a job does."""

    object: Literal["fine_tuning.job.config"]
    job_id: str
    spec: dict[str, Any]
    """The resolved spec with all defaults and the seed that was drawn: sent as a job, it makes the
    same one again."""
    total_steps: int
    model_source: dict[str, Any]
    """Where the weights come from: ``kind``, ``name``, checkpoints and commits."""
    ingredients: JobIngredients | None
    """null: an earlier version of the service has stored the job."""
    config_sha256: str
    """Of spec, model and ingredients without labels, suffix and limits: equal for jobs that do the
    same."""


class JobOrigin(Output):
    """The job that a job was made from."""

    kind: Literal["fork", "rerun"]
    job_id: str
    checkpoint_id: str | None
    """The checkpoint that a fork starts from; null: it starts from the model of that job."""
    step: int | None
    """Of that checkpoint."""


class ForkJob(Input):
    """Body of ``POST /v1/fine_tuning/jobs/{id}/fork``."""

    checkpoint: Annotated[str, Field(min_length=1, max_length=64)] = "latest"
    """Id of a checkpoint of the job; ``latest``; ``best``; or ``start``: the model that the job
    itself started from."""
    changes: FreeObject = Field(default_factory=dict)
    """What differs from the spec of the job, in the same form; null resets a field to its
    default."""


class UpdateJob(Input):
    """Body of ``PATCH /v1/fine_tuning/jobs/{id}``; what is left out stays as it is."""

    metadata: Metadata | None = None
    """All labels of the job: they replace those it has. null removes them."""
    limits: Limits | None = None
    """Limits to set; those left out stay, null removes one."""
