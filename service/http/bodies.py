"""Request bodies: limited while they stream in, unpacked, and parsed once into a strict model."""

import json
import re
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from itertools import islice
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from dar.errors import InvalidRequestError, PayloadTooLargeError, Problem, UnsupportedMediaTypeError
from dar.settings import Settings
from service.http import errors
from service.installation import CurrentInstallation

Model = TypeVar("Model", bound=BaseModel)
GZIP_WINDOW_BITS = 31
MAX_INTEGER = 2**63 - 1
MAX_EXACT = 2**53
"""Up to here every integer is exact as a float."""
BODIES: list[type[BaseModel]] = []
"""The models of bodies that routes read themselves, for the OpenAPI document."""
NUL = "must not contain the character NUL (U+0000), which the database cannot store"
LARGE_BYTES = 64 * 1024
MOST_REPEATED = 8
"""Most repeated keys that one error lists."""
# Walking through a whole body takes longer than parsing it, and few bodies have one of these.
_SUSPICIOUS = re.compile(rb"\\u0000|\d{19}")


async def limited(
    stream: AsyncIterator[bytes], limit: int, what: str
) -> AsyncGenerator[bytes, None]:
    """The chunks of a body of at most ``limit`` bytes.

    Raises:
        PayloadTooLargeError: The body is longer; the rest of it is not read.
    """
    total = 0
    async for chunk in stream:
        total += len(chunk)
        if total > limit:
            raise PayloadTooLargeError(
                f"the {what} is over the limit of {limit:,} bytes; send less at once"
            )
        yield chunk


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, decompressed if it is gzip.

    Raises:
        PayloadTooLargeError: It has over ``limit`` bytes, compressed or decompressed.
        UnsupportedMediaTypeError: Its encoding is neither gzip nor identity.
        InvalidRequestError: It is not valid gzip.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in {"identity", "gzip"}:
        raise UnsupportedMediaTypeError(
            f"content-encoding {encoding!r} is not supported; send gzip or none"
        )
    chunks = [chunk async for chunk in limited(request.stream(), limit, "body")]
    body = b"".join(chunks)
    return _gunzip(body, limit) if encoding == "gzip" else body


def _gunzip(packed: bytes, limit: int) -> bytes:
    unpacker = zlib.decompressobj(GZIP_WINDOW_BITS)
    try:
        body = unpacker.decompress(packed, limit + 1)
    except zlib.error as error:
        raise InvalidRequestError(
            f"the body is not valid gzip: {error}", code="invalid_gzip"
        ) from None
    if len(body) > limit:
        raise PayloadTooLargeError(f"the unpacked body is over the limit of {limit:,} bytes")
    if not unpacker.eof:
        raise InvalidRequestError("the gzip body ends too early", code="invalid_gzip")
    return body


def body_of(
    model: type[Model],
    limit: Callable[[Settings], int] | None = None,
    *,
    is_optional: bool = False,
    is_of_worker: bool = False,
) -> Callable[..., Coroutine[Any, Any, Model]]:
    """A dependency that reads the request's JSON body as a ``model``.

    FastAPI reads its own body parameters before any dependency, so before the key is checked. This
    dependency reads the body after that check.

    Args:
        model: Model of the body.
        limit: Returns the limit in bytes; default: ``max_body_bytes`` of the settings.
        is_optional: Whether an empty body counts as an empty object.
        is_of_worker: Whether our own code writes it, so that it repeats no key. It may be large.
    """
    BODIES.append(model)

    async def read(request: Request, installation: CurrentInstallation) -> Model:
        settings = installation.settings
        most = settings.max_body_bytes if limit is None else limit(settings)
        media_type = request.headers.get("content-type", "application/json").split(";")[0].strip()
        if media_type.lower() != "application/json":
            raise UnsupportedMediaTypeError(
                f"content-type {media_type!r} is not supported; send application/json"
            )
        body = await read_body(request, most)
        if is_optional and not body:
            body = b"{}"
        try:
            made = model.model_validate_json(body)
        except ValidationError as error:
            raise errors.invalid_body(error, model) from None
        if not is_of_worker and (problems := await _repeated_keys(body)):
            raise errors.invalid(problems)
        if _SUSPICIOUS.search(body) and (problems := list(_unstorable(json.loads(body)))):
            raise errors.invalid(problems)
        return made

    return read


class _Repeating(dict[str, Any]):
    """An object of which some keys are repeated; `names` has these."""

    names: tuple[str, ...] = ()


async def _repeated_keys(body: bytes) -> list[Problem]:
    """What `repeated_keys` finds; a large body is read in a thread, as others must not wait."""
    if len(body) <= LARGE_BYTES:
        return repeated_keys(body)
    return await run_in_threadpool(repeated_keys, body)


def repeated_keys(body: bytes) -> list[Problem]:
    """A problem for each key that is given twice in an object, as one of the values would be lost.

    Args:
        body: Valid JSON.
    """
    has_some = False

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal has_some
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        has_some = True
        repeating = _Repeating(found)
        counts = Counter(name for name, _ in pairs)
        repeating.names = tuple(name for name, count in counts.items() if count > 1)
        return repeating

    content = json.loads(body, object_pairs_hook=made)
    return list(islice(_repeated_in(content), MOST_REPEATED)) if has_some else []


def _repeated_in(value: object, path: tuple[str | int, ...] = ()) -> Iterator[Problem]:
    if isinstance(value, _Repeating):
        for name in value.names:
            where = errors.path_of((*path, name)).replace("\0", "\\u0000")
            yield Problem("this key is given twice; send it once", where, "duplicate_key")
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _repeated_in(item, (*path, index))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _repeated_in(item, (*path, name))


def _unstorable(value: object, path: tuple[str | int, ...] = ()) -> Iterator[Problem]:
    where = errors.path_of(path).replace("\0", "\\u0000") or None
    if isinstance(value, str) and "\0" in value:
        yield Problem(NUL, where, "nul_character")
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        yield Problem(f"must be an integer of at most {MAX_INTEGER}", where, "integer_too_large")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unstorable(item, (*path, index))
    elif isinstance(value, dict):
        for name, item in value.items():
            if "\0" in name:
                yield Problem(f"the name of a field {NUL}", where, "nul_character")
            yield from _unstorable(item, (*path, name))


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI entry of a body that a route reads itself."""
    if model not in BODIES:
        BODIES.append(model)
    ref = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": ref}}}}
