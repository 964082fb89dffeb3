"""Reward endpoints over HTTP: secrets go in and never come out, and only the endpoint itself sees
them.
"""

import base64
import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import structlog
from sqlalchemy import text

from fakes.live_service import Judge, Live
from service.http import log

PATH = "/v1/reward_endpoints"
JOBS = "/v1/fine_tuning/jobs"
TOKEN = "Bearer s3cret-of-the-header"  # what `live.register` sends
OWN = "whsec_" + base64.b64encode(b"a secret of the user's own, 40 bytes long").decode()


def naming(endpoint_id: str, **values: Any) -> dict[str, Any]:
    return {"rewards": {"components": [{"name": "j", "endpoint": endpoint_id, **values}]}}


def headers_of(endpoint: dict[str, Any]) -> list[str]:
    return [secret["name"] for secret in endpoint["secrets"] if secret["kind"] == "header"]


def test_an_endpoint_is_made_shown_listed_changed_and_deleted(
    live: Live, error_of: Callable[..., Any]
) -> None:
    made = live.register("https://judge.example/score", batch={"max_samples": 8})
    assert made["id"].startswith("rwe_")
    assert (made["object"], made["revision"], made["state"]) == ("reward_endpoint", 1, "ok")
    assert made["signing_secret"].startswith("whsec_")
    shown = live.http.get(f"{PATH}/{made['id']}").json()
    assert shown == {name: value for name, value in made.items() if name != "signing_secret"}
    assert (shown["batch"]["max_samples"], shown["batch"]["linger_ms"]) == (8, 50.0)
    others = [live.register("https://judge.example/score")["id"] for _ in range(3)]
    page = live.http.get(PATH, params={"limit": 2}).json()
    assert ([item["id"] for item in page["data"]], page["has_more"]) == (others[:0:-1], True)
    rest = live.http.get(PATH, params={"after": page["last_id"]}).json()
    assert [item["id"] for item in rest["data"]] == [others[0], made["id"]]
    changed = live.http.patch(f"{PATH}/{made['id']}", json={"name": "other"}).json()
    assert (changed["name"], changed["revision"], changed["batch"]) == ("other", 1, made["batch"])
    assert live.http.delete(f"{PATH}/{made['id']}").json()["deleted"]
    gone = live.http.get(f"{PATH}/{made['id']}")
    assert (gone.status_code, error_of(gone)["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"url": "ftp://x/"}, "url"),
        ({"url": "https://u:p@x/"}, "url"),
        ({"headers": {"host": "x"}}, "headers.host"),
        ({"headers": {"Content-Type": "x"}}, "headers.Content-Type"),
        ({"headers": {"webhook-id": "x"}}, "headers.webhook-id"),
        ({"headers": {"X-DAR-attempt": "x"}}, "headers.X-DAR-attempt"),
        ({"headers": {"transfer-encoding": "x"}}, "headers.transfer-encoding"),
        ({"headers": {"bad name": "x"}}, "headers.bad name"),
        ({"headers": {"x-a": "line\r\nx-b: c"}}, "headers.x-a"),
        ({"headers": {"x-a": ""}}, "headers.x-a"),
        ({"headers": {"x-a": "\u00e9"}}, "headers.x-a"),
        ({"headers": {"x-a": "line", "X-A": "line"}}, "headers"),
        ({"url": "https://a..b/"}, "url"),
        ({"url": f"https://{'a' * 64}.example/"}, "url"),
        ({"protocol": "plain", "template": "{{text}}", "pointer": "/~2"}, "pointer"),
        ({"signing_secret": "whsec_c2hvcnQ="}, "signing_secret"),
        ({"protocol": "plain"}, None),
        ({"protocol": "nonsense"}, "protocol"),
        ({"weight": 2.0}, "weight"),
    ],
)
def test_what_an_endpoint_cannot_be_is_refused(
    live: Live, error_of: Callable[..., Any], values: dict[str, Any], param: str | None
) -> None:
    answer = live.http.post(PATH, json={"name": "judge", "url": "https://x/", **values})
    error = error_of(answer)
    assert answer.status_code == 400
    assert error["param"] == param
    assert "line" not in answer.text
    assert live.http.get(PATH).json()["data"] == []


def test_a_header_that_is_changed_under_two_names_is_refused(
    live: Live, error_of: Callable[..., Any]
) -> None:
    made = live.register("https://judge.example/score", headers={"x-key": "first"})
    body = {"headers": {"X-Key": "other", "x-key": None}}
    answer = live.http.patch(f"{PATH}/{made['id']}", json=body)
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (
        400,
        "headers",
        "duplicate_header",
    )
    assert "X-Key and x-key are the same header" in error["message"]
    assert live.http.patch(f"{PATH}/{made['id']}", json={"headers": {"X-KEY": "new"}}).is_success


def test_secrets_are_nowhere_but_in_the_one_answer(
    serve: Callable[..., Any], judge: Judge, capsys: pytest.CaptureFixture[str]
) -> None:
    with _logging():
        live = serve(log_level="debug")
        made = live.register(judge.url, signing_secret=OWN)
        secrets = [TOKEN, TOKEN.split()[1], OWN, OWN.removeprefix("whsec_")]
        spoken = [
            live.http.get(f"{PATH}/{made['id']}").text,
            live.http.get(PATH).text,
            live.http.patch(f"{PATH}/{made['id']}", json={"headers": {"x-k": TOKEN}}).text,
            live.http.post(f"{PATH}/{made['id']}/probe").text,
            live.http.get(f"{PATH}/{made['id']}/stats").text,
            live.http.post(PATH, json={"name": "", "url": "x", "headers": {"te": TOKEN}}).text,
            live.http.get("/openapi.json").text,
        ]
        job = live.submit(dar=naming(made["id"]))
        spoken += [json.dumps(job), live.http.get(f"{JOBS}/{job['id']}/events").text]
        judge.status = 401
        judge.answer = lambda _asked: {"echo": judge.seen[-1][0]}
        spoken.append(live.http.post(f"{PATH}/{made['id']}/probe").text)
        refused = live.http.post(JOBS, json=live.spec(dar=naming(made["id"], prompt_format="text")))
        assert refused.status_code == 400
        assert (
            "echo" in refused.text
        )  # the owner sees the service's answer, without the secrets in it
        grader = {"type": "endpoint", "name": "g", "endpoint": made["id"]}
        run = {"grader": grader, "model_sample": "x"}
        graded = live.http.post("/v1/fine_tuning/alpha/graders/run", json=run)
        assert graded.json()["metadata"]["errors"]["other_error"]
        spoken += [refused.text, graded.text]
    assert made["signing_secret"] == OWN
    database = b"".join(path.read_bytes() for path in live.settings.home.glob("dar.db*"))
    output = capsys.readouterr()
    for secret in secrets:
        assert secret.encode() not in database
        assert secret not in output.err + output.out
        assert not [answer for answer in spoken if secret in answer]
    assert '"path": "/v1/reward_endpoints"' in output.err  # the log was looked at, and it was one


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Logs of the real service, as its process writes them."""
    before = structlog.get_config()
    log.configure("debug")
    try:
        yield
    finally:
        structlog.configure(**before)


def test_a_lease_brings_what_the_endpoint_has_now_and_only_to_its_job(live: Live) -> None:
    made = live.register("https://judge.example/score", timeouts={"attempt": 7.0})
    component = {"weight": 2.0, "timeouts": {"connect": 1.0}}
    job = live.submit(dar=naming(made["id"], **component), skip_validation=True)
    [stored] = job["method"]["dar"]["rewards"]["components"]
    assert (stored["endpoint"], stored["url"], stored["weight"]) == (made["id"], None, 2.0)
    assert (stored["timeouts"]["connect"], stored["timeouts"]["attempt"]) == (1.0, 7.0)
    new = live.http.post(f"{PATH}/{made['id']}/rotate_secret").json()
    live.http.patch(f"{PATH}/{made['id']}", json={"headers": {"x-more": "m"}})
    lease = live.claim()
    assert lease.body["rewards"] == {
        "j": {
            "url": "https://judge.example/score",
            "secrets": [new["signing_secret"], made["signing_secret"]],
            "headers": {"authorization": TOKEN, "x-more": "m"},
            "endpoint_id": made["id"],
            "revision": 3,
            "is_deterministic": False,
        }
    }
    live.submit()
    assert list(live.claim(slot="1").body["rewards"]) == ["letters"]


def test_a_rotated_secret_overlaps_with_the_old_one_for_a_day_or_not_at_all(live: Live) -> None:
    made = live.register("https://judge.example/score")
    path = f"{PATH}/{made['id']}/rotate_secret"
    second = live.http.post(path, json={}).json()
    signing = [secret for secret in second["secrets"] if secret["kind"] == "signing"]
    assert [secret["expires_at"] is None for secret in signing] == [True, False]
    in_a_day = datetime.now(UTC) + timedelta(hours=24)
    assert abs(signing[1]["expires_at"] - in_a_day.timestamp()) < 120
    assert second["revision"] == 2
    third = live.http.post(path, json={"keep_old_secret_active_for_24_hours": False}).json()
    signing = [secret for secret in third["secrets"] if secret["kind"] == "signing"]
    assert [secret["expires_at"] for secret in signing] == [None]
    assert len({made["signing_secret"], second["signing_secret"], third["signing_secret"]}) == 3


def test_an_old_secret_stops_signing_after_its_day(live: Live) -> None:
    made = live.register("https://judge.example/score")
    live.http.post(f"{PATH}/{made['id']}/rotate_secret")
    with live.runtime.database.write() as transaction:
        past = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=1)
        late = text("UPDATE reward_secrets SET expires_at = :past WHERE expires_at IS NOT NULL")
        transaction.execute(late, {"past": past})
    live.submit(dar=naming(made["id"]), skip_validation=True)
    assert len(live.claim().body["rewards"]["j"]["secrets"]) == 1


def test_another_origin_drops_the_headers_and_says_so(live: Live) -> None:
    made = live.register(
        "https://judge.example/score", headers={"authorization": TOKEN, "x-b": "b"}
    )
    path = f"{PATH}/{made['id']}"
    same = live.http.patch(path, json={"url": "https://judge.example:443/v2"}).json()
    assert (same["dropped_headers"], headers_of(same)) == ([], ["x-b", "authorization"])
    body = {"url": "https://evil.example/score", "headers": {"x-b": "fresh"}}
    moved = live.http.patch(path, json=body).json()
    assert (moved["dropped_headers"], headers_of(moved)) == (["authorization"], ["x-b"])
    live.submit(dar=naming(made["id"]), skip_validation=True)
    access = live.claim().body["rewards"]["j"]
    assert access["headers"] == {"x-b": "fresh"}
    assert access["secrets"] == [made["signing_secret"]]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("url = 'https://evil.example/'", "secret_unreadable"),
        ("deleted_at = created_at", "endpoint_not_found"),
    ],
)
def test_a_job_without_its_secrets_fails_and_the_next_one_is_given_out(
    live: Live, change: str, code: str
) -> None:
    made = live.register("https://judge.example/score")
    job = live.submit(dar=naming(made["id"]), skip_validation=True)
    following = live.submit()
    with live.runtime.database.write() as transaction:
        transaction.execute(text(f"UPDATE reward_endpoints SET {change}"))
    assert live.claim().body["job_id"] == following["id"]
    ended = live.job(job["id"])
    assert (ended["status"], ended["error"]["code"]) == ("failed", code)


def test_an_endpoint_that_a_job_needs_stays(live: Live, error_of: Callable[..., Any]) -> None:
    made = live.register("https://judge.example/score")
    job = live.submit(dar=naming(made["id"]), skip_validation=True)
    answer = live.http.delete(f"{PATH}/{made['id']}")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "endpoint_in_use")
    stats = live.http.get(f"{PATH}/{made['id']}/stats").json()
    assert (stats["jobs"], stats["last_job_id"]) == ({"queued": 1}, job["id"])
    other = live.submit(dar=naming(made["id"]), skip_validation=True)["id"]
    live.http.post(f"{JOBS}/{other}/cancel")
    assert live.http.delete(f"{JOBS}/{other}").status_code == 200
    later = live.http.get(f"{PATH}/{made['id']}/stats").json()
    assert (later["jobs"], later["last_job_id"]) == ({"queued": 1}, job["id"])
    live.http.post(f"{JOBS}/{job['id']}/cancel")
    assert live.http.delete(f"{PATH}/{made['id']}").status_code == 200


def test_an_unknown_endpoint_is_a_400_at_its_place(
    live: Live, error_of: Callable[..., Any]
) -> None:
    unknown = "rwe_" + "0" * 26
    answer = live.http.post(JOBS, json=live.spec(dar=naming(unknown)))
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "endpoint_not_found")
    assert error["param"] == "method.dar.rewards.components[0].endpoint"


def test_an_endpoint_brings_what_its_protocol_needs(
    live: Live, error_of: Callable[..., Any]
) -> None:
    template = {"text": "{{completion}}"}
    plain = {"protocol": "plain", "template": template, "pointer": "/score"}
    made = live.register("https://judge.example/score", **plain)
    assert (made["template"], made["pointer"]) == (template, "/score")
    job = live.submit(
        dar=naming(made["id"], protocol="plain", pointer="/other"), skip_validation=True
    )
    [stored] = job["method"]["dar"]["rewards"]["components"]
    assert (stored["protocol"], stored["template"], stored["pointer"]) == (
        "plain",
        template,
        "/other",
    )
    path = f"{PATH}/{made['id']}"
    error = error_of(live.http.patch(path, json={"pointer": None}))
    assert error["code"] == "endpoint_options"
    native = {"protocol": "dar.reward.v1", "template": None, "pointer": None}
    changed = live.http.patch(path, json=native).json()
    assert (changed["protocol"], changed["template"], changed["revision"]) == (
        "dar.reward.v1",
        None,
        2,
    )


def test_a_components_fields_that_do_not_fit_its_endpoint_are_told(
    live: Live, error_of: Callable[..., Any]
) -> None:
    made = live.register("https://judge.example/score")
    dar = naming(made["id"], protocol="plain")
    answer = live.http.post(JOBS, json=live.spec(dar=dar, skip_validation=True))
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "missing_field")
    assert error["param"] == "method.dar.rewards.components[0]"


def test_private_addresses_are_refused_unless_the_operator_allows_them(
    serve: Callable[..., Any], judge: Judge, error_of: Callable[..., Any]
) -> None:
    lenient, live = serve(), serve(egress_allow_cidrs=(), egress_allow_http=())
    made = lenient.register(judge.url)  # before the operator forbade it
    answer = live.http.post(PATH, json={"name": "judge", "url": judge.url})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, "url")
    assert error["code"] in {"egress_denied", "config.url"}
    moved = live.http.patch(f"{PATH}/{made['id']}", json={"url": "http://169.254.169.254/"})
    assert (moved.status_code, error_of(moved)["param"]) == (400, "url")
    assert live.http.post(f"{PATH}/{made['id']}/probe").json()["errors"][0]["code"] in {
        "egress_denied",
        "config.url",
    }
    for dar in (naming(made["id"]), {"rewards": {"components": [{"name": "a", "url": judge.url}]}}):
        answer = live.http.post(JOBS, json=live.spec(dar=dar))
        assert answer.status_code == 400
        assert error_of(answer)["code"] in {"egress_denied", "config.url"}
    grader = {"type": "endpoint", "name": "g", "endpoint": made["id"]}
    body = {"grader": grader, "model_sample": "x"}
    run = live.http.post("/v1/fine_tuning/alpha/graders/run", json=body).json()
    assert (run["reward"], run["metadata"]["errors"]["other_error"]) == (None, True)
    assert judge.seen == []


def test_a_key_that_only_reads_changes_nothing(live: Live, error_of: Callable[..., Any]) -> None:
    made = live.register("https://judge.example/score")
    with live.runtime.database.write() as transaction:
        transaction.execute(text("UPDATE api_keys SET scopes = 'read' WHERE scopes LIKE 'read%'"))
    path = f"{PATH}/{made['id']}"
    assert live.http.get(path).status_code == live.http.get(f"{path}/stats").status_code == 200
    for method, where in (
        ("POST", PATH), ("PATCH", path), ("DELETE", path), ("POST", f"{path}/rotate_secret"),
        ("POST", f"{path}/probe"), ("POST", f"{PATH}/probe"), ("POST", f"{path}/purge_cache"),
        ("POST", "/v1/fine_tuning/alpha/graders/run"),
    ):  # fmt: skip
        answer = live.http.request(method, where, json={})
        assert (answer.status_code, error_of(answer)["code"]) == (403, "insufficient_scope"), where


def test_endpoints_of_another_project_are_not_there(live: Live) -> None:
    made = live.register("https://judge.example/score")
    with live.runtime.database.write() as transaction:
        now = datetime.now(UTC).replace(tzinfo=None)
        other = "INSERT INTO projects (id, created_at) VALUES ('proj-other', :now)"
        transaction.execute(text(other), {"now": now})
        transaction.execute(text("UPDATE reward_endpoints SET project_id = 'proj-other'"))
    path = f"{PATH}/{made['id']}"
    assert live.http.get(PATH).json()["data"] == []
    for method, where in (
        ("GET", path), ("PATCH", path), ("DELETE", path), ("GET", f"{path}/stats"),
        ("POST", f"{path}/rotate_secret"), ("POST", f"{path}/probe"), ("POST", f"{path}/purge_cache"),
    ):  # fmt: skip
        assert live.http.request(method, where, json={}).status_code == 404, where
