"""Uploaded files."""

from sqlalchemy import delete, func, select

from dar.errors import ConflictError, NotFoundError
from dar.protocol.status import TERMINAL
from service.store.database import Transaction
from service.store.paging import Cursor, Slice, page
from service.store.tables import File, Job


def get(transaction: Transaction, project_id: str, file_id: str) -> File:
    """A file of the project.

    Raises:
        NotFoundError: The project has none of that id.
    """
    found = transaction.scalars(
        select(File).where(File.project_id == project_id, File.id == file_id)
    ).one_or_none()
    if found is None:
        raise NotFoundError(f"there is no file {file_id!r}; GET /v1/files lists those there are")
    return found


def list_page(
    transaction: Transaction, project_id: str, purpose: str | None, cursor: Cursor
) -> Slice[File]:
    """One page of the project's files."""
    statement = select(File).where(File.project_id == project_id)
    if purpose is not None:
        statement = statement.where(File.purpose == purpose)
    return page(transaction, statement, File.id, (File.created_at, File.id), cursor)


def remove(transaction: Transaction, project_id: str, file_id: str) -> None:
    """Remove a file's row.

    Raises:
        NotFoundError: The project has none of that id.
        ConflictError: A job that is not over needs it.
    """
    get(transaction, project_id, file_id)
    needed_by = transaction.scalars(
        select(func.min(Job.id)).where(
            Job.training_file == file_id, Job.status.not_in(list(TERMINAL))
        )
    ).one()
    if needed_by is not None:
        raise ConflictError(
            f"job {needed_by} still needs file {file_id}; cancel the job or wait for its end",
            code="file_in_use",
        )
    transaction.execute(delete(File).where(File.id == file_id))
