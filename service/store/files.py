"""Uploaded files."""

from collections.abc import Collection

from sqlalchemy import delete, func, or_, select

from dar.errors import ConflictError, NotFoundError
from dar.protocol.status import TERMINAL
from service.store.database import Transaction
from service.store.paging import Cursor, Slice, page
from service.store.tables import FileRow, JobRow


def get(
    transaction: Transaction, project_id: str, file_id: str, *, is_keeping: bool = False
) -> FileRow:
    """A file of the project.

    Args:
        transaction: The transaction to read in.
        project_id: The project.
        file_id: The file.
        is_keeping: Keep the file from being removed until the transaction ends.

    Raises:
        NotFoundError: The project has no file with this id.
    """
    statement = select(FileRow).where(FileRow.project_id == project_id, FileRow.id == file_id)
    if is_keeping:
        statement = statement.with_for_update(read=True)
    found = transaction.scalars(statement).one_or_none()
    if found is None:
        raise NotFoundError(f"there is no file {file_id!r}; GET /v1/files lists the existing ones")
    return found


def find(transaction: Transaction, project_id: str, file_id: str) -> FileRow | None:
    """A file of the project, or None."""
    return transaction.scalars(
        select(FileRow).where(FileRow.project_id == project_id, FileRow.id == file_id)
    ).one_or_none()


def add(transaction: Transaction, file: FileRow) -> None:
    """Store the row of a new file."""
    file.created_at = transaction.now
    transaction.add(file)
    transaction.flush()


def keep(transaction: Transaction, ids: Collection[str]) -> set[str]:
    """Keep files from being removed until the transaction ends. Returns those that exist."""
    kept = select(FileRow.id).where(FileRow.id.in_(ids)).order_by(FileRow.id)
    return set(transaction.scalars(kept.with_for_update(read=True)).all())


def known(transaction: Transaction, ids: Collection[str]) -> set[str]:
    """Those of ``ids`` that are files of any project."""
    return set(transaction.scalars(select(FileRow.id).where(FileRow.id.in_(ids))).all())


def list_page(
    transaction: Transaction, project_id: str, purpose: str | None, cursor: Cursor
) -> Slice[FileRow]:
    """One page of the project's files."""
    statement = select(FileRow).where(FileRow.project_id == project_id)
    if purpose is not None:
        statement = statement.where(FileRow.purpose == purpose)
    return page(transaction, statement, FileRow.id, (FileRow.created_at, FileRow.id), cursor)


def remove(transaction: Transaction, project_id: str, file_id: str) -> None:
    """Remove a file's row.

    Raises:
        NotFoundError: The project has no file with this id.
        ConflictError: An unfinished job needs it.
    """
    get(transaction, project_id, file_id)
    # A concurrent submission keeps the file locked until its job is visible here.
    transaction.execute(select(FileRow.id).where(FileRow.id == file_id).with_for_update())
    needed_by = transaction.scalars(
        select(func.min(JobRow.id)).where(
            or_(
                JobRow.training_file == file_id,
                JobRow.spec["validation_file"].as_string() == file_id,
            ),
            JobRow.status.not_in(list(TERMINAL)),
        )
    ).one()
    if needed_by is not None:
        raise ConflictError(
            f"job {needed_by} still needs file {file_id}; cancel the job or wait until it has ended",
            code="file_in_use",
        )
    transaction.execute(delete(FileRow).where(FileRow.id == file_id))
