"""Uploaded files."""

from typing import Literal

from dar.protocol.base import Output, UnixSeconds


class File(Output):
    """An uploaded training file: OpenAI's ``file``, with its digest, rows and columns."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: UnixSeconds
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    sha256: str
    num_rows: int
    columns: list[str]
    """Columns that every row has."""
