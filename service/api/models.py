"""Models that a job may start from."""

from fastapi import APIRouter

from dar.protocol.base import Deleted, Page
from dar.protocol.models import Model
from service.api.paging import whole
from service.http import errors
from service.http.auth import Reader, Submitter
from service.jobs import models
from service.runtime import CurrentRuntime

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(runtime: CurrentRuntime, user: Reader) -> Page[Model]:
    """Base models of the installation, promoted checkpoints, then all that jobs have made."""
    with runtime.database.read() as transaction:
        found = models.list_all(transaction, runtime.settings, user.project_id)
    return whole(found, lambda model: model.id)


@router.get("/{model:path}")
def get_model(model: str, runtime: CurrentRuntime, user: Reader) -> Model:
    """One model."""
    with runtime.database.read() as transaction:
        return models.get(transaction, runtime.settings, user.project_id, model)


@router.delete("/{model:path}", responses=errors.may_answer(409))
def delete_model(model: str, runtime: CurrentRuntime, user: Submitter) -> Deleted:
    """Delete the weights of a model that a job has made. The job stays.

    Of a promoted checkpoint only the name goes; its weights are left to the rules of its job.
    """
    with runtime.database.write() as transaction:
        models.delete(transaction, runtime.settings, user.project_id, model)
    return Deleted(id=model, object="model", deleted=True)
