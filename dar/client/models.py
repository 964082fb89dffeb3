"""Models that a job may start from."""

from collections.abc import Callable
from pathlib import Path

from dar.client.arguments import HasId, in_path
from dar.client.checkpoints import Checkpoints
from dar.client.paging import Listing
from dar.client.transport import Transport
from dar.errors import ConfigurationError
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

    def download(
        self,
        model: str | HasId,
        directory: str | Path,
        *,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Download the weights of a model that a job has made, and verify them.

            folder = client.models.download(job.fine_tuned_model, "weights/")

        A LoRA model comes as its adapter. The download resumes like that of a checkpoint.

        Args:
            model: A result, a checkpoint's name, or one that a checkpoint was promoted to.
            directory: Folder to write into; created if it does not exist.
            on_bytes: Called with the bytes received so far and the total.

        Returns:
            The folder.

        Raises:
            ConfigurationError: It is a base model, which the service does not send.
            CheckpointError: A file's content or name is wrong.
            OSError: The folder cannot be written.
        """
        found = self.retrieve(model)
        if found.job_id is None or found.checkpoint_id is None:
            raise ConfigurationError(
                f"model {found.id!r} is a base model of the installation, and only models that jobs "
                "have made can be downloaded",
                param="model",
            )
        checkpoints = Checkpoints(self._transport)
        return checkpoints.download(found.job_id, found.checkpoint_id, directory, on_bytes=on_bytes)

    def delete(self, model: str | HasId) -> Deleted:
        """Delete the weights of a model that a job has made. The job stays.

        Of a promoted checkpoint only the name goes.

        Raises:
            ConflictError: A job that has not ended needs it, or it is a base model.
        """
        return self._transport.delete(f"{PATH}/{in_path(model)}", Deleted)
