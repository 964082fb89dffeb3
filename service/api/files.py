"""Uploaded training files."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import structlog
from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from dar.errors import DARError, InvalidRequestError
from dar.protocol.base import Deleted, Page
from dar.protocol.files import File
from dar.protocol.ids import new_id
from service.api.paging import PageCursor, envelope, seconds
from service.http import downloads, errors
from service.http.auth import Reader, Submitter, User
from service.http.forms import declared_bytes, receive_form
from service.jobs import datasets
from service.runtime import CurrentRuntime, Runtime
from service.store import files, tables

log = structlog.get_logger()
router = APIRouter(prefix="/v1/files", tags=["files"])
PURPOSE = "fine-tune"
MAX_FILENAME = 256
Result = TypeVar("Result")
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
    file_id, declared = new_id("file-"), declared_bytes(request)
    await run_in_threadpool(reserve, runtime, declared, "the file")
    with runtime.artifacts.new_file(file_id) as path:
        form = await receive_form(
            request,
            path,
            limit=runtime.settings.max_file_bytes,
            file="file",
            fields=("purpose",),
        )
        check_purpose(form.fields.get("purpose"))

        def store(has_left: Callable[[], bool]) -> tables.FileRow:
            file = examined(user, file_id, path, form.filename, has_left)
            if not declared:
                runtime.artifacts.reserve_part(file.bytes, "the file")
            runtime.artifacts.keep_file(file_id, path)
            # If this fails, the row may still be stored. The reconciler removes the file if it is
            # not.
            with runtime.database.write() as transaction:
                files.add(transaction, file)
            return file

        return show(await while_connected(request, runtime, store))


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


@router.head("/{file_id}/content", response_class=Response, include_in_schema=False)
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


async def while_connected(
    request: Request, runtime: Runtime, check: Callable[[Callable[[], bool]], Result]
) -> Result:
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


def reserve(runtime: Runtime, size: int, what: str) -> None:
    """Check that there is room for something, before it is received.

    Raises:
        ServiceUnavailableError: There is not (``storage_full``).
    """
    runtime.artifacts.reserve(size, what)
    runtime.artifacts.reserve_scratch(size, what)


def check_purpose(given: str | None) -> None:
    """Check that a file is for what this service does.

    Raises:
        InvalidRequestError: It is for something else.
    """
    if given != PURPOSE:
        raise InvalidRequestError(
            f"purpose: send {PURPOSE!r}; this service keeps files for training only",
            param="purpose",
        )


def examined(
    user: User, file_id: str, path: Path, filename: str, has_left: Callable[[], bool]
) -> tables.FileRow:
    """The row of a file that has arrived, once all of its rows were checked.

    Raises:
        InvalidRequestError: A row is invalid.
        UploadCancelledError: The client has left.
    """
    found = datasets.examine(path, has_left)
    return tables.FileRow(
        id=file_id,
        project_id=user.project_id,
        filename=(filename or "upload")[-MAX_FILENAME:],
        purpose=PURPOSE,
        bytes=found.bytes,
        sha256=found.sha256,
        num_rows=found.num_rows,
        columns=found.columns,
    )
