"""API keys, and the project that they belong to."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from sqlalchemy import ColumnElement, func, or_, select, update

from dar.errors import ConflictError, NotFoundError
from dar.protocol.ids import new_id
from service.store.database import Database, LockKey, Transaction
from service.store.paging import Cursor, Slice, page
from service.store.tables import ApiKeyRow, ProjectRow

USE_IS_NOTED = timedelta(seconds=60)
"""How old a stored last use may get before a later one is stored."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A configured key, as a digest."""

    id: str
    sha256: str
    scopes: str
    is_of_worker: bool
    is_only: bool
    """Whether storing it revokes every other configured key with the same scopes."""


def look_up(transaction: Transaction, key_id: str) -> ApiKeyRow | None:
    """The key with this id, whatever its state."""
    return transaction.get(ApiKeyRow, key_id)


def state_of(row: ApiKeyRow, now: datetime) -> Literal["valid", "expired", "revoked"]:
    """Whether a key opens anything."""
    if row.revoked_at is not None:
        return "revoked"
    is_expired = row.expires_at is not None and row.expires_at <= now
    return "expired" if is_expired else "valid"


def list_page(transaction: Transaction, project_id: str, cursor: Cursor) -> Slice[ApiKeyRow]:
    """A project's keys, and those of workers, which serve all projects."""
    statement = select(ApiKeyRow).where(_is_visible(project_id))
    order = [ApiKeyRow.created_at, ApiKeyRow.id]
    return page(transaction, statement, ApiKeyRow.id, order, cursor)


def get(transaction: Transaction, project_id: str, key_id: str) -> ApiKeyRow:
    """A key of `list_page`.

    Raises:
        NotFoundError: There is none.
    """
    wanted = select(ApiKeyRow).where(ApiKeyRow.id == key_id, _is_visible(project_id))
    found = transaction.scalars(wanted).one_or_none()
    if found is None:
        raise NotFoundError(f"there is no API key with the id {key_id!r}; dar keys list shows all")
    return found


def _is_visible(project_id: str) -> ColumnElement[bool]:
    return or_(ApiKeyRow.project_id == project_id, ApiKeyRow.project_id.is_(None))


def revoke(transaction: Transaction, project_id: str, key_id: str) -> ApiKeyRow:
    """Make a key invalid from now on; one that was revoked before stays as it is.

    Raises:
        NotFoundError: There is no such key.
        ConflictError: It comes from the settings, whose next start would make it valid again.
    """
    row = get(transaction, project_id, key_id)
    if row.is_configured and row.revoked_at is None:
        variable = "DAR_WORKER_KEY" if row.project_id is None else "DAR_API_KEY"
        raise ConflictError(
            f"{key_id} is a key of the service's settings, and would be valid again after its next "
            f"start; set {variable} to another key on every service host instead",
            code="configured_key",
        )
    row.revoked_at = row.revoked_at or transaction.now
    transaction.flush()
    return row


class KeyUses:
    """When keys were last used. A request only notes its key here, as a write would delay it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._noted: dict[str, datetime] = {}
        self._stored: dict[str, datetime] = {}

    def note(self, key_id: str, at: datetime) -> None:
        """A request has this key."""
        with self._lock:
            self._noted[key_id] = at

    def store(self, database: Database) -> None:
        """Store the uses that are newer than the stored ones by a minute."""
        with self._lock:
            due = {
                key_id: at
                for key_id, at in self._noted.items()
                if key_id not in self._stored or abs(at - self._stored[key_id]) >= USE_IS_NOTED
            }
        if not due:
            return
        with database.write() as transaction:
            for key_id, at in sorted(due.items()):
                before = or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < at)
                transaction.execute(
                    update(ApiKeyRow)
                    .where(ApiKeyRow.id == key_id, before)
                    .values(last_used_at=at)
                    .execution_options(synchronize_session=False)
                )
        with self._lock:
            self._stored |= due


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
    """Store the keys of the settings and the key files.

    A key that was made over the API stays as it is: restricted, and revoked if it was.
    """
    project_id = default_project(transaction)
    for record in records:
        known = transaction.get(ApiKeyRow, record.id)
        if known is not None and not known.is_configured:
            continue
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
                created_at=transaction.now if known is None else known.created_at,
                expires_at=None,
                revoked_at=None,
            )
        )
