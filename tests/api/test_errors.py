"""Every failure, on every route, has the one shape; nothing opens without a key."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute, iter_route_contexts

from fakes.live_service import Live

OPEN = {"/healthz", "/readyz"}


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of every route, with something in place of its parameters."""
    found = []
    for context in iter_route_contexts(app.routes):
        if isinstance(context.original_route, APIRoute):
            path = re.sub(r"{\w+(:path)?}", "x", context.path or "")
            found += [(method, path) for method in sorted(context.methods or ())]
    return found


def test_every_route_but_health_wants_a_key(live: Live, error_of: Callable[..., Any]) -> None:
    known = routes(live.app)
    assert len(known) > 25
    stranger = live.client(None)
    for method, path in known:
        answer = stranger.request(method, path)
        if path in OPEN:
            assert answer.status_code == 200
            continue
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert error_of(answer)["type"] == "authentication_error"


def test_every_route_refuses_a_wrong_key(live: Live, error_of: Callable[..., Any]) -> None:
    right = live.key("api_key")
    for wrong in (
        right[:-1] + ("A" if right[-1] != "A" else "B"),
        "nonsense",
    ):
        stranger = live.client(wrong)
        for method, path in routes(live.app):
            if path not in OPEN and method != "HEAD":
                # A callback takes no key at all, but the token of its request.
                is_callback = path.startswith("/v1/reward_callbacks/")
                expected = "invalid_callback" if is_callback else "invalid_api_key"
                assert error_of(stranger.request(method, path))["code"] == expected


def test_every_route_answers_nonsense_with_the_one_shape(
    live: Live, error_of: Callable[..., Any]
) -> None:
    headers = {"content-type": "application/json"}
    for client in (live.http, live.worker()):
        for method, path in routes(live.app):
            answer = client.request(method, path, content=b'{"x": [}', headers=headers)
            assert answer.status_code < 500, (method, path, answer.text)
            if answer.status_code >= 400 and method != "HEAD":
                error_of(answer)


def test_unknown_paths_and_methods_have_the_one_shape(
    live: Live, error_of: Callable[..., Any]
) -> None:
    assert error_of(live.http.get("/v1/nowhere"))["code"] == "not_found"
    assert error_of(live.http.get("/docs"))["code"] == "not_found"
    assert error_of(live.http.get("/v1/files/"))["code"] == "not_found"
    answer = live.http.patch("/v1/files")
    assert (answer.status_code, error_of(answer)["code"]) == (405, "method_not_allowed")


def test_a_mistake_of_ours_is_a_500_that_tells_nothing(
    live: Live, error_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object) -> None:
        raise RuntimeError("the secret is swordfish")

    monkeypatch.setattr("service.api.jobs.jobs.get", broken)
    answer = live.http.get("/v1/fine_tuning/jobs/x")
    assert answer.status_code == 500
    assert error_of(answer)["type"] == "server_error"
    assert "swordfish" not in answer.text


def test_a_database_that_is_gone_is_a_503_that_says_when_to_come_again(
    live: Live, error_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (live.settings.home / "dar.db").rename(live.settings.home / "moved.db")
    (live.settings.home / "dar.db").mkdir()
    live.runtime.database.engine.dispose()
    answer = live.http.get("/v1/files")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "database_unavailable")
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["retry-after-ms"] == "1000"
    assert live.http.get("/healthz").status_code == 200
    ready = live.http.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")


def test_a_users_key_is_not_a_workers_and_the_other_way_round(
    live: Live, error_of: Callable[..., Any]
) -> None:
    answer = live.http.post("/v1/worker/leases/claim", json={})
    assert (answer.status_code, error_of(answer)["code"]) == (403, "insufficient_scope")
    for method, path in (("GET", "/v1/files"), ("POST", "/v1/fine_tuning/jobs")):
        answer = live.worker().request(method, path)
        assert (answer.status_code, error_of(answer)["code"]) == (403, "insufficient_scope")


def test_a_sane_request_id_is_kept_and_a_strange_one_replaced(live: Live) -> None:
    kept = live.http.get("/healthz", headers={"x-request-id": "abc-1"})
    assert kept.headers["x-request-id"] == "abc-1"
    for strange in ("a b", "x" * 200, "<script>"):
        replaced = live.http.get("/healthz", headers={"x-request-id": strange})
        assert replaced.headers["x-request-id"].startswith("req-")


def test_a_body_over_the_limit_is_refused_before_it_is_read(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/fine_tuning/jobs HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {live.key('api_key')}\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode())
        # Just over the limit of 1 MiB; the end of the body is never sent.
        for _ in range(17):
            connection.sendall(chunk)
        answer = b""
        while b'"payload_too_large"' not in answer:
            part = connection.recv(65536)
            assert part, answer
            answer += part
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_told_with_its_path(
    live: Live, error_of: Callable[..., Any], word: str
) -> None:
    body = json.dumps(live.spec(dar={"hyperparameters": {"alpha": 12345}})).replace("12345", word)
    headers = {"content-type": "application/json"}
    answer = live.http.post("/v1/fine_tuning/jobs", content=body, headers=headers)
    error = error_of(answer)
    assert answer.status_code == 400
    assert error["param"] == "method.dar.hyperparameters.alpha"
    assert "finite" in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[", b"null", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"NaN"],
)
def test_a_body_that_is_no_job_is_a_400(
    live: Live, error_of: Callable[..., Any], body: bytes
) -> None:
    headers = {"content-type": "application/json"}
    answer = live.http.post("/v1/fine_tuning/jobs", content=body, headers=headers)
    assert answer.status_code == 400
    error_of(answer)


def test_a_body_of_another_type_is_a_415(live: Live, error_of: Callable[..., Any]) -> None:
    answer = live.http.post("/v1/fine_tuning/jobs", data={"model": "base"})
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_media_type")


def test_all_problems_are_told_at_once_with_their_paths(
    live: Live, error_of: Callable[..., Any]
) -> None:
    spec = live.spec(dar={"hyperparameters": {"alpha": -1, "learning_rat": 1.0}})
    spec["method"]["dar"]["rewards"]["components"][0]["url"] = "ftp://x"
    spec["method"]["dar"]["overlap"] = "two_steps"
    spec["method"]["dar"]["limits"] = {"max_seconds": 0}
    error = error_of(live.http.post("/v1/fine_tuning/jobs", json=spec))
    told = {problem["param"]: problem["message"] for problem in error["errors"]}
    assert set(told) == {
        "method.dar.hyperparameters.alpha",
        "method.dar.hyperparameters.learning_rat",
        "method.dar.rewards.components[0].url",
        "method.dar.overlap",
        "method.dar.limits.max_seconds",
    }
    assert "did you mean 'learning_rate'" in told["method.dar.hyperparameters.learning_rat"]
    assert "'none', 'stream' or 'one_step'" in told["method.dar.overlap"]
    assert live.http.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_an_unknown_query_parameter_is_refused(live: Live, error_of: Callable[..., Any]) -> None:
    error = error_of(live.http.get("/v1/files", params={"limt": 3}))
    assert error["param"] == "limt"
    assert "limit" in error["message"]


@pytest.mark.parametrize("limit", ["0", "101", "x", "1.5", ""])
def test_a_bad_limit_is_a_400(live: Live, error_of: Callable[..., Any], limit: str) -> None:
    answer = live.http.get("/v1/fine_tuning/jobs", params={"limit": limit})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "limit")


def test_the_openapi_document_names_every_route_and_body(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    schemas = document["components"]["schemas"]
    assert {"JobSpec", "Batch", "Job", "Metrics", "Hyperparameters"} <= set(schemas)
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= set(schemas)
    assert r"\n" not in json.dumps(schemas), "a description is one line"


def operations(live: Live) -> Iterator[tuple[str, str, dict[str, Any]]]:
    document = live.http.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            operation.setdefault("security", document["security"])
            yield method.upper(), path, operation


def test_the_openapi_document_names_the_errors_of_every_route(live: Live) -> None:
    shape = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    found = list(operations(live))
    assert len(found) > 40
    for method, path, operation in found:
        responses = operation["responses"]
        expected = {"default"}
        if path not in OPEN:
            expected |= {"401"} if path == "/metrics" else {"400", "401"}
        if "{" in path:
            expected.add("404")
        if "requestBody" in operation:
            expected |= {"408", "413", "415"}
        if path.startswith("/v1/worker/leases/{lease_id}/") and not path.endswith("/log"):
            expected.add("409")
        assert expected <= responses.keys(), (method, path)
        for status, response in responses.items():
            if status >= "4" and (path, status) != ("/readyz", "503"):
                assert response["content"] == shape, (method, path, status)
                assert response["description"]
    with_422 = [path for _, path, operation in found if "422" in operation["responses"]]
    assert with_422 == ["/v1/reward_callbacks/{request_id}"]
    with_429 = {path for _, path, operation in found if "429" in operation["responses"]}
    assert {"/v1/fine_tuning/jobs", "/v1/reward_endpoints/probe"} < with_429


def test_the_openapi_document_names_the_credentials_and_the_body_of_every_route(
    live: Live,
) -> None:
    for method, path, operation in operations(live):
        schemes = [name for one in operation["security"] for name in one]
        if path in OPEN:
            assert schemes == [], path
        elif path.startswith("/v1/reward_callbacks"):
            assert schemes == ["callback"]
            body = operation["requestBody"]["content"]["application/json"]["schema"]
            assert body == {"$ref": "#/components/schemas/RewardResponse"}
        elif path.startswith("/v1/worker/leases/{lease_id}/"):
            assert schemes[0] == "attempt", path
        else:
            assert schemes == ["bearer"], path
            if path != "/metrics":
                assert "403" in operation["responses"], path
        if method in {"PATCH", "PUT"}:
            assert operation["requestBody"]["required"], path


def test_a_refused_method_is_answered_with_all_that_the_path_allows(live: Live) -> None:
    allowed: dict[str, set[str]] = {}
    for method, path in routes(live.app):
        allowed.setdefault(path, set()).add(method)
    assert all("HEAD" in allowed[path] for path in OPEN)
    for path in allowed:
        answer = live.http.request("TRACE", path)
        assert answer.status_code == 405, path
        assert len(answer.headers.get_list("allow")) == 1, path
        named = set(answer.headers["allow"].split(", "))
        assert named >= allowed[path], path
        assert len(named) < 5
        for method in sorted(named):
            assert live.client(None).request(method, path).status_code != 405, (method, path)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/fine_tuning/jobs/a%00b", "job_id"),
        ("/v1/files?after=%00", "after"),
        ("/v1/fine_tuning/jobs?metadata[a]=%00", "metadata[a]"),
        ("/v1/models/a%00b", "model"),
        ("/v1/models/tiny%0a", None),
        ("/v1/fine_tuning/jobs%0a", None),
        ("/v1/fine_tuning/jobs/x/events%0A", None),
        ("/v1/fine_tuning/jobs/x%0d/events", "job_id"),
        ("/v1/fine_tuning/jobs/x/metrics?from_step=2147483648", "from_step"),
        ("/v1/fine_tuning/jobs/x/samples?step=2147483648", "step"),
    ],
)
def test_a_parameter_that_no_database_can_hold_is_a_400(
    live: Live, error_of: Callable[..., Any], path: str, param: str | None
) -> None:
    answer = live.http.get(path)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/files?limit=1_0", "limit"),
        ("/v1/files?limit=1.0", "limit"),
        ("/v1/files?limit=%2B1", "limit"),
        ("/v1/files?limit=%201", "limit"),
        ("/v1/fine_tuning/jobs/x/samples?step=1.0", "step"),
        ("/v1/fine_tuning/jobs/x/metrics?from_step=0_1", "from_step"),
        ("/v1/fine_tuning/jobs/x/metrics?from_step=2&to_step=1", "from_step"),
    ],
)
def test_a_number_in_a_notation_of_pythons_own_and_an_empty_range_are_refused(
    live: Live, error_of: Callable[..., Any], path: str, param: str
) -> None:
    answer = live.http.get(path)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


def test_a_name_that_is_not_alike_is_not_proposed(live: Live, error_of: Callable[..., Any]) -> None:
    component = {"name": "r", "kind": "builtin", "fn": "json_valid", "state": "x"}
    spec = live.spec(dar={"rewards": {"components": [component]}})
    message = error_of(live.http.post("/v1/fine_tuning/jobs", json=spec))["message"]
    assert "did you mean" not in message


def test_a_body_that_no_database_can_hold_is_a_400(
    live: Live, error_of: Callable[..., Any]
) -> None:
    answer = live.http.post("/v1/fine_tuning/jobs", json=live.spec(training_file="a\0b"))
    assert (answer.status_code, error_of(answer)["param"]) == (400, "training_file")
    answer = live.http.post("/v1/fine_tuning/jobs", json=live.spec(metadata={"a": "b\0"}))
    assert (answer.status_code, error_of(answer)["param"]) == (400, "metadata.a")
    headers = {"x-stainless-retry-count": "9" * 30}
    answer = live.http.post("/v1/fine_tuning/jobs", json=live.spec(), headers=headers)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "x-stainless-retry-count")


def test_a_stranger_is_not_told_how_a_route_works(live: Live, error_of: Callable[..., Any]) -> None:
    for key in (None, "wrong"):
        for path in ("/v1/files?zzz=1", "/v1/worker/leases/x/inputs?zzz=1", "/v1/files/%00"):
            answer = live.client(key).get(path)
            assert (answer.status_code, error_of(answer)["type"]) == (401, "authentication_error")
    assert live.http.get("/v1/files?zzz=1").status_code == 400
