"""Files that an attempt needs: its data, its models except hub models, and its checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from dar.disk import file_sha256
from dar.errors import NotFoundError
from dar.protocol.checkpoints import MANIFEST_NAME, RESUME_FOLDER
from dar.protocol.worker import (
    REWARD_MODELS,
    AttemptOf,
    DamagedInputs,
    InputFile,
    Inputs,
    ModelSource,
)
from service.api.checkpoints import set_aside
from service.http import downloads, errors
from service.http.auth import LeaseHolder
from service.http.bodies import body_of, schema_of
from service.jobs import models
from service.runtime import CurrentRuntime, Runtime
from service.store import checkpoints, fence, files, tables
from service.store.database import Transaction

router = APIRouter(prefix="/v1/worker/leases", tags=["worker"], responses=errors.may_answer(409))
TRAINING_FILE = "training_file"
VALIDATION_FILE = "validation_file"
RESUME = "resume"
AttemptBody = Annotated[AttemptOf, Depends(body_of(AttemptOf))]


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    bytes: int
    sha256: str
    key: str | None
    """In the artifact store."""
    path: Path | None = None
    """A file of the models directory of this machine."""


@router.get("/{lease_id}/inputs")
def list_inputs(lease_id: LeaseHolder, runtime: CurrentRuntime) -> Inputs:
    """All input files of the attempt; it resumes from the newest checkpoint that is whole."""
    while RESUME in _damaged(runtime, lease_id, None) and _resume_elsewhere(runtime, lease_id):
        pass  # the older one may be damaged too
    found = _sources(runtime, lease_id)
    with runtime.database.read() as transaction:
        resume_id = fence.look(transaction, lease_id).attempt.resume_checkpoint_id
    return Inputs(
        files=[_show(runtime, source) for source in found],
        resume_checkpoint_id=resume_id,
    )


@router.post("/{lease_id}/inputs/check", openapi_extra=schema_of(AttemptOf))
def check_inputs(
    lease_id: LeaseHolder, runtime: CurrentRuntime, body: AttemptBody
) -> DamagedInputs:
    """Read every byte of the attempt's files and checkpoints, after one of them arrived altered.

    A damaged checkpoint to resume from is replaced by the next older one that is whole.
    """
    with runtime.database.read() as transaction:
        fence.check_fence(fence.look(transaction, lease_id), body.attempt)
    bad = _damaged(runtime, lease_id, lambda _: None)
    if RESUME in bad:
        _resume_elsewhere(runtime, lease_id)
    return DamagedInputs(damaged=sorted(bad | _damaged_files(runtime, lease_id)))


@router.get("/{lease_id}/inputs/{name:path}", response_class=Response, responses=downloads.ANSWERS)
def get_input(
    lease_id: LeaseHolder, name: str, request: Request, runtime: CurrentRuntime
) -> Response:
    """One input file, or one range of it."""
    for source in _sources(runtime, lease_id):
        if source.name == name:
            content = downloads.Content(source.bytes, source.sha256, name.rpartition("/")[2])
            if source.path is not None:
                return downloads.send_file(request, source.path, content)
            assert source.key is not None
            return downloads.send(request, runtime.artifacts.storage, source.key, content)
    raise NotFoundError(f"the attempt has no input {name!r}")


def _show(runtime: Runtime, source: _Source) -> InputFile:
    transfers, url = runtime.artifacts.storage.direct, None
    if transfers is not None and source.key is not None:
        url = transfers.download_url(source.key, source.name.rpartition("/")[2])
    return InputFile(name=source.name, bytes=source.bytes, sha256=source.sha256, url=url)


def _sources(runtime: Runtime, lease_id: str) -> list[_Source]:
    with runtime.database.read() as transaction:
        held = fence.look(transaction, lease_id)
        fence.check_fence(held, held.attempt.number)
        found = list(_of(transaction, runtime, held))
    # Hashing a large model takes longer than a transaction may.
    source = ModelSource.model_validate(held.job.model_source)
    if source.kind == "folder" and source.checkpoint_id is None:
        found += _folder(runtime, source.name, "model")
    for component, name in models.reward_folders(held.job.parsed_spec).items():
        found += _folder(runtime, name, f"{REWARD_MODELS}/{component}")
    return found


def _of(transaction: Transaction, runtime: Runtime, held: fence.Held) -> Iterator[_Source]:
    yield from _uploads(transaction, runtime, held.job)
    for prefix, checkpoint in _checkpoints(transaction, held).items():
        yield from _files_of(runtime, checkpoint, prefix, is_resume=prefix == RESUME)


def _uploads(transaction: Transaction, runtime: Runtime, job: tables.JobRow) -> Iterator[_Source]:
    uploaded = {TRAINING_FILE: job.training_file, VALIDATION_FILE: job.parsed_spec.validation_file}
    for name, file_id in uploaded.items():
        if file_id:
            file = files.get(transaction, job.project_id, file_id)
            yield _Source(name, file.bytes, file.sha256, runtime.artifacts.file(file.id))


def _checkpoints(transaction: Transaction, held: fence.Held) -> dict[str, tables.CheckpointRow]:
    """Checkpoints that an attempt needs, by the prefix of their files' names."""
    source = ModelSource.model_validate(held.job.model_source)
    wanted = {"model": source.checkpoint_id, RESUME: held.attempt.resume_checkpoint_id}
    wanted |= {f"adapters/{n}": made for n, made in enumerate(source.adapter_ids)}
    found = checkpoints.by_ids(transaction, [item for item in wanted.values() if item])
    return {prefix: found[id_] for prefix, id_ in wanted.items() if id_ is not None}


def _damaged(runtime: Runtime, lease_id: str, take: Callable[[int], None] | None) -> frozenset[str]:
    """Which checkpoints of an attempt are damaged, by prefix; each is set aside.

    Args:
        runtime: Where they are stored.
        lease_id: The attempt's lease.
        take: See `Artifacts.damage_of`.
    """
    with runtime.database.read() as transaction:
        needed = _checkpoints(transaction, fence.look(transaction, lease_id))
    bad = set()
    for prefix, row in needed.items():
        folder = runtime.artifacts.checkpoint(row.job_id, row.attempt, row.step)
        damage = runtime.artifacts.damage_of(folder, checkpoints.files_of(row), take=take)
        if damage is not None:
            set_aside(runtime, row, damage)
        if damage is not None or row.damage is not None:
            bad.add(prefix)
    return frozenset(bad)


def _damaged_files(runtime: Runtime, lease_id: str) -> frozenset[str]:
    with runtime.database.read() as transaction:
        found = list(_uploads(transaction, runtime, fence.look(transaction, lease_id).job))
    bad = set()
    for source in found:
        assert source.key is not None
        if runtime.artifacts.damage_of_content(
            source.key, source.name, source.sha256, lambda _: None
        ):
            runtime.artifacts.storage.check_mounted()
            bad.add(source.name)
    return frozenset(bad)


def _resume_elsewhere(runtime: Runtime, lease_id: str) -> bool:
    """Let an attempt resume from another checkpoint, unless its trainer runs already."""
    with runtime.database.write() as transaction:
        number = fence.find(transaction, lease_id).number
        held = fence.hold(transaction, lease_id, number)
        if held.attempt.acked_seq > 0:
            return False
        checkpoints.resume_from_newest(transaction, held)
    return True


def _folder(runtime: Runtime, model: str, prefix: str) -> Iterator[_Source]:
    """Files of a folder under the models directory, for workers without that directory.

    Raises:
        ModelNotFoundError: One of them is a link to a place outside of the folder.
    """
    folder = runtime.settings.models_path / model
    models.check_files(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            target = path.resolve()  # the hub's cache keeps its files behind links
            state = target.stat()
            sha256 = _sha256(target, state.st_mtime_ns, state.st_size)
            yield _Source(f"{prefix}/{name.as_posix()}", state.st_size, sha256, None, target)


@lru_cache(maxsize=4096)
def _sha256(path: Path, _modified_ns: int, _size: int) -> str:
    return file_sha256(path)


def _files_of(
    runtime: Runtime, checkpoint: tables.CheckpointRow, prefix: str, *, is_resume: bool
) -> Iterator[_Source]:
    folder = runtime.artifacts.checkpoint(checkpoint.job_id, checkpoint.attempt, checkpoint.step)
    for file in checkpoints.files_of(checkpoint):
        name = file.name
        # A base model needs only its weights. A resume needs all files, to verify the manifest.
        is_state = name == MANIFEST_NAME or name.startswith(f"{RESUME_FOLDER}/")
        if is_resume or not is_state:
            yield _Source(f"{prefix}/{name}", file.bytes, file.sha256, f"{folder}/{name}")
