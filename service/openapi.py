"""The OpenAPI document: what FastAPI knows, and what it cannot know.

FastAPI sees neither the bodies that `service.http.bodies.body_of` reads, nor which errors follow
from keys, bodies and paths, and it documents a 422 of its own where this service answers 400.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute, iter_route_contexts
from pydantic.json_schema import models_json_schema

from dar.protocol.base import ErrorBody
from service.api import query, reward_callbacks
from service.http import auth, bodies, errors

KEY, ATTEMPT, CALLBACK = "bearer", "attempt", "callback"
SCHEMES = {
    KEY: "A key of a user or a worker.",
    ATTEMPT: "The token of an attempt, which the claim of its lease returns.",
    CALLBACK: "The token of a reward request, from `reply.callback`.",
}
_FALSE = ("HTTPValidationError", "ValidationError")
"""FastAPI's models of its own 422."""


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of ``app``."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, schemas = models_json_schema(
            [(ErrorBody, "serialization"), *((model, "validation") for model in bodies.BODIES)],
            ref_template="#/components/schemas/{model}",
        )
        components = document.setdefault("components", {})
        components["schemas"] = {**schemas["$defs"], **components.get("schemas", {})}
        for name in _FALSE:
            components["schemas"].pop(name, None)
        components["securitySchemes"] = {
            name: {"type": "http", "scheme": "bearer", "description": text}
            for name, text in SCHEMES.items()
        }
        document["security"] = [{KEY: []}]
        for route, path in _routes(app):
            for method in route.methods or ():
                _complete(document["paths"][path][method.lower()], route, path)
        app.openapi_schema = document
    return app.openapi_schema


def _routes(app: FastAPI) -> Iterator[tuple[APIRoute, str]]:
    """The documented routes, each with its path as the document writes it."""
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        if isinstance(route, APIRoute) and route.include_in_schema:
            yield route, re.sub(r"{(\w+):\w+}", r"{\1}", context.path or "")


def _complete(operation: dict[str, Any], route: APIRoute, path: str) -> None:
    """Add security and errors to an operation."""
    calls = set(_calls_of(route.dependant))
    security = _security_of(calls)
    if security != [KEY]:
        operation["security"] = [{name: []} for name in security]
    responses = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    statuses = {400} if query.refuse_unusable in calls or path.startswith("/v1/") else set()
    if security:
        statuses.add(401)
    if any(isinstance(call, auth.UserWith) for call in calls) or KEY in security:
        statuses.add(403)
    if "{" in path:
        statuses.add(404)
    if "requestBody" in operation:
        statuses |= {408, 413, 415}
    for status, response in errors.may_answer(*statuses).items():
        responses.setdefault(str(status), response)
    for status, response in responses.items():
        if status >= "4" and "content" not in response:
            response["content"] = errors.ERROR_CONTENT
    responses["default"] = {"description": "Any other error.", "content": errors.ERROR_CONTENT}
    operation["responses"] = dict(sorted(responses.items()))


def _calls_of(dependant: Dependant) -> Iterator[Callable[..., Any]]:
    for inner in dependant.dependencies:
        if inner.call is not None:
            yield inner.call
        yield from _calls_of(inner)


def _security_of(calls: set[Callable[..., Any]]) -> list[str]:
    """The credentials of which a route takes one; none: it is open to everybody."""
    if reward_callbacks.holder in calls:
        return [CALLBACK]
    if auth.lease_holder in calls:
        return [ATTEMPT]
    if auth.lease_sender in calls:
        return [ATTEMPT, KEY]
    return [KEY] if auth.principal in calls else []
