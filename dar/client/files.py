"""Training files."""

import base64
import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dar.client.arguments import HasId, file_name, in_path, opened
from dar.client.paging import Listing
from dar.client.transport import Transport
from dar.errors import DARError
from dar.protocol.base import Deleted, Page
from dar.protocol.file_validation import FileValidation
from dar.protocol.files import File

PATH = "/files"
Order = Literal["asc", "desc"]


class Files:
    """Uploaded files: ``client.files``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        file: str | Path | bytes | BinaryIO,
        *,
        purpose: str = "fine-tune",
        filename: str | None = None,
    ) -> File:
        """Upload a JSONL file of prompts.

            file = client.files.create("prompts.jsonl")
            file = client.files.create(b'{"prompt": "The soup was"}')

        Args:
            file: A path, the content, or an open binary file, read from its current position.
            purpose: Only ``fine-tune`` is supported.
            filename: Name that the service shows; default: the name of the path.

        Raises:
            ConfigurationError: ``file`` is something else.
            InvalidRequestError: A row is invalid. The problems name the rows. Nothing is stored.
            OSError: The file cannot be read.
        """
        with contextlib.ExitStack() as stack:
            content, own_name = opened(file)
            if content is not file:
                stack.callback(content.close)
            name = file_name(filename or own_name)

            def upload() -> Mapping[str, Any]:
                content.seek(0)
                return {
                    "data": {"purpose": purpose},
                    "files": {"file": (name, content, "application/jsonl")},
                }

            return self._transport.post(PATH, File, upload=upload)

    def list(
        self, *, purpose: str | None = None, order: Order = "desc", limit: int = 20
    ) -> Listing[File]:
        """All files, newest first; ``limit`` is the size of a page."""
        params = {"purpose": purpose, "order": order, "limit": limit}
        return Listing(self._transport, PATH, Page[File], params)

    def retrieve(self, file_id: str | HasId) -> File:
        """One file, without its content."""
        return self._transport.get(f"{PATH}/{in_path(file_id)}", File)

    def content(self, file_id: str | HasId) -> bytes:
        """The content of a file, as it was uploaded.

        Raises:
            DARError: It arrived altered.
        """
        answer = self._transport.send("GET", f"{PATH}/{in_path(file_id)}/content")
        digest = base64.b64encode(hashlib.sha256(answer.content).digest()).decode()
        # A store to which the service redirects does not know the digest, but the service says it.
        expected = [*answer.history, answer][0].headers.get("repr-digest", "")
        if "sha-256=:" in expected and f"sha-256=:{digest}:" not in expected:
            raise DARError(
                f"the file {in_path(file_id)} arrived altered: its SHA-256 differs; try again"
            )
        return answer.content

    def validate(self, file_id: str | HasId, *, model: str | None = None) -> FileValidation:
        """Read a file again: its columns, how long its prompts are, which jobs can train on it.

        Args:
            file_id: The file.
            model: A model of the installation whose tokens are counted.

        Raises:
            ConflictError: The content is damaged in the store.
        """
        path = f"{PATH}/{in_path(file_id)}/validate"
        answer = self._transport.send("POST", path, params={"model": model})
        return self._transport.parse(answer, FileValidation)

    def delete(self, file_id: str | HasId) -> Deleted:
        """Delete a file.

        Raises:
            ConflictError: A job still needs it.
        """
        return self._transport.delete(f"{PATH}/{in_path(file_id)}", Deleted)
