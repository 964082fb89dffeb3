"""The secret that signs a project's requests to inline reward URLs: shown as fingerprints, rotated.

Registered endpoints have secrets of their own (`service.api.reward_endpoints`).
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from dar.protocol.reward_endpoints import RotateSecret
from dar.protocol.reward_secret import NewProjectRewardSecret, ProjectRewardSecret
from service.api.paging import seconds
from service.http.auth import Administrator, Reader
from service.http.bodies import body_of, schema_of
from service.runtime import CurrentRuntime, Runtime
from service.secret_box import Binding
from service.store import project_secrets
from service.store.database import Transaction
from service.store.project_secrets import ProjectSecrets

router = APIRouter(prefix="/v1/reward_secret", tags=["reward_secret"])
RotateBody = Annotated[RotateSecret, Depends(body_of(RotateSecret, is_optional=True))]


@router.get("")
def get_reward_secret(runtime: CurrentRuntime, user: Reader) -> ProjectRewardSecret:
    """Show which secrets sign the project's requests to inline reward URLs, as fingerprints."""
    with runtime.database.read() as transaction:
        found = _of(transaction, runtime, user.project_id)
    return ProjectRewardSecret(**_shown(runtime, user.project_id, found))


@router.post("/rotate", openapi_extra=schema_of(RotateSecret))
def rotate_reward_secret(
    runtime: CurrentRuntime, user: Administrator, body: RotateBody
) -> NewProjectRewardSecret:
    """Make a new secret for the project, which only this answer contains.

    The old one still signs beside it for 24 hours.
    """
    is_overlapping = body.keep_old_secret_active_for_24_hours
    with runtime.database.write() as transaction:
        project_secrets.rotate(transaction, user.project_id, is_overlapping=is_overlapping)
        found = _of(transaction, runtime, user.project_id)
    shown = _shown(runtime, user.project_id, found)
    return NewProjectRewardSecret(**shown, signing_secret=found.values[0])


def _of(transaction: Transaction, runtime: Runtime, project_id: str) -> ProjectSecrets:
    configured = runtime.reward_secrets
    return project_secrets.secrets_of(transaction, runtime.secrets, configured, project_id)


def _shown(runtime: Runtime, project_id: str, found: ProjectSecrets) -> dict[str, Any]:
    binding = Binding(owner=project_id, endpoint_id=project_id, origin="", use="signing")
    return {
        "object": "reward_secret",
        "generation": found.generation,
        "is_configured": found.is_configured,
        "fingerprints": [runtime.secrets.fingerprint(binding, value) for value in found.values],
        "old_until": None if found.old_until is None else seconds(found.old_until),
    }
