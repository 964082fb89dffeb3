"""Whose artifact store this is: the installation's id, in its database and in its storage.

A service that takes the files of another installation for its own removes them as abandoned, and
one that finds an empty place takes every checkpoint for lost. So it starts only on a place that has
its mark, or that is known to be its own for another reason.
"""

import itertools
import secrets
from collections.abc import Iterator

import structlog
from sqlalchemy import exists, func, select

from dar.errors import ConfigurationError, ServiceUnavailableError
from dar.protocol.checkpoints import MANIFEST_NAME
from service.storage.storage import MARKER, UNFINISHED, Storage, StoredObject, unusable
from service.store.database import Database, LockKey, Transaction
from service.store.tables import ApiKeyRow, CheckpointRow, FileRow, StorageIdRow

log = structlog.get_logger()

SAMPLES = 20
"""Newest files of each kind of which one shows that an unmarked place is the installation's."""
MOVING = " is moving here"
"""Added to the mark of a place that a move is filling."""


def claim(storage: Storage, database: Database) -> None:
    """Prepare a storage for a service, if it belongs to the service's installation.

    Raises:
        ConfigurationError: It belongs to another installation, or to none although the database
            names files; or it cannot be used.
    """
    try:
        mark = storage.mark()
        # Read later: a replica that starts now stores the id before it writes the mark.
        with database.read() as transaction:
            known = id_of(transaction)
        is_marked = _is_marked(storage, mark, database, known)
    except ServiceUnavailableError as error:
        raise unusable(error) from error
    except OSError:
        storage.prepare()  # says why the folder cannot be used
        raise
    storage.prepare()
    storage_id = database.transact(_kept)
    if not is_marked:
        log.info("the storage is this installation's from now on", storage=storage.where)
        storage.write_mark(storage_id)
        if storage.mark() != storage_id:
            raise _foreign(storage, storage_id, str(storage.mark()))
    storage.owner = storage_id


def id_of(transaction: Transaction) -> str | None:
    """The installation's id; None: no service of it has started with one."""
    return transaction.scalars(select(StorageIdRow.value)).one_or_none()


def _kept(transaction: Transaction) -> str:
    """The id, made at the first start."""
    if transaction.is_postgresql:
        transaction.execute(select(func.pg_advisory_xact_lock(LockKey.STORAGE_ID.value)))
    found = id_of(transaction)
    if found is not None:
        return found
    value = f"dar-{secrets.token_hex(16)}"
    transaction.add(StorageIdRow(number=1, value=value, created_at=transaction.now))
    transaction.flush()
    return value


def _is_marked(
    storage: Storage, mark: str | None, database: Database, storage_id: str | None
) -> bool:
    """Whether the mark of a storage is the id already.

    Raises:
        ConfigurationError: It is not this installation's.
    """
    if mark:
        if mark != storage_id:
            raise _foreign(storage, storage_id, mark)
        return True
    with database.read() as transaction:
        samples = _samples(transaction)
        has_started = transaction.scalar(select(exists().select_from(ApiKeyRow)))
    if samples:
        if all(storage.size(key) is None for key in samples):
            raise _lost(storage, database, samples[0])
    elif (found := next(_files(storage), None)) is not None:
        # Earlier versions left no mark in a folder.
        is_earlier = storage_id is None and has_started and storage.path("") is not None
        if not is_earlier:
            raise ConfigurationError(
                f"DAR_STORAGE_URL: {storage.where} has files, like {found.key}, but the database "
                "names none, so they are not this installation's; name an empty place, or the "
                "database that belongs to these files"
            )
    return False


def _files(storage: Storage) -> Iterator[StoredObject]:
    for entry in itertools.chain(storage.entries("files/"), storage.entries("checkpoints/")):
        if not entry.key.startswith(UNFINISHED):
            yield entry


def _samples(transaction: Transaction) -> list[str]:
    """Keys of some files that the database names, the newest first."""
    uploads = select(FileRow.id).order_by(FileRow.created_at.desc()).limit(SAMPLES)
    whole = (
        select(CheckpointRow.job_id, CheckpointRow.attempt, CheckpointRow.step)
        .where(CheckpointRow.is_whole)
        .order_by(CheckpointRow.created_at.desc())
        .limit(SAMPLES)
    )
    found = [
        f"checkpoints/{job_id}/attempt-{attempt}/step-{step}/{MANIFEST_NAME}"
        for job_id, attempt, step in transaction.execute(whole)
    ]
    return found + [f"files/{file_id}" for file_id in transaction.scalars(uploads)]


def _foreign(storage: Storage, storage_id: str | None, mark: str) -> ConfigurationError:
    if storage_id is not None and mark == storage_id + MOVING:
        return ConfigurationError(
            f"DAR_STORAGE_URL: a move of the files to {storage.where} has not ended; run `dar "
            "storage move` again until it has, or name the place where the files were"
        )
    return ConfigurationError(
        f"DAR_STORAGE_URL: {storage.where} belongs to another installation: its {MARKER} says "
        f"{mark!r}, and the database of this one {storage_id or 'nothing'!r}. Correct "
        "DAR_STORAGE_URL or DAR_DATABASE_URL; two installations need two places"
    )


def _lost(storage: Storage, database: Database, key: str) -> ConfigurationError:
    storage_id = database.transact(_kept)
    return ConfigurationError(
        f"DAR_STORAGE_URL: {storage.where} has no {MARKER} and none of the files that the database "
        f"names, like {key}, so it is not the place of this installation. Correct DAR_STORAGE_URL, "
        "mount the volume, or copy the files there with `dar storage move`. If all files are lost, "
        f"write {storage_id} into {MARKER} there to go on without them"
    )
