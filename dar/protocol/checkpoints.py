"""Checkpoints: resumable states whose files can be downloaded."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dar.protocol.base import Count, Input, Output, UnixSeconds

CheckpointKind = Literal["full", "adapter"]
MANIFEST_NAME = "MANIFEST.json"
RESUME_FOLDER = "resume"
"""Folder inside a checkpoint with files for a resume: optimizer, scheduler, counters, random
states."""


def checkpoint_folders(root: Path) -> list[Path]:
    """The folders ``step-<n>`` in ``root``, by step."""
    numbered = [(one.name.removeprefix("step-"), one) for one in root.glob("step-*")]
    return [one for _, one in sorted((int(n), one) for n, one in numbered if n.isdigit())]


SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?$", max_length=200),
]
"""A file's path inside a checkpoint: at most one folder deep, no ``..``, no leading dot."""


class ManifestFile(Input):
    """One file of a checkpoint."""

    name: FileName
    bytes: Annotated[int, Field(ge=0, le=2**53)]
    sha256: SHA256


class Manifest(Input):
    """``MANIFEST.json`` of a checkpoint.

    It is written last: a folder without it is no checkpoint.
    """

    version: Literal[1] = 1
    step: Count
    kind: CheckpointKind
    last_seq: Count = 0
    """Highest ``seq`` of the trainer's spool when the manifest was written; 0 outside a service."""
    config_sha256: SHA256
    """Digest of everything that decides the result. A resume under another configuration is
    rejected."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Metrics of the step, shown in lists of checkpoints."""
    files: Annotated[list[ManifestFile], Field(min_length=1, max_length=10_000)]


class CheckpointFile(Output):
    """One downloadable file."""

    name: str
    bytes: int
    sha256: str


class Checkpoint(Output):
    """A checkpoint as OpenAI's ``fine_tuning.job.checkpoint``, with its files."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: UnixSeconds
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]
    kind: CheckpointKind
    bytes: int
    sha256: str
    """Digest of the manifest."""
    reward: float | None = None
    """Reward of its evaluation, or the mean reward of the training steps since the checkpoint
    before; null: there is none."""
    is_best: bool = False
    is_pinned: bool = False
    """Pinned checkpoints are never removed."""
    expires_at: UnixSeconds | None = None
    """When it is removed, unless it is pinned, promoted or needed; null: never for its age."""
    aliases: list[str] = Field(default_factory=list)
    """Names of the models that it was promoted to; such a checkpoint is never removed."""
    has_optimizer: bool
    files: list[CheckpointFile]


class CheckpointChanges(Input):
    """What changes of a checkpoint. Fields that are left out stay as they are."""

    pinned: bool | None = None
    """Whether it is kept until it is unpinned; null: as it is."""
    expires_at: Annotated[int, Field(ge=0, le=253_402_300_799)] | None = None
    """When it is removed, in seconds since 1970; null: not for its age."""


class Promotion(Input):
    """A name for a checkpoint."""

    alias: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=96)]
    """By which it is a model: letters, digits, ``.``, ``_`` and ``-``."""
