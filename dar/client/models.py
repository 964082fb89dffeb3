"""Models that a job may start from."""

from dar.client.arguments import HasId, in_path
from dar.client.paging import Listing
from dar.client.transport import Transport
from dar.protocol.base import Page
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
