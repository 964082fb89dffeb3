"""Training files that are sent in parts: OpenAI's ``upload`` and ``upload.part``."""

from typing import Annotated, Literal

from pydantic import Field

from dar.protocol.base import Input, Output, UnixSeconds
from dar.protocol.files import File

MAX_PART_BYTES = 64 * 1024**2
"""Largest part, and the size of all parts but the last that clients choose."""
MOST_PARTS = 1000
"""Most parts of an upload."""
ShortName = Annotated[str, Field(min_length=1, max_length=256)]


class NewFileUpload(Input):
    """Begins a file whose parts are to follow."""

    bytes: Annotated[int, Field(ge=1, le=2**53)]
    """Size of the whole file."""
    filename: ShortName
    mime_type: ShortName
    """Kept as it is; the content is read as JSON Lines whatever it says."""
    purpose: ShortName
    """``fine-tune``."""


class CompletedParts(Input):
    """Which parts make the file, and in which order."""

    part_ids: Annotated[list[ShortName], Field(min_length=1, max_length=MOST_PARTS)]
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = None
    """Digest of the whole file in hex, to be compared with what has arrived."""


class FileUploadPart(Output):
    """A part of a file that has arrived."""

    id: str
    object: Literal["upload.part"]
    created_at: UnixSeconds
    upload_id: str
    bytes: int
    sha256: str


class FileUpload(Output):
    """A file that arrives in parts."""

    id: str
    object: Literal["upload"]
    bytes: int
    """Size of the whole file, as it was announced."""
    created_at: UnixSeconds
    expires_at: UnixSeconds
    """When it ends by itself, unless it was completed."""
    filename: str
    purpose: str
    mime_type: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: File | None
    """The file that it has become; null: it has become none, or the file was deleted."""
    parts: list[FileUploadPart]
    """What has arrived, oldest first; empty after the end."""
