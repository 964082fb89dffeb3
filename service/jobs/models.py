"""Models that a job may start from: folders, results and checkpoints of jobs, and hub models."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import structlog

from dar.disk import link_out_of
from dar.errors import ConflictError, InvalidRequestError, ModelNotFoundError, NotFoundError
from dar.protocol.models import Model
from dar.protocol.reward_spec import Rewards
from dar.protocol.spec import JobSpec
from dar.protocol.worker import ModelSource
from dar.rewards.from_spec import PATH
from dar.settings import Settings
from service.jobs.model_checks import ModelFiles, StoredModelFiles
from service.runtime import Runtime
from service.store import checkpoints, deletion, events, promotions
from service.store.database import Transaction
from service.store.tables import CheckpointRow, JobRow

log = structlog.get_logger()
MAX_NAMED = 5
"""Folders that an error names."""
MAX_COMPARED = 1000
"""Fine-tuned models with which a wrong name is compared."""
RESULT = "ft-"
"""How the names of results and checkpoints of jobs begin."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_FOLDER = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Where a model's weights come from, and the checkpoints among them."""

    source: ModelSource
    checkpoint_ids: Sequence[str] = ()
    """Checkpoints that must be kept as long as the job needs them."""


def resolve(
    transaction: Transaction, settings: Settings, project_id: str, name: str
) -> ResolvedModel:
    """Find the model that a job spec names, and keep its checkpoints until the transaction ends.

    Raises:
        ModelNotFoundError: There is no such model, the hub id is not allowed, a checkpoint that
            the model is made of was removed, or a file of its folder is closed to this process or
            a link to a place outside.
    """
    if "/" in name:
        return ResolvedModel(_hub(settings, name))
    if (found := _folder(settings.models_path, name)) is not None:
        check_files(found)
        folder = ModelSource(kind="folder", name=name, checkpoint_id=None, adapter_ids=[])
        return ResolvedModel(folder)
    for _, checkpoint, job in checkpoints.models(transaction, project_id, name=name):
        source = _of_checkpoint(checkpoint, job)
        whole = [source.checkpoint_id] if source.checkpoint_id else []
        ids = [*whole, *source.adapter_ids]
        if not checkpoints.keep(transaction, ids):
            raise ModelNotFoundError(
                f"model {name!r} is made of checkpoints that are no longer kept", param="model"
            )
        return ResolvedModel(source, ids)
    if (named := _promoted(transaction, project_id, name)) is not None:
        raise ModelNotFoundError(named, param="model")
    made = [id_ for id_, _, _ in checkpoints.models(transaction, project_id, limit=MAX_COMPARED)]
    raise ModelNotFoundError(
        f"there is no model {name!r}; {_others(settings.models_path, name, made)}", param="model"
    )


def _promoted(transaction: Transaction, project_id: str, name: str) -> str | None:
    """Why a name of a promoted checkpoint is no model now; None: it is no such name."""
    named = promotions.find(transaction, project_id, name)
    if named is None:
        return None
    return (
        f"model {name!r} is the checkpoint {named.checkpoint_id}, which is damaged and was set "
        "aside; promote another one to that name, or restore its files from a backup"
    )


def _others(root: Path, name: str, made: Sequence[str]) -> str:
    """What to name instead: similar names, or a few folders, and where a new one belongs."""
    folders = [model.id for model in _folders(root)]
    close = get_close_matches(name, [*folders, *made], n=3)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}? GET /v1/models lists all"
    shown = ", ".join(folders[:MAX_NAMED]) + (", …" if len(folders) > MAX_NAMED else "")
    known = f"GET /v1/models lists all, among them {shown}" if folders else "there is none yet"
    return (
        f"{known}. A new one is a folder with a config.json in the models directory of the service; a "
        "hub model is named with its owner, like 'Qwen/Qwen3-0.6B'"
    )


def folder_of(settings: Settings, name: str) -> Path | None:
    """The folder of a model of the installation; None: there is none, or it has links out of it."""
    found = _folder(settings.models_path, name)
    return None if found is None or link_out_of(found) is not None else found


def check_reward_models(settings: Settings, rewards: Rewards) -> None:
    """Check that each reward model is a folder under the models directory, or an allowed hub id.

    The result of a job is no reward model: a policy has no head that returns a number.

    Raises:
        ModelNotFoundError: One of them is neither, or has a link to a place outside of its folder.
    """
    for index, component in enumerate(rewards.components):
        name, param = component.model, f"{PATH}.components[{index}].model"
        if name is None:
            continue
        if "/" in name:
            _hub(settings, name, param)
        elif (found := _folder(settings.models_path, name)) is not None:
            check_files(found, param)
        else:
            raise ModelNotFoundError(
                f"there is no reward model {name!r}; it is a folder with a config.json in the "
                "models directory of the service, or a hub id like 'owner/name'",
                param=param,
            )


def files_of(
    transaction: Transaction, runtime: Runtime, name: str, source: ModelSource
) -> ModelFiles | None:
    """The files of a model with its config and tokenizer; None for a hub model.

    For adapters on a model, they are the files of that model.
    """
    if source.checkpoint_id is not None:
        row = checkpoints.by_ids(transaction, [source.checkpoint_id])[source.checkpoint_id]
        place = runtime.artifacts.checkpoint(row.job_id, row.attempt, row.step)
        return StoredModelFiles(name, Path(place), runtime.artifacts.storage)
    if source.kind == "hub":
        return None
    return ModelFiles(name, runtime.settings.models_path / source.name)


def reward_folders(spec: JobSpec) -> dict[str, str]:
    """Reward models of a job that are folders under the models directory, by component."""
    components = () if spec.dar.rewards is None else spec.dar.rewards.components
    return {c.name: c.model for c in components if c.model is not None and "/" not in c.model}


def list_all(transaction: Transaction, settings: Settings, project_id: str) -> list[Model]:
    """All models of this installation: folders, then what jobs have made, newest first."""
    made = checkpoints.models(transaction, project_id)
    return [
        *_folders(settings.models_path),
        *(_fine_tuned(name, checkpoint) for name, checkpoint, _ in made),
    ]


def get(transaction: Transaction, settings: Settings, project_id: str, name: str) -> Model:
    """One model by name.

    Raises:
        NotFoundError: There is no such model.
    """
    folder = _folder(settings.models_path, name)
    if folder is not None:
        if (link := link_out_of(folder)) is not None:
            raise NotFoundError(_leads_out(folder, link))
        return _base(folder)
    for _, checkpoint, _ in checkpoints.models(transaction, project_id, name=name):
        return _fine_tuned(name, checkpoint)
    if (named := _promoted(transaction, project_id, name)) is not None:
        raise NotFoundError(named)
    raise NotFoundError(f"there is no model {name!r}; GET /v1/models lists the existing ones")


def promote(
    transaction: Transaction,
    settings: Settings,
    project_id: str,
    checkpoint: CheckpointRow,
    name: str,
) -> Model:
    """Make a checkpoint a model of this name, and keep it.

    Raises:
        InvalidRequestError: The name is of the kind that results of jobs have.
        ConflictError: It is the name of a folder of the installation (``model_of_installation``).
        NotFoundError: The checkpoint is being removed.
    """
    if name.startswith(RESULT):
        raise InvalidRequestError(
            f"alias: names that begin with {RESULT!r} are those of jobs' results; choose another",
            param="alias",
        )
    if _folder(settings.models_path, name) is not None:
        raise ConflictError(
            f"{name!r} is a model of this installation; choose another alias",
            param="alias",
            code="model_of_installation",
        )
    if not checkpoints.keep(transaction, [checkpoint.id]):
        raise NotFoundError(f"checkpoint {checkpoint.id} is no longer kept")
    promotions.promote(transaction, project_id, name, checkpoint.id)
    message = f"checkpoint of step {checkpoint.step} is the model {name!r} now"
    data = {
        "kind": "checkpoint_promoted",
        "checkpoint_id": checkpoint.id,
        "step": checkpoint.step,
        "model": name,
    }
    events.append(transaction, checkpoint.job_id, [events.NewEvent(message, data=data)])
    return _fine_tuned(name, checkpoint)


def delete(transaction: Transaction, settings: Settings, project_id: str, name: str) -> None:
    """Mark the weights of a model that a job has made for removal.

    Of a promoted checkpoint only the name goes.

    Raises:
        NotFoundError: There is no such model.
        ConflictError: It is a folder of the installation, or an unfinished job needs it.
    """
    if promotions.remove(transaction, project_id, name):
        return
    if _folder(settings.models_path, name) is not None:
        raise ConflictError(
            f"model {name!r} is a folder of this installation, and not one that a job has made; its "
            "operator may remove it from the models directory",
            code="model_of_installation",
        )
    deletion.mark_model(transaction, project_id, name)


def _hub(settings: Settings, name: str, param: str = "model") -> ModelSource:
    if not _HUB_ID.fullmatch(name):
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelNotFoundError(
                f"{name!r} is a path, but a model is named: put its folder into the "
                "models directory of the service and send the folder's name, like "
                f"{_last_part(name)!r}, or send a hub id, owner/name",
                param=param,
            )
        raise ModelNotFoundError(
            f"{name!r} is no hub id; a hub id is written owner/name", param=param
        )
    if not any(fnmatchcase(name, pattern) for pattern in settings.hub_models):
        allowed = ", ".join(settings.hub_models) or "none"
        raise ModelNotFoundError(
            f"hub model {name!r} is not allowed here; allowed patterns: {allowed} (DAR_HUB_MODELS)",
            param=param,
        )
    return ModelSource(kind="hub", name=name, checkpoint_id=None, adapter_ids=[])


def _last_part(path: str) -> str:
    last = Path(path).name
    return last if _FOLDER.fullmatch(last) else "my-model"


def _of_checkpoint(checkpoint: CheckpointRow, job: JobRow) -> ModelSource:
    if checkpoint.kind == "full":
        return ModelSource(kind="folder", name="", checkpoint_id=checkpoint.id, adapter_ids=[])
    base = ModelSource.model_validate(job.model_source)
    # An adapter belongs to the commit on which it was trained; reward models are another matter.
    pinned = {name: commit for name, commit in base.revisions.items() if name == base.name}
    return base.model_copy(
        update={"adapter_ids": [*base.adapter_ids, checkpoint.id], "revisions": pinned}
    )


def _fine_tuned(name: str, checkpoint: CheckpointRow) -> Model:
    return Model(
        id=name,
        object="model",
        created=int(checkpoint.created_at.timestamp()),
        owned_by="project",
        kind="fine_tuned",
        job_id=checkpoint.job_id,
        checkpoint_id=checkpoint.id,
    )


def _folders(root: Path) -> list[Model]:
    if not root.is_dir():
        return []
    found = []
    for path in sorted(root.iterdir()):
        if _folder(root, path.name) is None:
            continue
        if (link := link_out_of(path)) is None:
            found.append(_base(path))
        else:
            _warn(path, link)
    return found


def _folder(root: Path, name: str) -> Path | None:
    path = root / name
    return path if _FOLDER.fullmatch(name) and (path / "config.json").is_file() else None


def check_files(folder: Path, param: str = "model") -> None:
    """Check that a model's folder contains all of its files, and that this process may read them.

    Through a link, a file of this machine would come into checkpoints and to other workers. Files
    of weights are often saved for their owner alone, who need not be the user of the service.

    Raises:
        ModelNotFoundError: A file or folder in it is a link to a place outside, or closed.
    """
    if (link := link_out_of(folder)) is not None:
        raise ModelNotFoundError(_leads_out(folder, link), param=param)
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen = (name for name in names if not name.startswith("."))
        closed = [name for name in seen if not os.access(Path(place, name), os.R_OK)]
        if closed:
            raise ModelNotFoundError(
                f"model {folder.name!r} cannot be used: the service may not read {closed[0]} in its "
                "folder; let its user read it, as with chmod -R a+rX",
                param=param,
            )


def _leads_out(folder: Path, link: str) -> str:
    return (
        f"model {folder.name!r} cannot be used: {link} in its folder is a symbolic link to a place "
        "outside of it; replace the link by the file"
    )


@lru_cache(maxsize=256)
def _warn(folder: Path, link: str) -> None:
    """Log once that a model is not listed."""
    log.warning("model is not listed", reason=_leads_out(folder, link))


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
