"""Checkpoints of a job, and their files."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from dar.errors import ConflictError, InvalidRequestError, NotFoundError
from dar.protocol.base import Deleted, Page
from dar.protocol.checkpoints import RESUME_FOLDER, Checkpoint, CheckpointChanges, Promotion
from dar.protocol.metrics import current_values
from dar.protocol.models import Model
from service.api.jobs import PATH
from service.api.paging import PageCursor, envelope, seconds
from service.http import downloads, errors
from service.http.auth import Reader, Submitter, User
from service.http.bodies import body_of, schema_of
from service.jobs import models
from service.runtime import CurrentRuntime, Runtime
from service.store import checkpoints, deletion, jobs, promotions, tables
from service.store.database import Transaction

router = APIRouter(prefix=PATH, tags=["checkpoints"])
ChangesBody = Annotated[CheckpointChanges, Depends(body_of(CheckpointChanges))]
PromotionBody = Annotated[Promotion, Depends(body_of(Promotion))]
FILE_PATH = "/{job_id}/checkpoints/{checkpoint_id}/files/{name:path}"


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str, runtime: CurrentRuntime, user: Reader, cursor: PageCursor
) -> Page[Checkpoint]:
    """Checkpoints of a job, newest first."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        found = checkpoints.list_page(transaction, job.id, cursor)
        names = promotions.names_of(transaction, [row.id for row in found.rows])
    return envelope(found, lambda row: show(row, job, names), lambda row: row.id)


@router.get("/{job_id}/checkpoints/{checkpoint_id}", responses=errors.may_answer(409))
def get_checkpoint(
    job_id: str, checkpoint_id: str, runtime: CurrentRuntime, user: Reader
) -> Checkpoint:
    """One checkpoint."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        return _shown(transaction, checkpoints.get(transaction, job.id, checkpoint_id), job)


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


@router.patch(
    "/{job_id}/checkpoints/{checkpoint_id}",
    openapi_extra=schema_of(CheckpointChanges),
    responses=errors.may_answer(409),
)
def change_checkpoint(
    job_id: str, checkpoint_id: str, runtime: CurrentRuntime, user: Submitter, body: ChangesBody
) -> Checkpoint:
    """Pin or unpin a checkpoint, or let it be removed at a time."""
    if not body.model_fields_set:
        raise InvalidRequestError("nothing changes: send pinned, expires_at or both")
    with runtime.database.write() as transaction:
        expires_at = _future(body.expires_at, transaction.now)
        job = jobs.get(transaction, user.project_id, job_id)
        find = checkpoints.get if body.pinned else checkpoints.stored
        checkpoint = find(transaction, job.id, checkpoint_id)
        if body.pinned is not None:
            checkpoints.pin(transaction, checkpoint, is_pinned=body.pinned)
        if "expires_at" in body.model_fields_set:
            checkpoints.set_expiry(transaction, checkpoint, expires_at)
        return _shown(transaction, checkpoint, job)


@router.post(
    "/{job_id}/checkpoints/{checkpoint_id}/promote",
    openapi_extra=schema_of(Promotion),
    responses=errors.may_answer(409),
)
def promote_checkpoint(
    job_id: str, checkpoint_id: str, runtime: CurrentRuntime, user: Submitter, body: PromotionBody
) -> Model:
    """Make a checkpoint a model by a name of your own, which keeps it from being removed.

    If the name stands for another checkpoint, it stands for this one from now on. Jobs that were
    submitted with it go on with the checkpoint that they have.
    """
    with runtime.database.write() as transaction:
        # Deletions lock in this order too: first the job, then its checkpoints.
        job = jobs.locked(transaction, user.project_id, job_id)
        checkpoint = checkpoints.get(transaction, job.id, checkpoint_id)
        made = models.promote(
            transaction, runtime.settings, user.project_id, checkpoint, body.alias
        )
        transaction.after_commit(lambda: runtime.notifier.notify(job_id))
        return made


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


def _future(given: int | None, now: datetime) -> datetime | None:
    """The time of an expiry.

    Raises:
        InvalidRequestError: It is over.
    """
    if given is None:
        return None
    expires_at = datetime.fromtimestamp(given, UTC)
    if expires_at <= now:
        raise InvalidRequestError(
            f"expires_at: {given} is over, as it is {seconds(now)} now; send a later time in "
            "seconds since 1970, or delete the checkpoint",
            param="expires_at",
        )
    return expires_at


def _pin(
    runtime: Runtime, user: User, job_id: str, checkpoint_id: str, *, is_pinned: bool
) -> Checkpoint:
    with runtime.database.write() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        find = checkpoints.get if is_pinned else checkpoints.stored
        checkpoint = find(transaction, job.id, checkpoint_id)
        checkpoints.pin(transaction, checkpoint, is_pinned=is_pinned)
        return _shown(transaction, checkpoint, job)


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


def _shown(
    transaction: Transaction, checkpoint: tables.CheckpointRow, job: tables.JobRow
) -> Checkpoint:
    return show(checkpoint, job, promotions.names_of(transaction, [checkpoint.id]))


def show(
    checkpoint: tables.CheckpointRow, job: tables.JobRow, names: Mapping[str, Sequence[str]]
) -> Checkpoint:
    """A checkpoint as users see it.

    Args:
        checkpoint: Its row.
        job: Its job.
        names: The names of promoted checkpoints, by checkpoint.
    """
    expires_at = checkpoint.expires_at
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
            "expires_at": None if expires_at is None else seconds(expires_at),
            "aliases": list(names.get(checkpoint.id, ())),
            "has_optimizer": any(f.name.startswith(f"{RESUME_FOLDER}/") for f in files),
            "files": [file.model_dump() for file in files],
        }
    )
