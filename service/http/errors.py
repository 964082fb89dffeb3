"""Exception handlers: every error of every route is rendered here, in one shape."""

import errno
import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Mount, compile_path

from dar.errors import (
    AuthenticationError,
    ConflictError,
    DARError,
    GoneError,
    InvalidRequestError,
    InvalidResultError,
    MethodNotAllowedError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    PreconditionFailedError,
    Problem,
    RangeNotSatisfiableError,
    RateLimitError,
    RequestTimeoutError,
    ServiceUnavailableError,
    UnsupportedMediaTypeError,
)
from dar.protocol.rows import kind_of_value
from service.storage.storage import scratch_full, storage_full
from service.store.database import is_outage

log = structlog.get_logger()

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_DATABASE = re.compile(r"disk is full|no space left on device", re.IGNORECASE)
"""How SQLite and PostgreSQL say so."""
RETRY_AFTER_SECONDS = 1.0
MAX_RETRY_AFTER_SECONDS = 120.0
"""The OpenAI client does not retry at all after a longer wait."""
ERROR_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
_DESCRIPTIONS = {
    kind.status: inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    for kind in (
        *(InvalidRequestError, AuthenticationError, PermissionDeniedError, NotFoundError),
        *(RequestTimeoutError, ConflictError, GoneError, PayloadTooLargeError),
        *(UnsupportedMediaTypeError, RangeNotSatisfiableError, InvalidResultError, RateLimitError),
        PreconditionFailedError,
    )
}
_WORDS = {
    "extra_forbidden": "unknown field",
    "missing": "this field is required",
    "finite_number": "must be a finite number, not NaN or infinity",
}
SHOWN = frozenset(
    {
        "float_type", "int_type", "bool_type", "float_parsing", "int_parsing", "bool_parsing",
        "int_from_float", "literal_error", "greater_than", "greater_than_equal", "less_than",
        "less_than_equal", "union_form",
    }
)  # fmt: skip
"""Errors of pydantic whose message shows what was sent."""
TYPES = frozenset({"float_type", "int_type", "bool_type"})
"""Those among them that a text in place of a number or a boolean causes."""


def install(app: FastAPI) -> None:
    """Render every error of ``app`` as the one error body."""
    app.add_exception_handler(DARError, _on_dar_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(StarletteHTTPException, _on_http_exception)
    app.add_exception_handler(SQLAlchemyError, _on_database_error)
    app.add_exception_handler(OSError, _on_os_error)


def may_answer(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The entries of the OpenAPI document for errors.

    Routes name those that do not follow from their keys, bodies and paths (`service.openapi`).
    """
    return {
        status: {"description": _DESCRIPTIONS[status], "content": ERROR_CONTENT}
        for status in statuses
    }


def request_id(request: Request) -> str | None:
    """The id in the response's ``x-request-id`` header."""
    value = request.scope.get("dar_request_id")
    return value if isinstance(value, str) else None


def render(
    error: DARError, request_id: str | None, headers: Mapping[str, str] | None = None
) -> Response:
    """The response for an error."""
    extra = dict(headers or {})
    if isinstance(error, ConflictError):
        # Without it the OpenAI client retries a request that cannot succeed.
        extra["x-should-retry"] = "false"
    if error.status == 408:
        extra["connection"] = "close"  # the rest of the body must not be read as a request
    if error.status == 401:
        extra["www-authenticate"] = "Bearer"
    if error.status in {429, 503}:
        wait = min(error.retry_after_seconds or RETRY_AFTER_SECONDS, MAX_RETRY_AFTER_SECONDS)
        extra["retry-after"] = str(max(1, round(wait)))
        extra["retry-after-ms"] = str(round(wait * 1000))
    return JSONResponse(error.body(request_id), status_code=error.status, headers=extra)


def internal_error(request_id: str | None) -> Response:
    """The response for a fault of the service. Its cause is in the log, not in the response."""
    error = DARError(
        "the service has failed; report the request id to its operator: the log has the cause"
    )
    return render(error, request_id)


def problems_of(
    errors: Sequence[Mapping[str, Any]], model: type[BaseModel] | None = None
) -> list[Problem]:
    """Pydantic's errors, with paths like ``method.dar.hyperparameters.alpha``."""
    return [
        Problem(
            message=_message(item, model),
            param=path_of(item["loc"]) or None,
            code=str(item["type"]),
        )
        for item in errors
    ]


def path_of(location: Sequence[str | int]) -> str:
    """The path of a location: ``("components", 0, "url")`` is ``components[0].url``."""
    path = ""
    for part in location:
        if part == "[key]":  # pydantic marks a mapping's key this way, after the key
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def invalid(problems: Sequence[Problem]) -> InvalidRequestError:
    """One error for several problems. Its message is that of the first problem."""
    first = problems[0]
    where = f"{first.param}: " if first.param else ""
    more = f" (and {len(problems) - 1} more, see errors)" if len(problems) > 1 else ""
    return InvalidRequestError(
        f"{where}{first.message}{more}", param=first.param, code=first.code, problems=problems
    )


def invalid_body(error: ValidationError, model: type[BaseModel]) -> InvalidRequestError:
    """The error for a body that is not a valid ``model``."""
    return invalid(problems_of(error.errors(include_url=False), model))


def _message(item: Mapping[str, Any], model: type[BaseModel] | None) -> str:
    message = _WORDS.get(item["type"], str(item["msg"])) + _given(item)
    if item["type"] == "extra_forbidden" and model is not None:
        name = str(item["loc"][-1])
        names = _field_names(model, item["loc"][:-1])
        close = get_close_matches(name, names, n=1, cutoff=0.7)
        place = next(_places_of(name, model), None)
        if place is not None:
            message += f" here; it belongs into {place}"
        elif close:
            message += f"; did you mean {close[0]!r}?"
        elif names:
            message += f"; known here: {', '.join(names)}"
    return message


def _given(item: Mapping[str, Any]) -> str:
    """What was sent in place of a number, a boolean or one of some words; no other value is shown.

    Texts of other fields may be secrets.
    """
    value = item.get("input")
    if item["type"] not in SHOWN:
        return ""
    if not isinstance(value, str | int | float):
        return f", but it is {kind_of_value(value)}"
    shown = f"{json.dumps(value, ensure_ascii=False):.60}"
    if isinstance(value, str) and item["type"] in TYPES:
        advice = "; send it without quotes" if _is_plain(value) else ""
        return f", but it is the text {shown}{advice}"
    return f", but it is {shown}"


def _is_plain(text: str) -> bool:
    """Whether a text would be a number or a boolean without its quotes."""
    try:
        return text in {"true", "false"} or math.isfinite(float(text))
    except ValueError:
        return False


def _places_of(name: str, model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Paths of objects inside ``model``, its own excepted, that have a field ``name``."""
    for field_name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is None or "list[" in str(field.annotation):
            continue
        here = f"{path}.{field_name}".removeprefix(".")
        if name in inner.model_fields:
            yield here
        yield from _places_of(name, inner, here)


def _field_names(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    current: type[BaseModel] = model
    for part in location:
        field = current.model_fields.get(str(part))
        if isinstance(part, int):
            continue
        inner = None if field is None else _model_in(field.annotation)
        if inner is None:
            return []
        current = inner
    return list(current.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _model_in(inner)) is not None:
            return found
    return None


async def _on_dar_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DARError)
    if error.status >= 500:
        log.warning("request failed", code=error.error_code, message=error.message)
    return render(error, request_id(request))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # The first part of a location is the kind of the parameter (query, path, header).
    found = [{**item, "loc": item["loc"][1:]} for item in error.errors()]
    return render(invalid(problems_of(found)), request_id(request))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    here = f"{request.method} {request.url.path}"
    made: DARError
    if error.status_code == 404:
        advice = "/openapi.json lists the existing ones"
        if _is_under_v1(request):
            advice = f"it is /v1{request.url.path}: let the client's base_url end with /v1"
        made = NotFoundError(f"there is no route {here}; {advice}")
    elif error.status_code == 405:
        made = MethodNotAllowedError(f"{here} is not supported; this path has other methods")
    elif error.status_code == 413:
        made = PayloadTooLargeError(str(error.detail))
    elif error.status_code < 500:
        made = InvalidRequestError(str(error.detail))
    else:
        made = DARError(str(error.detail))
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 405:
        headers["allow"] = ", ".join(_methods_of(request.app, request.url.path))
    return render(made, request_id(request), headers)


def _methods_of(app: FastAPI, path: str) -> list[str]:
    """All methods of a path. The router names only those of the first route that fits."""
    found: set[str] = set()
    for context in iter_route_contexts(app.routes):
        if compile_path(context.path or "")[0].match(path) is not None:
            found.update(context.methods or ())
    return sorted(found)


def _is_under_v1(request: Request) -> bool:
    scope = {**request.scope, "path": f"/v1{request.url.path}"}
    return any(
        not isinstance(route, Mount) and route.matches(scope)[0] is not Match.NONE
        for route in request.app.routes
    )


async def _on_os_error(request: Request, error: Exception) -> Response:
    """A full disk passes; anything else is a fault of the service, and handled as such."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        folder = request.app.state.runtime.artifacts.storage.scratch_folder
        why = f"{error.strerror}"
        made = storage_full(why) if folder is None else scratch_full(folder, why)
        return await _on_dar_error(request, made)
    raise error


async def _on_database_error(request: Request, error: Exception) -> Response:
    if isinstance(error, DBAPIError) and FULL_DATABASE.search(str(error.orig)):
        return await _on_dar_error(request, storage_full("its database cannot grow"))
    if not is_outage(error):
        log.error("database error", exc_info=error)
        return internal_error(request_id(request))
    log.warning("database unavailable", error=str(error))
    made = ServiceUnavailableError(
        "the database does not respond; try again in a moment (a change may have been stored)",
        code="database_unavailable",
    )
    return render(made, request_id(request))
