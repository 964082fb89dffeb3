"""Files that arrive in parts, each with an upload that collects them until it is completed."""

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import delete, exists, func, select, update

from dar.errors import ConflictError, InvalidRequestError, NotFoundError, PayloadTooLargeError
from dar.protocol.file_uploads import MAX_PART_BYTES, MOST_PARTS
from service.store.database import Transaction
from service.store.tables import FileUploadPartRow, FileUploadRow

LIFE = timedelta(days=1)
"""Time after which an upload that was not completed ends."""
SHOWN = timedelta(days=7)
"""How long an upload that has ended is still shown."""
SPARE_BYTES = MAX_PART_BYTES
"""Room for parts that are sent again, besides twice the size of the file."""


def add(transaction: Transaction, upload: FileUploadRow) -> None:
    """Store the row of a new upload."""
    upload.created_at = transaction.now
    upload.expires_at = transaction.now + LIFE
    transaction.add(upload)
    transaction.flush()


def get(
    transaction: Transaction, project_id: str, upload_id: str, *, is_locking: bool = False
) -> FileUploadRow:
    """An upload of the project.

    Raises:
        NotFoundError: The project has no upload with this id.
    """
    statement = select(FileUploadRow).where(
        FileUploadRow.project_id == project_id, FileUploadRow.id == upload_id
    )
    if is_locking:
        statement = statement.with_for_update().execution_options(populate_existing=True)
    found = transaction.scalars(statement).one_or_none()
    if found is None:
        raise NotFoundError(
            f"there is no upload {upload_id!r}; POST /v1/uploads begins one, which is kept for "
            f"{SHOWN.days} days after its end"
        )
    return found


def pending(
    transaction: Transaction, project_id: str, upload_id: str, *, is_locking: bool = False
) -> FileUploadRow:
    """An upload that takes parts.

    Raises:
        NotFoundError: The project has no upload with this id.
        ConflictError: It was completed or cancelled, or has expired (``upload_ended``).
    """
    found = get(transaction, project_id, upload_id, is_locking=is_locking)
    status = status_of(transaction, found)
    if status != "pending":
        raise ConflictError(
            f"upload {upload_id} is {status}; begin another one with POST /v1/uploads",
            code="upload_ended",
        )
    return found


def status_of(transaction: Transaction, upload: FileUploadRow) -> str:
    """The status of an upload; one that is past its time has expired, noted or not."""
    if upload.status == "pending" and upload.expires_at <= transaction.now:
        return "expired"
    return upload.status


def check_room(transaction: Transaction, upload: FileUploadRow, size: int) -> None:
    """Check that an upload may get a part of this size.

    Raises:
        PayloadTooLargeError: It has too many parts, or too many bytes in them.
    """
    count, held = transaction.execute(
        select(func.count(), func.coalesce(func.sum(FileUploadPartRow.bytes), 0)).where(
            FileUploadPartRow.upload_id == upload.id
        )
    ).one()
    if count >= MOST_PARTS or held + size > 2 * upload.bytes + SPARE_BYTES:
        raise PayloadTooLargeError(
            f"upload {upload.id} of {upload.bytes:,} bytes has {held:,} bytes in {count:,} parts; "
            f"it takes twice its size, and {MOST_PARTS:,} parts: cancel it, and send larger parts"
        )


def add_part(transaction: Transaction, project_id: str, part: FileUploadPartRow) -> None:
    """Store the row of a part that has arrived.

    Raises:
        NotFoundError: The project has no such upload.
        ConflictError: It has ended meanwhile (``upload_ended``).
        PayloadTooLargeError: It has too many parts, or too many bytes in them.
    """
    upload = pending(transaction, project_id, part.upload_id, is_locking=True)
    check_room(transaction, upload, part.bytes)
    part.created_at = transaction.now
    transaction.add(part)
    transaction.flush()


def parts_of(transaction: Transaction, upload_id: str) -> Sequence[FileUploadPartRow]:
    """All parts of an upload, as they have arrived."""
    return transaction.scalars(
        select(FileUploadPartRow)
        .where(FileUploadPartRow.upload_id == upload_id)
        .order_by(FileUploadPartRow.created_at, FileUploadPartRow.id)
    ).all()


def ordered(
    transaction: Transaction, upload: FileUploadRow, ids: Sequence[str]
) -> Sequence[FileUploadPartRow]:
    """The parts of a complete upload in the order of the file.

    Raises:
        InvalidRequestError: One is unknown or named twice, or together they have another size than
            the upload.
    """
    known = {part.id: part for part in parts_of(transaction, upload.id)}
    for place, part_id in enumerate(ids):
        if part_id not in known:
            raise InvalidRequestError(
                f"part_ids[{place}]: upload {upload.id} has no part {part_id!r}",
                param=f"part_ids[{place}]",
                code="unknown_part",
            )
    if len(set(ids)) != len(ids):
        raise InvalidRequestError(
            "part_ids: a part is named twice", param="part_ids", code="duplicate_part"
        )
    size = sum(known[part_id].bytes for part_id in ids)
    if size != upload.bytes:
        raise InvalidRequestError(
            f"part_ids: these parts have {size:,} bytes together, but the upload was begun for "
            f"{upload.bytes:,}; send and name all parts of the file",
            param="part_ids",
            code="bytes_mismatch",
        )
    return [known[part_id] for part_id in ids]


def end(transaction: Transaction, upload_id: str, status: str, file_id: str | None = None) -> bool:
    """End a pending upload; returns whether it was pending until now."""
    ended = transaction.execute(
        update(FileUploadRow)
        .where(FileUploadRow.id == upload_id, FileUploadRow.status == "pending")
        .values(status=status, file_id=file_id, ended_at=transaction.now)
        .returning(FileUploadRow.id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    transaction.expire_all()
    return ended is not None


def expire(transaction: Transaction) -> None:
    """Note which uploads have expired, and forget those that ended long ago."""
    transaction.execute(
        update(FileUploadRow)
        .where(FileUploadRow.status == "pending", FileUploadRow.expires_at <= transaction.now)
        .values(status="expired", ended_at=transaction.now)
        .execution_options(synchronize_session=False)
    )
    has_parts = exists().where(FileUploadPartRow.upload_id == FileUploadRow.id)
    transaction.execute(
        delete(FileUploadRow)
        .where(FileUploadRow.ended_at < transaction.now - SHOWN, ~has_parts)
        .execution_options(synchronize_session=False)
    )


def ended_with_parts(transaction: Transaction) -> Sequence[str]:
    """Ids of uploads that have ended, and have parts that are not removed yet."""
    return transaction.scalars(
        select(FileUploadRow.id).where(
            FileUploadRow.status != "pending",
            exists().where(FileUploadPartRow.upload_id == FileUploadRow.id),
        )
    ).all()


def forget_parts(transaction: Transaction, upload_id: str) -> None:
    """Delete the rows of an ended upload's parts, whose content is gone."""
    transaction.execute(
        delete(FileUploadPartRow)
        .where(FileUploadPartRow.upload_id == upload_id)
        .execution_options(synchronize_session=False)
    )


def known_parts(transaction: Transaction, ids: Sequence[str]) -> set[str]:
    """Those of ``ids`` that are parts of an upload."""
    return set(
        transaction.scalars(select(FileUploadPartRow.id).where(FileUploadPartRow.id.in_(ids))).all()
    )
