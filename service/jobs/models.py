"""Which models a job may start from: folders of the installation, results of jobs, and models of the hub."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path

from dar.errors import ModelNotFoundError, NotFoundError
from dar.protocol.models import Model
from dar.protocol.spec import JobSpec
from dar.protocol.worker import ModelSource
from dar.settings import Settings
from service.store import checkpoints
from service.store.database import Transaction
from service.store.tables import CheckpointRow, JobRow

MAX_NAMED = 10
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$", re.ASCII)
_FOLDER = re.compile(r"^[A-Za-z0-9][\w.-]*$", re.ASCII)


@dataclass(frozen=True, slots=True)
class Resolved:
    """Where a model's weights come from, and the checkpoints among them."""

    source: ModelSource

    @property
    def checkpoint_ids(self) -> list[str]:
        """Checkpoints that must be kept as long as the job needs them."""
        whole = [self.source.checkpoint_id] if self.source.checkpoint_id else []
        return whole + self.source.adapter_ids


def resolve(transaction: Transaction, settings: Settings, project_id: str, name: str) -> Resolved:
    """What ``model`` of a job spec means.

    Raises:
        ModelNotFoundError: Nothing here has that name, or the hub id is not allowed.
    """
    if "/" in name:
        return Resolved(_hub(settings, name))
    if _folder(settings.models_path, name) is not None:
        return Resolved(ModelSource(kind="folder", name=name, checkpoint_id=None, adapter_ids=[]))
    for _, checkpoint, job in _made_here(transaction, project_id, checkpoints.Wanted(name=name)):
        return Resolved(_of_checkpoint(checkpoint, job))
    few = checkpoints.Wanted(limit=MAX_NAMED + 1)
    made = [model.id for model, _, _ in _made_here(transaction, project_id, few)]
    there = [*(model.id for model in _folders(settings.models_path)), *made]
    known = ", ".join(there[:MAX_NAMED]) + (", …" if len(there) > MAX_NAMED else "")
    raise ModelNotFoundError(
        f"there is no model {name!r}; there are: {known or 'none yet'}. A new one is a folder with a config.json "
        f"under {settings.models_path}; a hub model is named with its owner, like 'Qwen/Qwen3-0.6B'",
        param="model",
    )


def check_reward_model(settings: Settings, name: str, param: str) -> None:
    """Whether a reward model may be used: a folder under the models directory, or an allowed hub id.

    What jobs have made is no reward model: a policy has no head that gives a number.

    Raises:
        ModelNotFoundError: It is neither.
    """
    if "/" in name:
        _hub(settings, name, param)
    elif _folder(settings.models_path, name) is None:
        raise ModelNotFoundError(
            f"there is no reward model {name!r}; it is a folder with a config.json under {settings.models_path}, or a hub id like "
            "'owner/name'",
            param=param,
        )


def reward_folders(spec: JobSpec) -> dict[str, str]:
    """The reward models of a job that are folders under the models directory, by component name."""
    components = () if spec.dar.rewards is None else spec.dar.rewards.components
    return {c.name: c.model for c in components if c.model is not None and "/" not in c.model}


def list_all(transaction: Transaction, settings: Settings, project_id: str) -> list[Model]:
    """All models that this installation has: folders, then results, newest first."""
    every = _made_here(transaction, project_id, checkpoints.Wanted())
    made = [model for model, _, _ in every]
    return [*_folders(settings.models_path), *made]


def get(transaction: Transaction, settings: Settings, project_id: str, name: str) -> Model:
    """One model by name.

    Raises:
        NotFoundError: Nothing here has that name.
    """
    folder = _folder(settings.models_path, name)
    if folder is not None:
        return _base(folder)
    for model, _, _ in _made_here(transaction, project_id, checkpoints.Wanted(name=name)):
        return model
    raise NotFoundError(f"there is no model {name!r}; GET /v1/models lists those there are")


def result_name(model: str, suffix: str | None, job_id: str) -> str:
    """Name of a job's result, ``ft-<model>-<suffix>-<id8>``: without a slash, so that it fits into a path."""
    base = re.sub(r"[^A-Za-z0-9_.-]", "-", model)[:96]
    return "-".join(part for part in ("ft", base, suffix, job_id[-8:].lower()) if part)


def _hub(settings: Settings, name: str, param: str = "model") -> ModelSource:
    if not _HUB_ID.match(name):
        raise ModelNotFoundError(
            f"{name!r} is no hub id; it is written owner/name",
            param=param,
            code="model_not_found",
        )
    if not any(fnmatchcase(name, pattern) for pattern in settings.hub_models):
        allowed = ", ".join(settings.hub_models) or "none"
        raise ModelNotFoundError(
            f"hub model {name!r} is not allowed here; allowed patterns: {allowed} (DAR_HUB_MODELS)",
            param=param,
        )
    return ModelSource(kind="hub", name=name, checkpoint_id=None, adapter_ids=[])


def _of_checkpoint(checkpoint: CheckpointRow, job: JobRow) -> ModelSource:
    if checkpoint.kind == "full":
        return ModelSource(kind="folder", name="", checkpoint_id=checkpoint.id, adapter_ids=[])
    base = ModelSource.model_validate(job.model_source)
    return base.model_copy(update={"adapter_ids": [*base.adapter_ids, checkpoint.id]})


def _made_here(
    transaction: Transaction, project_id: str, wanted: checkpoints.Wanted
) -> Iterator[tuple[Model, CheckpointRow, JobRow]]:
    for checkpoint, job in checkpoints.results(transaction, project_id, wanted):
        yield _result(job.model_name, checkpoint), checkpoint, job
    seen: set[str] = set()
    for checkpoint, job in checkpoints.available(transaction, project_id, wanted):
        if checkpoint.name not in seen:
            seen.add(checkpoint.name)
            yield _result(checkpoint.name, checkpoint), checkpoint, job


def _result(name: str, checkpoint: CheckpointRow) -> Model:
    return Model(
        id=name,
        object="model",
        created=_seconds(checkpoint.created_at),
        owned_by="project",
        kind="fine_tuned",
        job_id=checkpoint.job_id,
        checkpoint_id=checkpoint.id,
    )


def _folders(root: Path) -> list[Model]:
    if not root.is_dir():
        return []
    return [_base(path) for path in sorted(root.iterdir()) if _folder(root, path.name)]


def _folder(root: Path, name: str) -> Path | None:
    path = root / name
    return path if _FOLDER.match(name) and (path / "config.json").is_file() else None


def _base(folder: Path) -> Model:
    return Model(
        id=folder.name,
        object="model",
        created=int((folder / "config.json").stat().st_mtime),
        owned_by="installation",
        kind="base",
        job_id=None,
        checkpoint_id=None,
    )


def _seconds(instant: datetime) -> int:
    return int(instant.timestamp())
