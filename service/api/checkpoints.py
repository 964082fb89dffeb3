"""Checkpoints of a job, and their files."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from dar.errors import ConflictError, NotFoundError
from dar.protocol.base import Deleted, Page
from dar.protocol.checkpoints import RESUME_FOLDER, Checkpoint
from dar.protocol.metrics import current_values
from service.api.jobs import PATH
from service.api.paging import PageCursor, envelope, seconds
from service.http import downloads, errors
from service.http.auth import Reader, Submitter, User
from service.runtime import CurrentRuntime, Runtime
from service.store import checkpoints, deletion, jobs, tables

router = APIRouter(prefix=PATH, tags=["checkpoints"])
FILE_PATH = "/{job_id}/checkpoints/{checkpoint_id}/files/{name:path}"


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str, runtime: CurrentRuntime, user: Reader, cursor: PageCursor
) -> Page[Checkpoint]:
    """Checkpoints of a job, newest first."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        found = checkpoints.list_page(transaction, job.id, cursor)
    return envelope(found, lambda row: show(row, job), lambda row: row.id)


@router.get("/{job_id}/checkpoints/{checkpoint_id}", responses=errors.may_answer(409))
def get_checkpoint(
    job_id: str, checkpoint_id: str, runtime: CurrentRuntime, user: Reader
) -> Checkpoint:
    """One checkpoint."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        return show(checkpoints.get(transaction, job.id, checkpoint_id), job)


@router.post("/{job_id}/checkpoints/{checkpoint_id}/pin", responses=errors.may_answer(409))
def pin_checkpoint(
    job_id: str, checkpoint_id: str, runtime: CurrentRuntime, user: Submitter
) -> Checkpoint:
    """Keep a checkpoint until it is unpinned."""
    return _pin(runtime, user, job_id, checkpoint_id, is_pinned=True)


@router.post("/{job_id}/checkpoints/{checkpoint_id}/unpin", responses=errors.may_answer(409))
def unpin_checkpoint(
    job_id: str, checkpoint_id: str, runtime: CurrentRuntime, user: Submitter
) -> Checkpoint:
    """Let a pinned checkpoint be removed by the job's rules again."""
    return _pin(runtime, user, job_id, checkpoint_id, is_pinned=False)


@router.delete("/{job_id}/checkpoints/{checkpoint_id}", responses=errors.may_answer(409))
def delete_checkpoint(
    job_id: str, checkpoint_id: str, runtime: CurrentRuntime, user: Submitter
) -> Deleted:
    """Delete a checkpoint that no unfinished job needs."""
    with runtime.database.write() as transaction:
        deletion.mark_checkpoint(transaction, user.project_id, job_id, checkpoint_id)
    return Deleted(id=checkpoint_id, object="fine_tuning.job.checkpoint", deleted=True)


@router.head(FILE_PATH, response_class=Response, include_in_schema=False)
@router.get(FILE_PATH, response_class=Response, responses=downloads.ANSWERS)
def get_checkpoint_file(
    job_id: str,
    checkpoint_id: str,
    name: str,
    request: Request,
    runtime: CurrentRuntime,
    user: Reader,
) -> Response:
    """A file of a checkpoint, or one range of it."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        checkpoint = checkpoints.get(transaction, job.id, checkpoint_id)
    folder = runtime.artifacts.checkpoint(job.id, checkpoint.attempt, checkpoint.step)
    files = checkpoints.files_of(checkpoint)
    if (damage := runtime.artifacts.damage_of(folder, files)) is not None:
        raise set_aside(runtime, checkpoint, damage)
    for file in files:
        # Only files in the manifest are opened: the name is compared, never joined to a path.
        if file.name == name:
            content = downloads.Content(file.bytes, file.sha256, name.rpartition("/")[2])
            return downloads.send(
                request,
                runtime.artifacts.storage,
                f"{folder}/{name}",
                content,
                transfers=runtime.user_transfers,
            )
    raise NotFoundError(
        f"checkpoint {checkpoint_id} has no file {name!r}; its files field lists those it has"
    )


def _pin(
    runtime: Runtime, user: User, job_id: str, checkpoint_id: str, *, is_pinned: bool
) -> Checkpoint:
    with runtime.database.write() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        find = checkpoints.get if is_pinned else checkpoints.stored
        checkpoint = find(transaction, job.id, checkpoint_id)
        checkpoints.pin(transaction, checkpoint, is_pinned=is_pinned)
        return show(checkpoint, job)


def set_aside(
    runtime: Runtime, checkpoint: tables.CheckpointRow, damage: str
) -> ConflictError | NotFoundError:
    """Set a damaged checkpoint aside; returns the error about it.

    Raises:
        ServiceUnavailableError: The volume of all checkpoints is missing.
    """
    runtime.artifacts.storage.check_mounted()
    with runtime.database.write() as transaction:
        if checkpoints.set_aside(transaction, checkpoint, damage):
            transaction.after_commit(lambda: runtime.notifier.notify(checkpoint.job_id))
        found = checkpoints.find(transaction, checkpoint.job_id, checkpoint.id)
        if found is None or found.damage is None:  # it was removed meanwhile, so files are missing
            return NotFoundError(f"checkpoint {checkpoint.id} is no longer kept")
        return checkpoints.damaged(transaction, found)


def show(checkpoint: tables.CheckpointRow, job: tables.JobRow) -> Checkpoint:
    files = checkpoints.files_of(checkpoint)
    return Checkpoint.model_validate(
        {
            "id": checkpoint.id,
            "object": "fine_tuning.job.checkpoint",
            "created_at": seconds(checkpoint.created_at),
            "fine_tuning_job_id": checkpoint.job_id,
            "fine_tuned_model_checkpoint": checkpoint.name,
            "step_number": checkpoint.step,
            "metrics": {"step": checkpoint.step, **current_values(checkpoint.manifest["metrics"])},
            "kind": checkpoint.kind,
            "bytes": checkpoint.bytes,
            "sha256": checkpoint.manifest_sha256,
            "reward": checkpoint.reward,
            "is_best": checkpoint.id == job.best_checkpoint_id,
            "is_pinned": checkpoint.is_pinned,
            "has_optimizer": any(f.name.startswith(f"{RESUME_FOLDER}/") for f in files),
            "files": [file.model_dump() for file in files],
        }
    )
