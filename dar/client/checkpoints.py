"""Checkpoints of a job, and their download."""

from collections.abc import Callable
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from dar.client.arguments import HasId, in_path
from dar.client.download import Download
from dar.client.paging import Listing
from dar.client.transport import Transport
from dar.errors import ConfigurationError
from dar.protocol.base import Deleted, Page
from dar.protocol.checkpoints import RESUME_FOLDER, Checkpoint
from dar.protocol.models import Model

Order = Literal["asc", "desc"]


class Unchanged(Enum):
    """Stands for an argument that was not given."""

    UNCHANGED = "unchanged"


UNCHANGED = Unchanged.UNCHANGED


class Checkpoints:
    """Checkpoints of jobs: ``client.checkpoints``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(
        self, job_id: str | HasId, *, order: Order = "desc", limit: int = 20
    ) -> Listing[Checkpoint]:
        """A job's checkpoints, newest first; ``limit`` is the size of a page."""
        params = {"order": order, "limit": limit}
        return Listing(self._transport, _path(job_id), Page[Checkpoint], params)

    def retrieve(self, job_id: str | HasId, checkpoint_id: str | HasId) -> Checkpoint:
        """One checkpoint, with the list of its files."""
        return self._transport.get(f"{_path(job_id)}/{in_path(checkpoint_id)}", Checkpoint)

    def pin(self, job_id: str | HasId, checkpoint_id: str | HasId) -> Checkpoint:
        """Keep a checkpoint until it is unpinned."""
        return self._transport.post(f"{_path(job_id)}/{in_path(checkpoint_id)}/pin", Checkpoint)

    def unpin(self, job_id: str | HasId, checkpoint_id: str | HasId) -> Checkpoint:
        """Let a pinned checkpoint be removed by the job's rules again."""
        return self._transport.post(f"{_path(job_id)}/{in_path(checkpoint_id)}/unpin", Checkpoint)

    def update(
        self,
        job_id: str | HasId,
        checkpoint_id: str | HasId,
        *,
        pinned: bool | None = None,
        expires_at: float | datetime | Unchanged | None = UNCHANGED,
    ) -> Checkpoint:
        """Pin or unpin a checkpoint, or let it be removed at a time.

        Args:
            job_id: The job.
            checkpoint_id: The checkpoint.
            pinned: Whether it is kept whatever the time is; None: as it is.
            expires_at: When it is removed: seconds since 1970, or a datetime with a time zone.
                None: not for its age.

        Raises:
            InvalidRequestError: That time is over.
        """
        body: dict[str, Any] = {} if pinned is None else {"pinned": pinned}
        if not isinstance(expires_at, Unchanged):
            body["expires_at"] = _seconds(expires_at)
        return self._transport.patch(
            f"{_path(job_id)}/{in_path(checkpoint_id)}", Checkpoint, body=body
        )

    def promote(self, job_id: str | HasId, checkpoint_id: str | HasId, alias: str) -> Model:
        """Make a checkpoint a model by a name of your own, which keeps it from being removed.

            client.checkpoints.promote(job, checkpoint, "support-bot")
            client.jobs.create(model="support-bot", ...)

        A name that stands for another checkpoint stands for this one from now on.

        Raises:
            ConflictError: The name is that of a model of the installation.
        """
        path = f"{_path(job_id)}/{in_path(checkpoint_id)}/promote"
        return self._transport.post(path, Model, body={"alias": alias})

    def delete(self, job_id: str | HasId, checkpoint_id: str | HasId) -> Deleted:
        """Delete a checkpoint.

        Raises:
            ConflictError: A job that has not ended needs it.
        """
        return self._transport.delete(f"{_path(job_id)}/{in_path(checkpoint_id)}", Deleted)

    def download(
        self,
        job_id: str | HasId,
        checkpoint_id: str | HasId,
        directory: str | Path,
        *,
        include_optimizer: bool = False,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Download a checkpoint's files into ``directory`` and verify each by its SHA-256.

            folder = client.checkpoints.download(job.id, checkpoint.id, "weights/")
            model = AutoModelForCausalLM.from_pretrained(folder)

        A file gets its name only when it is complete and correct. After an interruption the same
        call resumes, and skips files that are already correct.

        Args:
            job_id: The job.
            checkpoint_id: The checkpoint.
            directory: Folder to write into; created if it does not exist.
            include_optimizer: Whether to download the files that only a resume needs
                (``resume/…``).
            on_bytes: Called with the bytes received so far and the total.

        Returns:
            The folder.

        Raises:
            CheckpointError: A file's content or name is wrong.
            OSError: The folder cannot be written.
        """
        checkpoint = self.retrieve(job_id, checkpoint_id)
        files = [
            file
            for file in checkpoint.files
            if include_optimizer or not file.name.startswith(f"{RESUME_FOLDER}/")
        ]
        path = f"{_path(job_id)}/{in_path(checkpoint_id)}/files"
        folder = Path(directory).expanduser()
        return Download(self._transport, path, folder, files, on_bytes).run()


def _seconds(instant: float | datetime | None) -> int | None:
    if isinstance(instant, datetime):
        if instant.tzinfo is None:
            raise ConfigurationError(
                "expires_at has no time zone; give datetime(…, tzinfo=UTC) or seconds since 1970",
                param="expires_at",
            )
        return int(instant.timestamp())
    return None if instant is None else int(instant)


def _path(job_id: str | HasId) -> str:
    return f"/fine_tuning/jobs/{in_path(job_id)}/checkpoints"
