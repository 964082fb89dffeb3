"""All routes of the OpenAPI document, walked with input that they must refuse: one rule each.

A route that is new is walked without a line here.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from sqlalchemy import select

from dar.protocol.ids import new_id
from fakes.live_service import SAMPLE, Live, announced_paths
from service import keys
from service.store import tables

JSON = "application/json"
NONE = "nothing-has-this-id"
OWN_CREDENTIAL = ("/v1/worker/", "/v1/reward_callbacks/")
WORDS = {"integer": "three", "number": "many", "boolean": "perhaps"}
"""A value that no parameter of a type takes."""
BODIES = (b"[]", b'"text"', b"7", b'{"nonsense": 1}', b"{", b"\xff")
"""What no route takes as its body."""
VALID: dict[str, dict[str, Any]] = {
    "/complete": {"part_ids": ["part_none"]},
    "/promote": {"alias": "best"},
    "/checkpoints/{checkpoint_id}": {"pinned": True},
    "/jobs/{job_id}": {"metadata": {"a": "b"}},
    "/reward_endpoints/{endpoint_id}": {"name": "renamed"},
}
"""Bodies that a route takes, by the end of its path; other routes take an empty one."""
MOST = 20
"""Digits of a number above each limit."""


@dataclass(frozen=True)
class Route:
    """One operation of the document."""

    method: str
    path: str
    operation: dict[str, Any]

    @property
    def query(self) -> dict[str, dict[str, Any]]:
        listed = self.operation.get("parameters", [])
        return {one["name"]: one["schema"] for one in listed if one["in"] == "query"}

    @property
    def takes_json(self) -> bool:
        return JSON in self.operation.get("requestBody", {}).get("content", {})

    @property
    def is_users(self) -> bool:
        return self.path.startswith("/v1/") and not self.path.startswith(OWN_CREDENTIAL)

    def at(self, known: dict[str, str]) -> str:
        return re.sub(r"{(\w+)}", lambda found: known.get(found[1], NONE), self.path)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def users_routes() -> Iterator[Route]:
    for path, operations in announced_paths().items():
        for method, operation in operations.items():
            route = Route(method.upper(), path, operation)
            if route.is_users:
                yield route


@dataclass(frozen=True)
class Walked:
    """A service that has one object of each kind."""

    live: Live
    ids: dict[str, str]

    def send(self, route: Route, key: httpx2.Client | None = None, **more: Any) -> httpx2.Response:
        return (key or self.live.http).request(route.method, route.at(self.ids), **more)


@pytest.fixture
def walked(live: Live) -> Walked:
    endpoint = live.register("http://127.0.0.1:61999/score")
    job_id, lease = live.running()
    checkpoint_id = lease.checkpoint(1)
    lease.say({"type": "samples", "step": 1, "samples": [SAMPLE]})
    upload = {"bytes": 9, "filename": "a", "mime_type": "text/plain", "purpose": "fine-tune"}
    known_keys = live.http.get("/v1/api_keys").json()["data"]
    ids = {
        "job_id": job_id,
        "checkpoint_id": checkpoint_id,
        "file_id": live.job(job_id)["training_file"],
        "endpoint_id": endpoint["id"],
        "sample_id": live.job(job_id, "/samples")["data"][0]["id"],
        "upload_id": live.http.post("/v1/uploads", json=upload).json()["id"],
        # Workers' keys belong to no project.
        "key_id": next(key["id"] for key in known_keys if "read" in key["scopes"]),
        "name": "config.json",
        "model": "base",
    }
    return Walked(live, ids)


def key_of(live: Live, project_id: str, *scopes: str) -> httpx2.Client:
    """A client with a new key of a project."""
    key = keys.new_api_key()
    with live.runtime.database.write() as transaction:
        transaction.add(
            tables.ApiKeyRow(
                id=keys.key_id(key),
                sha256=keys.digest(key),
                scopes=" ".join(scopes),
                project_id=project_id,
                is_configured=False,
                created_at=transaction.now,
                expires_at=None,
                revoked_at=None,
            )
        )
    return live.client(key)


def refused(answer: httpx2.Response, route: Route, *statuses: int) -> dict[str, Any]:
    """The error of an answer."""
    shown = f"{route}: {answer.status_code} {answer.text[:300]}"
    assert answer.status_code in statuses, shown
    error: dict[str, Any] = answer.json()["error"]
    assert error["message"], shown
    assert error["request_id"] == answer.headers["x-request-id"], shown
    return error


def unusable_values(schema: dict[str, Any]) -> Iterator[str]:
    """Values that a parameter cannot have: of another type, outside its range or its words."""
    kinds = [one for one in (schema.get("anyOf") or [schema]) if one.get("type") != "null"]
    if any(one.get("type") == "string" and "enum" not in one for one in kinds):
        return
    for kind in kinds:
        yield WORDS.get(kind.get("type", ""), "no-such-word")
        if kind.get("type") == "integer":
            yield "1.5"
            yield "9" * MOST
        if "minimum" in kind:
            yield str(kind["minimum"] - 1)
        if "maximum" in kind:
            yield str(kind["maximum"] + 1)


def test_every_route_refuses_unknown_and_unusable_parameters(walked: Walked) -> None:
    tried = 0
    for route in users_routes():
        error = refused(walked.send(route, params={"nonsense": "1"}), route, 400)
        assert (error["param"], error["code"]) == ("nonsense", "unknown_parameter"), route
        for name, kind in route.query.items():
            for value in unusable_values(kind):
                error = refused(walked.send(route, params={name: value}), route, 400)
                assert error["param"] == name, (str(route), name, value, error)
                tried += 1
    assert tried > 60


def test_every_list_refuses_a_cursor_of_nothing(walked: Walked) -> None:
    for route in users_routes():
        for name in {"after", "before"} & set(route.query):
            value = "-1" if "integer" in str(route.query[name]) else NONE
            error = refused(walked.send(route, params={name: value}), route, 400, 404)
            assert error["param"] == name, (str(route), error)


def test_every_route_with_a_body_refuses_what_is_none(walked: Walked) -> None:
    for route in users_routes():
        for body in BODIES if route.takes_json else ():
            error = refused(
                walked.send(route, content=body, headers={"content-type": JSON}), route, 400
            )
            if b"nonsense" in body:
                problems = {one["param"]: one["code"] for one in error["errors"]}
                assert problems.get("nonsense") == "extra_forbidden", (str(route), problems)


def test_every_route_with_a_body_refuses_another_type_and_too_much(walked: Walked) -> None:
    too_much = b" " * (walked.live.settings.max_body_bytes + 1)
    for route in users_routes():
        if route.operation.get("requestBody"):
            answer = walked.send(route, content=b"a,b\n", headers={"content-type": "text/csv"})
            # An upload is found before its part is read.
            refused(answer, route, 400, 415, *((404,) if NONE in route.at(walked.ids) else ()))
        if route.takes_json:
            answer = walked.send(route, content=too_much, headers={"content-type": JSON})
            assert refused(answer, route, 413)["code"] == "payload_too_large", route


def test_every_route_hides_the_objects_of_another_project(walked: Walked) -> None:
    live = walked.live
    with live.runtime.database.write() as transaction:
        project = tables.ProjectRow(id=new_id("proj-"), created_at=transaction.now)
        transaction.add(project)
        transaction.flush()
        project_id = project.id
    stranger = key_of(live, project_id, "admin", "read", "submit")
    before = live.job(walked.ids["job_id"])
    for route in users_routes():
        if not re.search(r"{(?!model|name)\w+}", route.path):
            continue
        body = next((VALID[end] for end in VALID if route.path.endswith(end)), {})
        more: dict[str, Any] = {"json": body} if route.takes_json else {}
        if "multipart/form-data" in route.operation.get("requestBody", {}).get("content", {}):
            more = {"files": {"data": ("part", b"x")}}
        started = time.monotonic()
        refused(walked.send(route, stranger, **more), route, 404)
        assert time.monotonic() - started < 5, f"{route} waits for an object that is not there"
        assert NONE not in route.at(walked.ids), f"{route}: the walk has no such object"
    assert live.job(walked.ids["job_id"]) == before


def test_every_route_wants_its_scope(walked: Walked) -> None:
    live = walked.live
    with live.runtime.database.read() as transaction:
        project_id = transaction.scalars(select(tables.ProjectRow.id)).one()
    reader, submitter = key_of(live, project_id, "read"), key_of(live, project_id, "submit")
    worker = live.worker()
    for route in users_routes():
        refused(walked.send(route, worker), route, 403)
        if route.method in {"PATCH", "DELETE"} or (route.method == "POST" and not is_dry(route)):
            error = refused(walked.send(route, reader), route, 403)
        elif route.method == "GET":
            error = refused(walked.send(route, submitter), route, 403)
        else:
            continue
        assert error["code"] == "insufficient_scope", (str(route), error)


def is_dry(route: Route) -> bool:
    """Whether a POST changes nothing, so that a key that may read may send it."""
    return route.path.endswith(("/validate", "/graders/run"))


def test_a_conflict_says_that_a_retry_is_useless(
    live: Live, error_of: Callable[..., dict[str, Any]]
) -> None:
    ended, other = live.submit()["id"], live.submit()["id"]
    live.http.post(f"/v1/fine_tuning/jobs/{ended}/cancel")
    live.http.post(f"/v1/fine_tuning/jobs/{other}/pause")
    conflicts = 0
    for route in users_routes():
        if re.fullmatch(r"/v1/fine_tuning/jobs/{job_id}(/\w+)?", route.path) and (
            route.method == "POST" and not route.takes_json
        ):
            for job_id in (ended, other):
                answer = live.http.request(route.method, route.at({"job_id": job_id}))
                assert answer.status_code in {200, 409}, f"{route}: {answer.text}"
                if answer.status_code == 409:
                    assert error_of(answer)["code"] == "invalid_state", route
                    assert answer.headers["x-should-retry"] == "false"
                    conflicts += 1
    assert conflicts >= 2
