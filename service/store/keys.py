"""API keys, and the project that they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select, update

from dar.protocol.ids import new_id
from service.store.database import LockKey, Transaction
from service.store.tables import ApiKeyRow, ProjectRow


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A configured key, as a digest."""

    id: str
    sha256: str
    scopes: str
    is_of_worker: bool
    is_only: bool
    """Whether storing it revokes every other configured key with the same scopes."""


def find(transaction: Transaction, key_id: str) -> ApiKeyRow | None:
    """The key with this id, if it is neither revoked nor expired."""
    now = transaction.now
    return transaction.scalars(
        select(ApiKeyRow).where(
            ApiKeyRow.id == key_id,
            ApiKeyRow.revoked_at.is_(None),
            ApiKeyRow.expires_at.is_(None) | (ApiKeyRow.expires_at > now),
        )
    ).one_or_none()


def default_project(transaction: Transaction) -> str:
    """Id of the oldest project, which is made at the first start."""
    found = transaction.scalars(
        select(ProjectRow.id).order_by(ProjectRow.created_at).limit(1)
    ).first()
    if found is not None:
        return found
    project = ProjectRow(id=new_id("proj-"), created_at=transaction.now)
    transaction.add(project)
    transaction.flush()
    return project.id


def lock(transaction: Transaction) -> None:
    """Let only this process configure keys until the transaction ends."""
    if transaction.is_postgresql:
        transaction.execute(select(func.pg_advisory_xact_lock(LockKey.API_KEYS.value)))


def is_any_configured(transaction: Transaction) -> bool:
    """Whether a host has configured a key that is still valid."""
    usable = select(ApiKeyRow.id).where(ApiKeyRow.is_configured, ApiKeyRow.revoked_at.is_(None))
    return transaction.scalars(usable.limit(1)).first() is not None


def configure(transaction: Transaction, records: Sequence[KeyRecord]) -> None:
    """Store the keys of the settings and the key files."""
    project_id = default_project(transaction)
    for record in records:
        if record.is_only:
            transaction.execute(
                update(ApiKeyRow)
                .where(
                    ApiKeyRow.is_configured,
                    ApiKeyRow.revoked_at.is_(None),
                    ApiKeyRow.scopes == record.scopes,
                    ApiKeyRow.id != record.id,
                )
                .values(revoked_at=transaction.now)
            )
        transaction.merge(
            ApiKeyRow(
                id=record.id,
                project_id=None if record.is_of_worker else project_id,
                scopes=record.scopes,
                sha256=record.sha256,
                is_configured=True,
                created_at=transaction.now,
                expires_at=None,
                revoked_at=None,
            )
        )
