"""Files that an attempt needs: its data, its models except hub models, and its checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from dar.disk import file_sha256
from dar.errors import NotFoundError
from dar.protocol.checkpoints import MANIFEST_NAME, RESUME_FOLDER
from dar.protocol.worker import REWARD_MODELS, InputFile, Inputs, ModelSource
from service.api.checkpoints import entries
from service.http import downloads, errors
from service.http.auth import LeaseHolder
from service.jobs import models
from service.runtime import CurrentRuntime, Runtime
from service.store import checkpoints, fence, files, tables
from service.store.database import Transaction

router = APIRouter(prefix="/v1/worker/leases", tags=["worker"], responses=errors.may_answer(409))
TRAINING_FILE = "training_file"
VALIDATION_FILE = "validation_file"


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    bytes: int
    sha256: str
    path: Path


@router.get("/{lease_id}/inputs")
def list_inputs(lease_id: LeaseHolder, runtime: CurrentRuntime) -> Inputs:
    """All input files of the attempt."""
    found = _sources(runtime, lease_id)
    return Inputs(files=[InputFile(name=s.name, bytes=s.bytes, sha256=s.sha256) for s in found])


@router.get("/{lease_id}/inputs/{name:path}", response_class=Response, responses=downloads.ANSWERS)
def get_input(
    lease_id: LeaseHolder, name: str, request: Request, runtime: CurrentRuntime
) -> Response:
    """One input file, or one range of it."""
    for source in _sources(runtime, lease_id):
        if source.name == name:
            return downloads.send(
                request, source.path, sha256=source.sha256, filename=source.path.name
            )
    raise NotFoundError(f"the attempt has no input {name!r}")


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
    job = held.job
    uploaded = {TRAINING_FILE: job.training_file, VALIDATION_FILE: job.parsed_spec.validation_file}
    for name, file_id in uploaded.items():
        if file_id:
            file = files.get(transaction, job.project_id, file_id)
            yield _Source(name, file.bytes, file.sha256, runtime.artifacts.file(file.id))
    source = ModelSource.model_validate(job.model_source)
    wanted = {"model": source.checkpoint_id, "resume": held.attempt.resume_checkpoint_id}
    wanted |= {f"adapters/{n}": made for n, made in enumerate(source.adapter_ids)}
    found = checkpoints.by_ids(transaction, [item for item in wanted.values() if item])
    for prefix, checkpoint_id in wanted.items():
        if checkpoint_id is not None:
            checkpoint = found[checkpoint_id]
            yield from _files_of(runtime, checkpoint, prefix, is_resume=prefix == "resume")


def _folder(runtime: Runtime, model: str, prefix: str) -> Iterator[_Source]:
    """Files of a folder under the models directory, for workers without that directory.

    Raises:
        ModelNotFoundError: One of them is a link to a place outside of the folder.
    """
    folder = runtime.settings.models_path / model
    models.check_links(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            target = path.resolve()  # the hub's cache keeps its files behind links
            state = target.stat()
            sha256 = _sha256(target, state.st_mtime_ns, state.st_size)
            yield _Source(f"{prefix}/{name.as_posix()}", state.st_size, sha256, target)


@lru_cache(maxsize=4096)
def _sha256(path: Path, _modified_ns: int, _size: int) -> str:
    return file_sha256(path)


def _files_of(
    runtime: Runtime, checkpoint: tables.CheckpointRow, prefix: str, *, is_resume: bool
) -> Iterator[_Source]:
    folder = runtime.artifacts.checkpoint(checkpoint.job_id, checkpoint.attempt, checkpoint.step)
    for entry in entries(checkpoint):
        name = entry["name"]
        # A base model needs only its weights. A resume needs all files, to verify the manifest.
        is_state = name == MANIFEST_NAME or name.startswith(f"{RESUME_FOLDER}/")
        if is_resume or not is_state:
            path = folder / name
            yield _Source(f"{prefix}/{name}", int(entry["bytes"]), entry["sha256"], path)
