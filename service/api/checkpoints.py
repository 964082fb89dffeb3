"""Checkpoints of a job, and their files."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from dar.errors import NotFoundError
from dar.protocol.base import Deleted, Page
from dar.protocol.checkpoints import MANIFEST_NAME, RESUME_FOLDER, Checkpoint
from dar.protocol.metrics import current_values
from service.api.jobs import PATH
from service.api.paging import PageCursor, envelope, seconds
from service.http import downloads, errors
from service.http.auth import Reader, Submitter
from service.runtime import CurrentRuntime
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
    return envelope(found, show, lambda checkpoint: checkpoint.id)


@router.get("/{job_id}/checkpoints/{checkpoint_id}")
def get_checkpoint(
    job_id: str, checkpoint_id: str, runtime: CurrentRuntime, user: Reader
) -> Checkpoint:
    """One checkpoint."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        return show(checkpoints.get(transaction, job.id, checkpoint_id))


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
    for file in entries(checkpoint):
        # Only files in the manifest are opened: the name is compared, never joined to a path.
        if file["name"] == name:
            folder = runtime.artifacts.checkpoint(job.id, checkpoint.attempt, checkpoint.step)
            filename = name.rsplit("/", 1)[-1]
            return downloads.send(
                request, folder / file["name"], sha256=file["sha256"], filename=filename
            )
    raise NotFoundError(
        f"checkpoint {checkpoint_id} has no file {name!r}; its files field lists those it has"
    )


def entries(checkpoint: tables.CheckpointRow) -> list[dict[str, str]]:
    """Name, size and digest of each file, including the manifest."""
    own = {
        "name": MANIFEST_NAME,
        "bytes": checkpoint.manifest_bytes,
        "sha256": checkpoint.manifest_sha256,
    }
    return [*checkpoint.manifest["files"], own]


def show(checkpoint: tables.CheckpointRow) -> Checkpoint:
    files = entries(checkpoint)
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
            "has_optimizer": any(f["name"].startswith(f"{RESUME_FOLDER}/") for f in files),
            "files": files,
        }
    )
