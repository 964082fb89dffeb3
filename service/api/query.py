"""Query parameters are as strict as bodies: a misspelt one is an error, never ignored."""

from difflib import get_close_matches

from fastapi import Request, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute

from dar.errors import Problem
from service import errors


def refuse_unknown(request: Request) -> None:
    """Raise when the route takes no such parameter.

    Raises:
        InvalidRequestError: It does not; the message names those that it takes.
    """
    route = request.scope["route"]
    if not request.query_params or not isinstance(route, APIRoute):
        return
    known = _known(route)
    problems = [
        Problem(_message(name, known), name, "unknown_parameter")
        for name in request.query_params
        if name.partition("[")[0] not in known
    ]
    if problems:
        raise errors.invalid(problems)


def _known(route: APIRoute) -> tuple[str, ...]:
    fields = get_flat_params(route.dependant)
    return tuple(field.alias for field in fields if isinstance(field.field_info, params.Query))


def _message(name: str, known: tuple[str, ...]) -> str:
    close = get_close_matches(name, known, n=1)
    if close:
        return f"unknown query parameter; did you mean {close[0]!r}?"
    return f"unknown query parameter; this route takes {', '.join(known) or 'none'}"
