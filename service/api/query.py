"""Strict query and path parameters: an unknown one is an error, as in bodies."""

import re
from collections import Counter
from difflib import get_close_matches
from typing import get_args

from fastapi import Request, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute

from dar.errors import Problem
from service.http import auth, errors
from service.http.bodies import NUL
from service.installation import CurrentInstallation

LABELS = "metadata"
"""The parameter whose keys are in brackets; no other has keys."""
ODD_NUMBER = re.compile(r"\s*[+-]?[\d_]+(?:\.[\d_]*)?\s*")
PLAIN_NUMBER = re.compile(r"-?[0-9]+")
LEAST_LIKENESS = 0.7
"""Of a name that a message proposes, from 0 to 1."""


def refuse_unusable(request: Request, installation: CurrentInstallation) -> None:
    """Reject unknown query parameters, unusable values, and unprintable paths.

    Raises:
        AuthenticationError: There are some, and the request has no known key. Only users with a
            key may see the parameters of a route.
        InvalidRequestError: There are some. The message names the parameters of the route.
    """
    problems = [*_unknown(request), *_unstorable(request), *_unlike_numbers(request)]
    problems = problems or _repeated(request) or _unprintable(request)
    if problems:
        auth.authenticate(request, installation)
        raise errors.invalid(problems)


def _unknown(request: Request) -> list[Problem]:
    route = request.scope["route"]
    if not request.query_params or not isinstance(route, APIRoute):
        return []
    known = _known(route)
    return [
        Problem(_message(name, known), name, "unknown_parameter")
        for name in request.query_params
        if name not in known and not (LABELS in known and name.startswith(f"{LABELS}["))
    ]


def _repeated(request: Request) -> list[Problem]:
    counts = Counter(name for name, _ in request.query_params.multi_items())
    return [
        Problem("this query parameter is given twice; send it once", name, "duplicate_parameter")
        for name, count in counts.items()
        if count > 1
    ]


def _unstorable(request: Request) -> list[Problem]:
    given = [*request.path_params.items(), *request.query_params.multi_items()]
    return [
        Problem(NUL, name.replace("\0", "\\u0000"), "nul_character")
        for name, value in given
        if "\0" in name or "\0" in value
    ]


def _unlike_numbers(request: Request) -> list[Problem]:
    """Whole numbers in a notation that only Python's parser accepts, like ``1_0`` and ``1.0``."""
    route = request.scope["route"]
    if not isinstance(route, APIRoute):
        return []
    whole = {
        field.alias
        for field in get_flat_params(route.dependant)
        if int in {field.field_info.annotation, *get_args(field.field_info.annotation)}
    }
    return [
        Problem(f"write a whole number with digits only, not {value[:40]!r}", name, "int_parsing")
        for name, value in request.query_params.multi_items()
        if name in whole and ODD_NUMBER.fullmatch(value) and not PLAIN_NUMBER.fullmatch(value)
    ]


def _unprintable(request: Request) -> list[Problem]:
    """A control character in the path; the router would ignore a line break at its end."""
    found = next((ch for ch in request.scope["path"] if ch < " " or ch == "\x7f"), None)
    if found is None:
        return []
    message = f"the path contains the control character U+{ord(found):04X}; send it without"
    holding = [name for name, value in request.path_params.items() if found in str(value)]
    return [Problem(message, holding[0] if holding else None, "control_character")]


def _known(route: APIRoute) -> tuple[str, ...]:
    fields = get_flat_params(route.dependant)
    return tuple(field.alias for field in fields if isinstance(field.field_info, params.Query))


def _message(name: str, known: tuple[str, ...]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=LEAST_LIKENESS)
    if close:
        return f"unknown query parameter; did you mean {close[0]!r}?"
    return f"unknown query parameter; this route takes {', '.join(known) or 'none'}"
