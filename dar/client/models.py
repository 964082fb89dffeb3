"""Models that a job may start from."""

from dar.client.arguments import HasId, in_path
from dar.client.paging import Listing
from dar.client.transport import Transport
from dar.protocol.base import Deleted, Page
from dar.protocol.models import Model

PATH = "/models"


class Models:
    """Base models and fine-tuned ones: ``client.models``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Listing[Model]:
        """All models.

        names = [model.id for model in client.models.list()]
        """
        return Listing(self._transport, PATH, Page[Model], {})

    def retrieve(self, model: str | HasId) -> Model:
        """One model."""
        return self._transport.get(f"{PATH}/{in_path(model)}", Model)

    def delete(self, model: str | HasId) -> Deleted:
        """Delete the weights of a model that a job has made. The job stays.

        Raises:
            ConflictError: A job that has not ended needs it, or it is a base model.
        """
        return self._transport.delete(f"{PATH}/{in_path(model)}", Deleted)
