"""Uploaded training files."""

import asyncio
import threading
from collections.abc import Callable
from typing import Annotated

import structlog
from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from dar.errors import DARError, InvalidRequestError, UnsupportedMediaTypeError
from dar.protocol.base import Deleted, Page
from dar.protocol.files import File
from dar.protocol.ids import new_id
from service.api.paging import PageCursor, envelope, seconds
from service.http import downloads, errors
from service.http.auth import Reader, Submitter, User
from service.http.bodies import NUL, limited
from service.jobs import datasets
from service.runtime import CurrentRuntime, Runtime
from service.store import files, tables

log = structlog.get_logger()
router = APIRouter(prefix="/v1/files", tags=["files"])
PURPOSE = "fine-tune"
FORM_BYTES = 64 * 1024
"""Room for the parts of a multipart body besides the file."""
UPLOAD_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [PURPOSE]},
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=UPLOAD_SCHEMA)
async def create_file(request: Request, runtime: CurrentRuntime, user: Submitter) -> File:
    """Upload a JSONL file of prompts, or of completions with rewards. All rows must be valid."""
    form = await _read_form(request, runtime.settings.max_file_bytes)
    try:
        upload = _checked(form)
        return await _while_connected(
            request, runtime, lambda has_left: _store(runtime, user, upload, has_left)
        )
    finally:
        await form.close()


@router.get("")
def list_files(
    runtime: CurrentRuntime,
    user: Reader,
    cursor: PageCursor,
    purpose: Annotated[str | None, Query()] = None,
) -> Page[File]:
    """The project's files, newest first."""
    with runtime.database.read() as transaction:
        found = files.list_page(transaction, user.project_id, purpose, cursor)
    return envelope(found, show, lambda file: file.id)


@router.get("/{file_id}")
def get_file(file_id: str, runtime: CurrentRuntime, user: Reader) -> File:
    """One file."""
    with runtime.database.read() as transaction:
        return show(files.get(transaction, user.project_id, file_id))


@router.delete("/{file_id}", responses=errors.may_answer(409))
def delete_file(file_id: str, runtime: CurrentRuntime, user: Submitter) -> Deleted:
    """Delete a file that no unfinished job needs."""
    with runtime.database.write() as transaction:
        files.remove(transaction, user.project_id, file_id)
        transaction.after_commit(lambda: _remove(runtime, file_id))
    return Deleted(id=file_id, object="file", deleted=True)


@router.get("/{file_id}/content", response_class=Response, responses=downloads.ANSWERS)
def get_content(file_id: str, request: Request, runtime: CurrentRuntime, user: Reader) -> Response:
    """The content of the file, or one range of it."""
    with runtime.database.read() as transaction:
        file = files.get(transaction, user.project_id, file_id)
    return downloads.send(
        request,
        runtime.artifacts.storage,
        runtime.artifacts.file(file.id),
        downloads.Content(file.bytes, file.sha256, file.filename),
        transfers=runtime.user_transfers,
    )


def _remove(runtime: Runtime, file_id: str) -> None:
    """Remove the content of a deleted file; the reconciler does it later if the store is away."""
    try:
        runtime.artifacts.remove_file(file_id)
    except DARError as error:
        log.warning("content of a deleted file is left", id=file_id, error=error.message)


def show(file: tables.FileRow) -> File:
    return File(
        id=file.id,
        object="file",
        bytes=file.bytes,
        created_at=seconds(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
        status="processed",
        sha256=file.sha256,
        num_rows=file.num_rows,
        columns=datasets.common_columns(file.columns),
    )


async def _read_form(request: Request, limit: int) -> FormData:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise UnsupportedMediaTypeError(
            "an upload is multipart/form-data with the fields purpose and file"
        )
    # The form is read after the key is checked, and limited while it streams in, to disk.
    stream = limited(request.stream(), limit + FORM_BYTES, "upload")
    parser = MultiPartParser(
        request.headers, stream, max_files=1, max_fields=16, max_part_size=FORM_BYTES
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise InvalidRequestError(
            f"the upload cannot be read: {error.message}", code="invalid_form"
        ) from None
    except UnicodeError:  # a charset of Python that is none of the web, like punycode
        raise InvalidRequestError(
            "the upload cannot be read: its names are not in the charset of its content-type; "
            "leave the charset out, and send names in UTF-8",
            code="invalid_form",
        ) from None


def _checked(form: FormData) -> UploadFile:
    for name in form:
        if name not in {"purpose", "file"}:
            raise InvalidRequestError(
                f"{name}: this version takes only purpose and file; leave it out",
                param=name,
                code="extra_forbidden",
            )
    if form.get("purpose") != PURPOSE:
        raise InvalidRequestError(
            f"purpose: send {PURPOSE!r}; this service keeps files for training only",
            param="purpose",
        )
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise InvalidRequestError("file: no file was sent", param="file", code="missing")
    if "\0" in (upload.filename or ""):
        raise InvalidRequestError(f"the filename {NUL}", param="file", code="nul_character")
    return upload


async def _while_connected(
    request: Request, runtime: Runtime, check: Callable[[Callable[[], bool]], File]
) -> File:
    """Check an upload in a thread, until its client leaves.

    Args:
        request: The request, whose body was read.
        runtime: Limits how many uploads are checked at once.
        check: Gets a function that returns whether the client has left.

    Raises:
        ClientDisconnect: The client has left.
    """
    has_left = threading.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left.set()

    watcher = asyncio.create_task(watch())
    try:
        async with runtime.upload_checks:
            return await run_in_threadpool(check, has_left.is_set)
    except datasets.UploadCancelledError:
        raise ClientDisconnect from None
    finally:
        watcher.cancel()
        has_left.set()


def _store(runtime: Runtime, user: User, upload: UploadFile, has_left: Callable[[], bool]) -> File:
    file_id = new_id("file-")
    runtime.artifacts.reserve(upload.size or 0, "the file")
    runtime.artifacts.reserve_scratch(upload.size or 0, "the file")
    with runtime.artifacts.new_file(file_id) as temporary:
        found = datasets.store(upload.file, temporary, has_left)
        runtime.artifacts.keep_file(file_id, temporary)
    file = tables.FileRow(
        id=file_id,
        project_id=user.project_id,
        filename=(upload.filename or "upload")[-256:],
        purpose=PURPOSE,
        bytes=found.bytes,
        sha256=found.sha256,
        num_rows=found.num_rows,
        columns=found.columns,
    )
    # If this fails, the row may still be stored. The reconciler removes the file if it is not.
    with runtime.database.write() as transaction:
        files.add(transaction, file)
    return show(file)
