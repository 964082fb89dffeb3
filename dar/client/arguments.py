"""Arguments of SDK methods: ids, lists, mappings and files, as the service takes them.

What cannot be sent is refused before a request, and the message names the argument.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import quote

from pydantic import BaseModel, SecretStr

from dar.errors import ConfigurationError

FILE_KINDS = "a path, bytes or a file that was opened for reading bytes"
UPLOAD_NAME = "upload.jsonl"


class HasId(Protocol):
    """An object that the service returned, such as a `Job` or a `File`."""

    @property
    def id(self) -> str: ...


def id_of(given: str | HasId) -> str:
    """The id of an object, which may be given itself.

    Raises:
        ConfigurationError: It is none.
    """
    found = given if isinstance(given, str) else getattr(given, "id", None)
    if not isinstance(found, str) or found in {"", ".", ".."} or _as_utf8(found) != found:
        raise ConfigurationError(
            f"an id is {given!r:.80}, but it must be a text like job.id, or the object that has it"
        )
    return found


def in_path(given: str | HasId) -> str:
    """The id of an object as one part of a path.

    Raises:
        ConfigurationError: It is none.
    """
    return quote(id_of(given), safe="")


def key_of(given: object) -> str:
    """The text of a key, which may be a ``SecretStr``.

    Raises:
        ConfigurationError: It is neither. The message does not show it.
    """
    found = given.get_secret_value() if isinstance(given, SecretStr) else given
    if not isinstance(found, str):
        raise ConfigurationError(
            f"api_key is of the type {type(given).__name__}, but it must be a text or a SecretStr",
            param="api_key",
        )
    return found


def url_of(given: object) -> str:
    """The text of a URL, which may be an object of an HTTP library or of pydantic.

    Raises:
        ConfigurationError: It is something else. The message does not show it.
    """
    if isinstance(given, str):
        return given
    if type(given).__name__.endswith(("URL", "Url")):
        return str(given)
    raise ConfigurationError(
        f"base_url is of the type {type(given).__name__}, but it must be a text like "
        "http://127.0.0.1:8321, or a URL of httpx",
        param="base_url",
    )


def texts(name: str, given: object) -> list[str]:
    """A list of texts; a single one stands for a list of one.

    Raises:
        ConfigurationError: It is something else.
    """
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, Sequence | set | frozenset) or not all(
        isinstance(one, str) for one in found
    ):
        raise ConfigurationError(
            f"{name} is {given!r:.80}, but it must be a list of texts", param=name
        )
    return list(found)


def mapping(name: str, given: object) -> dict[str, Any]:
    """A copy of a mapping.

    Raises:
        ConfigurationError: It is none. The message does not show it, as it may hold a secret.
    """
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"{name} is of the type {type(given).__name__}, but it must be a dict", param=name
        )
    return dict(given)


def mappings(name: str, given: object) -> list[dict[str, Any]]:
    """Copies of the mappings of a list.

    Raises:
        ConfigurationError: It is none.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
        raise ConfigurationError(
            f"{name} is of the type {type(given).__name__}, but it must be a list of dicts",
            param=name,
        )
    return [mapping(f"{name}[{place}]", one) for place, one in enumerate(given)]


def as_json(body: object) -> bytes:
    """The JSON of a request. Objects of the service stand for their ids.

    NaN is sent as it is, so that the service names its path: a null could pass as a default.

    Raises:
        ConfigurationError: JSON cannot carry it.
    """
    try:
        return json.dumps(body, default=_plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"the request cannot be written as JSON: {error}; give texts, numbers, booleans, lists "
            "and dicts"
        ) from None


def _plain(value: object) -> object:
    found = getattr(value, "id", None)
    if isinstance(found, str):
        return found
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    raise TypeError(f"it holds a value of the type {type(value).__name__}")


def opened(file: object) -> tuple[BinaryIO, str]:
    """The content as a file that a retry can read again from its start, and its name.

    The caller closes the file, unless it is ``file`` itself.

    Raises:
        ConfigurationError: It is neither a path, bytes nor an open binary file.
        OSError: It cannot be read.
    """
    if isinstance(file, str | os.PathLike):
        path = Path(file).expanduser()
        return path.open("rb"), path.name
    if isinstance(file, bytes | bytearray | memoryview):
        return io.BytesIO(file), UPLOAD_NAME
    if isinstance(file, io.TextIOBase):
        raise ConfigurationError(
            f"file was opened for reading text, but it must be {FILE_KINDS}: open(…, 'rb')",
            param="file",
        )
    if not hasattr(file, "read"):
        raise ConfigurationError(
            f"file is of the type {type(file).__name__}, but it must be {FILE_KINDS}", param="file"
        )
    return _rereadable(file), _name_of(file)


def _rereadable(file: Any) -> BinaryIO:  # noqa: ANN401 - anything with a method read
    if _is_plain(file):
        whole: BinaryIO = file
        return whole
    content = file.read()
    if not isinstance(content, bytes):
        raise ConfigurationError(
            f"file gives {type(content).__name__}, not bytes; it must be {FILE_KINDS}", param="file"
        )
    return io.BytesIO(content)


def _is_plain(file: Any) -> bool:  # noqa: ANN401 - anything with a method read
    """Whether it is at its start, and as long as the file that the system has for it.

    A compressed file is longer than that, and its length would be sent as the other one.
    """
    try:
        if file.tell() != 0:
            return False
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
    except (AttributeError, OSError, ValueError):
        return False
    try:
        return bool(length == os.fstat(file.fileno()).st_size)
    except (AttributeError, OSError, ValueError):
        return isinstance(file, io.BytesIO)


def _name_of(file: object) -> str:
    name = getattr(file, "name", None)
    return Path(name).name if isinstance(name, str) else UPLOAD_NAME


def file_name(name: str) -> str:
    """A name of a file as it can be sent: with U+FFFD for each byte that is not UTF-8."""
    return _as_utf8(name)


def _as_utf8(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
