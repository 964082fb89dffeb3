"""API keys of users and workers: made, listed and revoked by an operator."""

from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from dar.protocol.api_keys import ApiKey, CreateApiKey, NewApiKey
from dar.protocol.base import Page
from service import keys
from service.api.paging import PageCursor, envelope, seconds
from service.http import errors
from service.http.auth import Administrator
from service.http.bodies import body_of, schema_of
from service.runtime import CurrentRuntime
from service.store import keys as key_store
from service.store import tables

router = APIRouter(prefix="/v1/api_keys", tags=["api_keys"])
CreateBody = Annotated[CreateApiKey, Depends(body_of(CreateApiKey))]


@router.post("", openapi_extra=schema_of(CreateApiKey))
def create_api_key(runtime: CurrentRuntime, user: Administrator, body: CreateBody) -> NewApiKey:
    """Make a key. Only this answer contains it; the service stores its digest."""
    is_of_worker = "worker" in body.scopes
    key = keys.new_worker_key() if is_of_worker else keys.new_api_key()
    with runtime.database.write() as transaction:
        row = tables.ApiKeyRow(
            id=keys.key_id(key),
            project_id=None if is_of_worker else user.project_id,
            scopes=" ".join(dict.fromkeys(body.scopes)),
            sha256=keys.digest(key),
            is_configured=False,
            created_at=transaction.now,
            expires_at=None
            if body.expires_in_seconds is None
            else transaction.now + timedelta(seconds=body.expires_in_seconds),
            name=body.name,
            node=body.node,
        )
        transaction.add(row)
        transaction.flush()
        return NewApiKey(**_shown(row, transaction.now), key=key)


@router.get("")
def list_api_keys(runtime: CurrentRuntime, user: Administrator, cursor: PageCursor) -> Page[ApiKey]:
    """List the project's keys and those of workers, also expired and revoked ones, newest first."""
    with runtime.database.read() as transaction:
        found = key_store.list_page(transaction, user.project_id, cursor)
        now = transaction.now
    return envelope(found, lambda row: ApiKey(**_shown(row, now)), lambda key: key.id)


@router.get("/{key_id}")
def get_api_key(key_id: str, runtime: CurrentRuntime, user: Administrator) -> ApiKey:
    """Show a key, without the key itself."""
    with runtime.database.read() as transaction:
        row = key_store.get(transaction, user.project_id, key_id)
        return ApiKey(**_shown(row, transaction.now))


@router.post("/{key_id}/revoke", responses=errors.may_answer(409))
def revoke_api_key(key_id: str, runtime: CurrentRuntime, user: Administrator) -> ApiKey:
    """Make a key invalid at once. Attempts that were claimed with it keep their own tokens."""
    with runtime.database.write() as transaction:
        row = key_store.revoke(transaction, user.project_id, key_id)
        return ApiKey(**_shown(row, transaction.now))


def _shown(row: tables.ApiKeyRow, now: datetime) -> dict[str, Any]:
    def at(instant: datetime | None) -> int | None:
        return None if instant is None else seconds(instant)

    return {
        "id": row.id,
        "object": "api_key",
        "name": row.name,
        "scopes": row.scopes.split(),
        "node": row.node,
        "state": key_store.state_of(row, now),
        "is_configured": row.is_configured,
        "created_at": seconds(row.created_at),
        "expires_at": at(row.expires_at),
        "revoked_at": at(row.revoked_at),
        "last_used_at": at(row.last_used_at),
    }
