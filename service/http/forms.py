"""Multipart forms whose one file is written to where it is kept, and nowhere else."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from dar.errors import InvalidRequestError, UnsupportedMediaTypeError
from service.http.bodies import NUL, limited

if TYPE_CHECKING:
    from tempfile import SpooledTemporaryFile

FORM_BYTES = 64 * 1024
"""Room for the parts of a multipart body besides the file."""


@dataclass(frozen=True, slots=True)
class ReceivedForm:
    """A form, without the content of its file."""

    fields: dict[str, str]
    filename: str
    """Name that the client gives the file; may be empty."""


class _FormParser(MultiPartParser):
    """Writes the form's file to ``target`` in place of a temporary file."""

    target: Path

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        part = self._current_part
        if part.file is not None:
            part.file.file.close()
            part.file.file = self.target.open("w+b")
            written = cast("SpooledTemporaryFile[bytes]", part.file.file)
            self._files_to_close_on_error.append(written)


def declared_bytes(request: Request) -> int:
    """Bytes of the body that the client has announced; 0: it has not."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdecimal() else 0


async def receive_form(
    request: Request, target: Path, *, limit: int, file: str, fields: tuple[str, ...] = ()
) -> ReceivedForm:
    """Read a form while it streams in, and write its file to ``target``.

    Args:
        request: Its body is read after the key was checked.
        target: Path of the file; the caller removes it.
        limit: Most bytes of the file.
        file: Name of the field with the file.
        fields: Names of the other fields that it may have.

    Raises:
        UnsupportedMediaTypeError: The body is no form.
        InvalidRequestError: It cannot be read, has other fields, or no file.
        PayloadTooLargeError: It is too large.
    """
    names = [*fields, file]
    takes = " and ".join(names)
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise UnsupportedMediaTypeError(
            f"an upload is multipart/form-data with the field{'s' * (len(names) > 1)} {takes}"
        )
    stream = limited(request.stream(), limit + FORM_BYTES, "upload")
    parser = _FormParser(
        request.headers, stream, max_files=1, max_fields=16, max_part_size=FORM_BYTES
    )
    parser.target = target
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequestError(
            f"the upload cannot be read: {error.message}", code="invalid_form"
        ) from None
    except UnicodeError:  # a charset of Python that is none of the web, like punycode
        raise InvalidRequestError(
            "the upload cannot be read: its names are not in the charset of its content-type; "
            "leave the charset out, and send names in UTF-8",
            code="invalid_form",
        ) from None
    await form.close()
    for name in form:
        if name not in names:
            raise InvalidRequestError(
                f"{name}: this version takes only {takes}; leave it out",
                param=name,
                code="extra_forbidden",
            )
    texts = {name: value for name, value in form.items() if isinstance(value, str)}
    sent = form.get(file)
    if not isinstance(sent, UploadFile):
        raise InvalidRequestError(f"{file}: no file was sent", param=file, code="missing")
    if "\0" in (sent.filename or ""):
        raise InvalidRequestError(f"the filename {NUL}", param=file, code="nul_character")
    return ReceivedForm(texts, sent.filename or "")
