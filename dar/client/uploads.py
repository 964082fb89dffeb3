"""Training files that are sent in parts, for files that are too large for one request."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dar.client.arguments import HasId, file_name, in_path, opened
from dar.client.transport import Transport
from dar.errors import ConfigurationError, DARError
from dar.protocol.file_uploads import MAX_PART_BYTES, FileUpload, FileUploadPart
from dar.protocol.files import File

PATH = "/uploads"
MIME_TYPE = "application/jsonl"


class Uploads:
    """Files in parts: ``client.uploads``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload_file(
        self,
        file: str | Path | bytes | BinaryIO,
        *,
        filename: str | None = None,
        part_bytes: int = MAX_PART_BYTES,
        upload_id: str | HasId | None = None,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> File:
        """Send a file in parts, and complete it.

            file = client.uploads.upload_file("prompts.jsonl")

        Args:
            file: A path, the content, or an open binary file, read from its current position.
            filename: Name that the service shows; default: the name of the path.
            part_bytes: Size of each part but the last; at most 64 MiB.
            upload_id: An upload of this file that was interrupted; parts that have arrived are not
                sent again.
            on_bytes: Called with the bytes that have arrived and the total.

        Raises:
            ConfigurationError: ``file`` or ``part_bytes`` cannot be used.
            InvalidRequestError: A row is invalid. The problems name the rows.
            ConflictError: The upload has ended.
            OSError: The file cannot be read.
        """
        if type(part_bytes) is not int or not 0 < part_bytes <= MAX_PART_BYTES:
            raise ConfigurationError(
                f"part_bytes is {part_bytes!r}, but it must be a number of bytes from 1 to "
                f"{MAX_PART_BYTES}",
                param="part_bytes",
            )
        with contextlib.ExitStack() as stack:
            content, own_name = opened(file)
            if content is not file:
                stack.callback(content.close)
            total = content.seek(0, 2)
            content.seek(0)
            if upload_id is None:
                upload = self.create(bytes=total, filename=file_name(filename or own_name))
            else:
                upload = self.retrieve(upload_id)
            return self._send(upload, _parts(content, part_bytes), on_bytes)

    def _send(
        self,
        upload: FileUpload,
        parts: Iterator[bytes],
        on_bytes: Callable[[int, int], None] | None,
    ) -> File:
        arrived = {part.sha256: part.id for part in upload.parts}
        ids, sent, whole = list[str](), 0, hashlib.md5(usedforsecurity=False)
        for part in parts:
            whole.update(part)
            sha256 = hashlib.sha256(part).hexdigest()
            made = arrived.pop(sha256, None)  # each is named once, also where two are alike
            ids.append(made or self.create_part(upload, part).id)
            sent += len(part)
            if on_bytes is not None:
                on_bytes(sent, upload.bytes)
        done = self.complete(upload, ids, md5=whole.hexdigest())
        if done.file is None:
            raise DARError(f"upload {upload.id} is complete, but its file was deleted meanwhile")
        return done.file

    def create(
        self, *, bytes: int, filename: str, purpose: str = "fine-tune", mime_type: str = MIME_TYPE
    ) -> FileUpload:
        """Begin a file of so many bytes.

        Raises:
            PayloadTooLargeError: The service takes no file of this size.
        """
        body = {"bytes": bytes, "filename": filename, "purpose": purpose, "mime_type": mime_type}
        return self._transport.post(PATH, FileUpload, body=body)

    def retrieve(self, upload_id: str | HasId) -> FileUpload:
        """An upload with the parts that have arrived."""
        return self._transport.get(f"{PATH}/{in_path(upload_id)}", FileUpload)

    def create_part(self, upload_id: str | HasId, data: bytes) -> FileUploadPart:
        """Send a part. Parts may be sent in any order, and at the same time.

        Raises:
            ConflictError: The upload has ended.
        """

        def upload() -> Mapping[str, Any]:
            return {"files": {"data": ("part", data, "application/octet-stream")}}

        return self._transport.post(
            f"{PATH}/{in_path(upload_id)}/parts", FileUploadPart, upload=upload
        )

    def complete(
        self, upload_id: str | HasId, part_ids: Sequence[str | HasId], *, md5: str | None = None
    ) -> FileUpload:
        """Make the file of its parts, in this order.

        Raises:
            InvalidRequestError: A row is invalid, or the parts have another size than the file.
            ConflictError: The upload has ended, or the file has another MD5.
        """
        body = {"part_ids": list(part_ids)} | ({} if md5 is None else {"md5": md5})
        return self._transport.post(f"{PATH}/{in_path(upload_id)}/complete", FileUpload, body=body)

    def cancel(self, upload_id: str | HasId) -> FileUpload:
        """End an upload without a file.

        Raises:
            ConflictError: It was completed, or has expired.
        """
        return self._transport.post(f"{PATH}/{in_path(upload_id)}/cancel", FileUpload)


def _parts(content: BinaryIO, part_bytes: int) -> Iterator[bytes]:
    while part := content.read(part_bytes):
        yield part
