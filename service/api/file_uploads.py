"""Training files that arrive in parts, in the shape of OpenAI's ``/uploads``.

The parts are kept in the artifact store. The file is made of them, and checked as any other, when
the upload is completed.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from dar.disk import file_sha256
from dar.errors import ConflictError, DARError, PayloadTooLargeError
from dar.protocol.file_uploads import (
    MAX_PART_BYTES,
    CompletedParts,
    FileUpload,
    FileUploadPart,
    NewFileUpload,
)
from dar.protocol.ids import new_id
from service.api.files import check_purpose, examined, reserve, while_connected
from service.api.files import show as show_file
from service.api.paging import seconds
from service.http import errors
from service.http.auth import Reader, Submitter, User
from service.http.bodies import body_of, schema_of
from service.http.forms import declared_bytes, receive_form
from service.jobs import datasets
from service.runtime import CurrentRuntime, Runtime
from service.store import file_uploads, files, tables
from service.store.database import Transaction

log = structlog.get_logger()
router = APIRouter(prefix="/v1/uploads", tags=["files"])
NewUploadBody = Annotated[NewFileUpload, Depends(body_of(NewFileUpload))]
CompletedBody = Annotated[CompletedParts, Depends(body_of(CompletedParts))]
PART_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("", openapi_extra=schema_of(NewFileUpload))
def create_upload(runtime: CurrentRuntime, user: Submitter, body: NewUploadBody) -> FileUpload:
    """Begin a training file that is sent in parts, each of at most 64 MiB."""
    check_purpose(body.purpose)
    limit = runtime.settings.max_file_bytes
    if body.bytes > limit:
        raise PayloadTooLargeError(
            f"bytes: a file may have {limit:,} bytes here, not {body.bytes:,}; send less, or let "
            "the operator raise DAR_MAX_FILE_BYTES",
            param="bytes",
        )
    runtime.artifacts.reserve(body.bytes, "the file")
    upload = tables.FileUploadRow(
        id=new_id("upload_"),
        project_id=user.project_id,
        filename=body.filename,
        purpose=body.purpose,
        mime_type=body.mime_type,
        bytes=body.bytes,
        status="pending",
    )
    with runtime.database.write() as transaction:
        file_uploads.add(transaction, upload)
        return show(transaction, upload)


@router.get("/{upload_id}")
def get_upload(upload_id: str, runtime: CurrentRuntime, user: Reader) -> FileUpload:
    """An upload with the parts that have arrived, so that one can send the rest."""
    with runtime.database.read() as transaction:
        return show(transaction, file_uploads.get(transaction, user.project_id, upload_id))


@router.post("/{upload_id}/parts", openapi_extra=PART_SCHEMA, responses=errors.may_answer(409))
async def create_upload_part(
    upload_id: str, request: Request, runtime: CurrentRuntime, user: Submitter
) -> FileUploadPart:
    """Send a part of the file: the form field `data`. Parts may arrive in any order."""
    size = declared_bytes(request)
    await run_in_threadpool(_check_open, runtime, user, upload_id, size)
    part_id = new_id("part_")
    with runtime.artifacts.new_file(part_id) as path:
        await receive_form(request, path, limit=MAX_PART_BYTES, file="data")
        return await run_in_threadpool(_keep_part, runtime, user, upload_id, part_id, path)


@router.post(
    "/{upload_id}/complete",
    openapi_extra=schema_of(CompletedParts),
    responses=errors.may_answer(409),
)
async def complete_upload(
    upload_id: str,
    request: Request,
    runtime: CurrentRuntime,
    user: Submitter,
    body: CompletedBody,
) -> FileUpload:
    """Make the file of its parts, in the order in which they are named, and check all rows.

    A completed upload is returned as it is.
    """
    return await while_connected(
        request, runtime, lambda has_left: _complete(runtime, user, upload_id, body, has_left)
    )


@router.post("/{upload_id}/cancel", responses=errors.may_answer(409))
def cancel_upload(upload_id: str, runtime: CurrentRuntime, user: Submitter) -> FileUpload:
    """End an upload and remove its parts; a cancelled one is returned as it is."""
    with runtime.database.write() as transaction:
        upload = file_uploads.get(transaction, user.project_id, upload_id, is_locking=True)
        if upload.status != "cancelled":
            file_uploads.pending(transaction, user.project_id, upload_id)
            file_uploads.end(transaction, upload_id, "cancelled")
            transaction.after_commit(lambda: _remove_parts(runtime, upload_id))
        upload = file_uploads.get(transaction, user.project_id, upload_id)
        return show(transaction, upload)


def show(transaction: Transaction, upload: tables.FileUploadRow) -> FileUpload:
    file = None
    if upload.file_id is not None:
        file = files.find(transaction, upload.project_id, upload.file_id)
    status = file_uploads.status_of(transaction, upload)
    parts = file_uploads.parts_of(transaction, upload.id) if status == "pending" else ()
    return FileUpload.model_validate(
        {
            "id": upload.id,
            "object": "upload",
            "bytes": upload.bytes,
            "created_at": seconds(upload.created_at),
            "expires_at": seconds(upload.expires_at),
            "filename": upload.filename,
            "purpose": upload.purpose,
            "mime_type": upload.mime_type,
            "status": status,
            "file": None if file is None else show_file(file),
            "parts": [show_part(part) for part in parts],
        }
    )


def show_part(part: tables.FileUploadPartRow) -> FileUploadPart:
    return FileUploadPart(
        id=part.id,
        object="upload.part",
        created_at=seconds(part.created_at),
        upload_id=part.upload_id,
        bytes=part.bytes,
        sha256=part.sha256,
    )


def _check_open(runtime: Runtime, user: User, upload_id: str, size: int) -> None:
    """Check that a part may come, before its body is read."""
    with runtime.database.read() as transaction:
        upload = file_uploads.pending(transaction, user.project_id, upload_id)
        file_uploads.check_room(transaction, upload, 0)
    runtime.artifacts.reserve_part(size, "the part")
    runtime.artifacts.reserve_scratch(size, "the part")


def _keep_part(
    runtime: Runtime, user: User, upload_id: str, part_id: str, path: Path
) -> FileUploadPart:
    part = tables.FileUploadPartRow(
        id=part_id, upload_id=upload_id, bytes=path.stat().st_size, sha256=file_sha256(path)
    )
    runtime.artifacts.keep_part(upload_id, part_id, path)
    # If this fails, the row may still be stored. The reconciler removes the part if it is not.
    try:
        with runtime.database.write() as transaction:
            file_uploads.add_part(transaction, user.project_id, part)
            return show_part(part)
    except (ConflictError, PayloadTooLargeError):
        runtime.artifacts.remove_part(upload_id, part_id)
        raise


def _complete(
    runtime: Runtime, user: User, upload_id: str, body: CompletedParts, has_left: Callable[[], bool]
) -> FileUpload:
    with runtime.database.read() as transaction:
        upload = file_uploads.get(transaction, user.project_id, upload_id)
        if upload.status == "completed":
            return show(transaction, upload)
        file_uploads.pending(transaction, user.project_id, upload_id)
        parts = file_uploads.ordered(transaction, upload, body.part_ids)
    reserve(runtime, upload.bytes, "the file")
    file_id = new_id("file-")
    with runtime.artifacts.new_file(file_id) as path:
        found = _assemble(runtime, parts, path, has_left)
        if body.md5 is not None and found != body.md5.lower():
            raise ConflictError(
                f"md5: the parts make a file with the md5 {found}, not {body.md5}; send the parts "
                "again, or name them in the right order",
                param="md5",
                code="checksum_mismatch",
            )
        file = examined(user, file_id, path, upload.filename, has_left)
        runtime.artifacts.keep_file(file_id, path)
    with runtime.database.write() as transaction:
        file_uploads.get(transaction, user.project_id, upload_id, is_locking=True)
        if file_uploads.end(transaction, upload_id, "completed", file_id):
            files.add(transaction, file)
            transaction.after_commit(lambda: _remove_parts(runtime, upload_id))
        else:  # another request has completed or cancelled it
            transaction.after_commit(lambda: runtime.artifacts.remove_file(file_id))
        upload = file_uploads.get(transaction, user.project_id, upload_id)
        if upload.status != "completed":
            file_uploads.pending(transaction, user.project_id, upload_id)
        return show(transaction, upload)


def _assemble(
    runtime: Runtime,
    parts: Sequence[tables.FileUploadPartRow],
    path: Path,
    has_left: Callable[[], bool],
) -> str:
    """Write the content of all parts to ``path``; returns its MD5 in hex."""
    whole = hashlib.md5(usedforsecurity=False)
    with path.open("wb") as file:
        for part in parts:
            digest = hashlib.sha256()
            try:
                for chunk in runtime.artifacts.read_part(part.upload_id, part.id):
                    if has_left():
                        raise datasets.UploadCancelledError
                    file.write(chunk)
                    digest.update(chunk)
                    whole.update(chunk)
            except FileNotFoundError:
                runtime.artifacts.storage.check_mounted()
                raise _lost(part, "is gone from") from None
            if digest.hexdigest() != part.sha256:
                raise _lost(part, "was altered in")
    return whole.hexdigest()


def _lost(part: tables.FileUploadPartRow, what: str) -> ConflictError:
    return ConflictError(
        f"part {part.id} {what} the artifact store; send it again, and complete the upload with "
        "the new part's id",
        code="part_damaged",
    )


def _remove_parts(runtime: Runtime, upload_id: str) -> None:
    """Remove the parts of an ended upload; the reconciler does it later if the store is away."""
    try:
        runtime.artifacts.remove_parts(upload_id)
    except (DARError, OSError) as error:
        log.warning("parts of an ended upload are left", id=upload_id, error=str(error))
        return
    with runtime.database.write() as transaction:
        file_uploads.forget_parts(transaction, upload_id)
