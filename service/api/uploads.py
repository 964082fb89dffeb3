"""Uploads of checkpoints: announced, sent in resumable parts, verified, then available.

Parts go to the service, or by signed URLs directly to the store where it has such.
"""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool

from dar.errors import ConflictError, InvalidRequestError, NotFoundError
from dar.fault_points import fault_point
from dar.protocol.base import MAX_COUNT
from dar.protocol.checkpoints import MANIFEST_NAME, Manifest
from dar.protocol.worker import (
    AttemptOf,
    CheckpointParts,
    CheckpointUpload,
    DirectPart,
    DirectParts,
    RegisterCheckpoint,
)
from service.http import errors
from service.http.auth import LeaseHolder
from service.http.bodies import MAX_EXACT, body_of, limited, schema_of
from service.runtime import CurrentRuntime, Runtime
from service.storage.storage import MOST_REQUESTS, Upload
from service.store import best_checkpoint, checkpoints, fence, tables

router = APIRouter(
    prefix="/v1/worker/leases/{lease_id}/checkpoints",
    tags=["worker"],
    responses=errors.may_answer(409),
)
PART = {"requestBody": {"required": True, "content": {"application/octet-stream": {}}}}
MAX_MANIFEST_BYTES = 8 * 1024**2
"""A manifest of 10,000 files with long names has about 3 MB."""
RegisterBody = Annotated[
    RegisterCheckpoint,
    Depends(body_of(RegisterCheckpoint, lambda _: MAX_MANIFEST_BYTES, is_of_worker=True)),
]
AttemptBody = Annotated[AttemptOf, Depends(body_of(AttemptOf, is_of_worker=True))]
PartsBody = Annotated[
    CheckpointParts,
    Depends(body_of(CheckpointParts, lambda _: MAX_MANIFEST_BYTES, is_of_worker=True)),
]


@router.post("", openapi_extra=schema_of(RegisterCheckpoint))
def register(
    lease_id: LeaseHolder, runtime: CurrentRuntime, body: RegisterBody
) -> CheckpointUpload:
    """Announce a checkpoint. The response says which bytes were received before."""
    _check_manifest(body.manifest)
    _reserve(runtime, lease_id, body)
    with runtime.database.write() as transaction:
        held = fence.hold(transaction, lease_id, body.attempt)
        if body.manifest.step > held.job.total_steps:
            raise InvalidRequestError(
                f"manifest.step: the job has only {held.job.total_steps} steps",
                param="manifest.step",
            )
        checkpoint = checkpoints.register(
            transaction, held.job, held.attempt, body.manifest, body.manifest_sha256
        )
    return _show(runtime, checkpoint)


@router.put("/{checkpoint_id}/files/{name:path}", openapi_extra=PART)
async def put_file(
    lease_id: LeaseHolder,
    checkpoint_id: str,
    name: str,
    request: Request,
    runtime: CurrentRuntime,
    attempt: Annotated[int, Query(ge=1, le=MAX_COUNT)],
    offset: Annotated[int, Query(ge=0, le=MAX_EXACT)] = 0,
) -> CheckpointUpload:
    """Send a file, or the rest of it from ``offset``; ``offset`` 0 sends the whole file again."""
    checkpoint = await run_in_threadpool(_pending, runtime, lease_id, checkpoint_id, attempt)
    upload = _upload(runtime, checkpoint)
    if name not in upload.names:
        raise NotFoundError(f"the manifest of checkpoint {checkpoint_id} names no file {name!r}")
    size = upload.names[name]
    room = (MAX_MANIFEST_BYTES if size is None else size) - offset
    part = min(int(request.headers.get("content-length") or 0), max(room, 0))
    runtime.artifacts.reserve_part(part, f"file {name!r}")
    storage = runtime.artifacts.storage
    file = await run_in_threadpool(storage.open_part, upload, name, offset)
    try:
        async for chunk in limited(request.stream(), max(room, 0), f"file {name!r}"):
            await run_in_threadpool(file.write, chunk)
        await run_in_threadpool(file.save)
    finally:
        await run_in_threadpool(file.close)
    return await run_in_threadpool(_show, runtime, checkpoint)


@router.post("/{checkpoint_id}/parts", openapi_extra=schema_of(CheckpointParts))
def list_parts(
    lease_id: LeaseHolder, checkpoint_id: str, runtime: CurrentRuntime, body: PartsBody
) -> DirectParts:
    """Signed requests for the next parts, which the worker sends to the store; none: all are there.

    The store refuses a part whose SHA-256 is not the one given here. Of a file of one part, that is
    the digest in the manifest.
    """
    checkpoint = _pending(runtime, lease_id, checkpoint_id, body.attempt)
    transfers = runtime.artifacts.storage.direct
    if transfers is None:
        raise ConflictError(
            "files of this installation pass through the service; send them there",
            code="not_direct",
        )
    upload = _upload(runtime, checkpoint)
    found: list[DirectPart] = []
    for file in upload.manifest.files:
        digests = body.files.get(file.name)
        if digests is None:
            raise InvalidRequestError(
                f"files: the digests of the parts of {file.name!r} are missing", param="files"
            )
        if len(digests) == 1:
            digests = [file.sha256]
        parts = transfers.missing_parts(f"{upload.final}/{file.name}", file.bytes, digests)
        found += [DirectPart(name=file.name, **asdict(part)) for part in parts]
        if len(found) >= MOST_REQUESTS:
            break
    return DirectParts(parts=found[:MOST_REQUESTS])


@router.post("/{checkpoint_id}/commit", openapi_extra=schema_of(AttemptOf))
def commit(
    lease_id: LeaseHolder, checkpoint_id: str, runtime: CurrentRuntime, body: AttemptBody
) -> CheckpointUpload:
    """Check that all files have arrived and were verified, then make the checkpoint available.

    The store has verified those that it received directly.
    """
    checkpoint = _find(runtime, lease_id, checkpoint_id, body.attempt)
    if checkpoint.status == "pending":
        manifest_bytes = runtime.artifacts.storage.verify(_upload(runtime, checkpoint))
        fault_point("service.verified")
        with runtime.database.read() as transaction:
            job = fence.look(transaction, lease_id).job
            standing = best_checkpoint.measure(transaction, job, checkpoint)
        with runtime.database.write() as transaction:
            held = fence.hold(transaction, lease_id, body.attempt)
            checkpoints.publish(transaction, held.job, checkpoint, manifest_bytes, standing)
    checkpoint = _find(runtime, lease_id, checkpoint_id, body.attempt)
    if checkpoint.status != "available":
        raise ConflictError(f"checkpoint {checkpoint_id} is {checkpoint.status}")
    return _show(runtime, checkpoint)


def _reserve(runtime: Runtime, lease_id: str, body: RegisterCheckpoint) -> None:
    if runtime.artifacts.room() is None:
        return
    with runtime.database.read() as transaction:
        job_id = fence.find(transaction, lease_id).job_id
    upload = runtime.artifacts.upload(job_id, body.attempt, body.manifest, body.manifest_sha256)
    here = runtime.artifacts.storage.received(upload)
    missing = sum(max(0, file.bytes - here[file.name]) for file in body.manifest.files)
    runtime.artifacts.reserve(missing, "the checkpoint")


def _find(
    runtime: Runtime, lease_id: str, checkpoint_id: str, attempt: int
) -> tables.CheckpointRow:
    with runtime.database.read() as transaction:
        held = fence.look(transaction, lease_id)
        fence.check_fence(held, attempt)
        checkpoint = checkpoints.find(transaction, held.job.id, checkpoint_id)
    if checkpoint is None or checkpoint.attempt != attempt:
        raise NotFoundError(f"attempt {attempt} has announced no checkpoint {checkpoint_id!r}")
    return checkpoint


def _pending(
    runtime: Runtime, lease_id: str, checkpoint_id: str, attempt: int
) -> tables.CheckpointRow:
    checkpoint = _find(runtime, lease_id, checkpoint_id, attempt)
    if checkpoint.status != "pending":
        raise ConflictError(
            f"checkpoint {checkpoint_id} is {checkpoint.status}; it takes no more files"
        )
    return checkpoint


def _upload(runtime: Runtime, checkpoint: tables.CheckpointRow) -> Upload:
    manifest = Manifest.model_validate(checkpoint.manifest)
    return runtime.artifacts.upload(
        checkpoint.job_id, checkpoint.attempt, manifest, checkpoint.manifest_sha256
    )


def _show(runtime: Runtime, checkpoint: tables.CheckpointRow) -> CheckpointUpload:
    status = "available" if checkpoint.status == "available" else "pending"
    storage = runtime.artifacts.storage
    return CheckpointUpload.model_validate(
        {
            "checkpoint_id": checkpoint.id,
            "status": status,
            "received": storage.received(_upload(runtime, checkpoint)),
            "part_bytes": None if storage.direct is None else storage.direct.part_bytes,
        }
    )


def _check_manifest(manifest: Manifest) -> None:
    names = [file.name for file in manifest.files]
    if len(set(names)) != len(names) or MANIFEST_NAME in names:
        raise InvalidRequestError(
            "manifest.files: every file must be named once, and the manifest itself not at all",
            param="manifest.files",
        )
