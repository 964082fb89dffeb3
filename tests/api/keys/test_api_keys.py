"""API keys over HTTP: made, shown once, bound to a node, listed, used, expired and revoked."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from fakes.live_service import Live
from service import keys

PATH = "/v1/api_keys"
CLAIM = {"slot": "0", "incarnation": "life-1", "boot_id": "boot-1"}


def make(live: Live, *scopes: str, **fields: Any) -> dict[str, Any]:
    answer = live.http.post(PATH, json={"scopes": scopes, **fields})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def claim(live: Live, key: str, node: str) -> httpx2.Response:
    return live.client(key).post("/v1/worker/leases/claim", json={"node": node, **CLAIM})


def past(live: Live, key_id: str) -> None:
    """Let a key have expired a second ago."""
    with live.runtime.database.write() as transaction:
        at = (transaction.now - timedelta(seconds=1)).replace(tzinfo=None)
        statement = text("UPDATE api_keys SET expires_at = :at WHERE id = :id")
        transaction.execute(statement, {"at": at, "id": key_id})


def test_a_key_is_shown_once_and_only_its_digest_is_stored(live: Live) -> None:
    made = make(live, "read", name="notebook", expires_in_seconds=86_400)
    key = made.pop("key")
    assert key.startswith("dar-sk-")
    assert made["expires_at"] - made["created_at"] == 86_400
    [first, *others] = live.http.get(PATH).json()["data"]
    assert first == made == live.http.get(f"{PATH}/{made['id']}").json()
    assert [one["is_configured"] for one in others] == [True, True]
    assert (made["state"], made["node"], made["last_used_at"]) == ("valid", None, None)
    assert live.client(key).get("/v1/files").status_code == 200
    assert live.client(key).post(PATH, json={"scopes": ["admin"]}).status_code == 403
    live.runtime.database.close()  # writes all of it into one file
    stored = (live.settings.home / "dar.db").read_bytes()
    assert made["id"].encode() in stored
    assert key.encode() not in stored
    assert key.rpartition("-")[2].encode() not in stored


def test_a_key_of_a_node_serves_its_workers_and_no_others(
    live: Live, error_of: Callable[..., Any]
) -> None:
    made = make(live, "worker", node="node-1")
    mine, other = made["key"], make(live, "worker", node="node-2")["key"]
    live.submit()
    refused = error_of(claim(live, other, "node-1"))
    assert refused["code"] == "wrong_node"
    assert "'node-2'" in refused["message"]
    assert "'node-1'" in refused["message"]
    lease = claim(live, mine, "node-1").json()
    path = f"/v1/worker/leases/{lease['lease_id']}"
    row = {"type": "metrics", "step": 1, "values": {"dar/loss": 0.5}}
    body = {"attempt": 1, "rows": [{"seq": 1, "at": 1.7e9, **row}]}
    answers = [
        live.client(key, **{"x-dar-node": node}).post(f"{path}/batch", json=body).status_code
        for key, node in ((mine, "node-1"), (other, "node-1"), (other, "node-2"))
    ]
    assert answers == [200, 404, 404]
    live.http.post(f"{PATH}/{made['id']}/revoke")
    assert claim(live, mine, "node-1").status_code == 401
    beat = live.client(lease["token"]).post(f"{path}/heartbeat", json={"attempt": 1})
    assert beat.status_code == 200  # what runs goes on


@pytest.mark.parametrize(
    ("state", "said"), [("expired", "has expired"), ("revoked", "was revoked")]
)
def test_a_key_that_has_ended_opens_nothing_and_says_why_to_its_owner_alone(
    live: Live, error_of: Callable[..., Any], state: str, said: str
) -> None:
    made = make(live, "worker", node="node-1")
    assert claim(live, made["key"], "node-1").status_code == 204
    if state == "expired":
        past(live, made["id"])
    else:
        revoked = live.http.post(f"{PATH}/{made['id']}/revoke").json()
        assert revoked["state"] == "revoked"
        again = live.http.post(f"{PATH}/{made['id']}/revoke").json()
        assert again["revoked_at"] == revoked["revoked_at"]
    error = error_of(claim(live, made["key"], "node-1"))
    assert error["code"] == f"{state}_api_key"
    assert f"{made['id']} {said}" in error["message"]
    guessed = made["key"][:-4] + "AAAA"
    assert "not known here" in error_of(claim(live, guessed, "node-1"))["message"]
    assert live.http.get(f"{PATH}/{made['id']}").json()["state"] == state


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes[0]"),
        ({"scopes": ["worker", "read"]}, None),
        ({"scopes": ["read"], "node": "node-1"}, None),
        ({"scopes": ["read"], "expires_in_seconds": 0}, "expires_in_seconds"),
    ],
)
def test_a_key_that_would_mean_nothing_is_refused(
    live: Live, error_of: Callable[..., Any], body: dict[str, Any], param: str | None
) -> None:
    answer = live.http.post(PATH, json=body)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param


def test_a_key_of_the_settings_is_changed_there(live: Live, error_of: Callable[..., Any]) -> None:
    configured = [one for one in live.http.get(PATH).json()["data"] if one["is_configured"]]
    found = {
        one["scopes"][0]: error_of(live.http.post(f"{PATH}/{one['id']}/revoke"))
        for one in configured
    }
    assert {error["code"] for error in found.values()} == {"configured_key"}
    assert "DAR_WORKER_KEY" in found["worker"]["message"]
    assert "DAR_API_KEY" in found["read"]["message"]
    assert error_of(live.http.post(f"{PATH}/key-none/revoke"))["code"] == "not_found"


def test_a_restart_with_a_made_key_in_the_settings_neither_widens_nor_revives_it(
    live: Live,
) -> None:
    made = make(live, "worker", node="node-1", expires_in_seconds=3600)
    live.http.post(f"{PATH}/{made['id']}/revoke")
    settings = live.settings.model_copy(update={"worker_key": SecretStr(made["key"])})
    keys.configure(settings, live.runtime.database)
    found = live.http.get(f"{PATH}/{made['id']}").json()
    assert (found["state"], found["node"], found["is_configured"]) == ("revoked", "node-1", False)
    assert live.worker().get("/metrics").status_code == 200  # the earlier key is still accepted


def test_the_last_use_of_a_key_is_shown(serve: Callable[..., Live]) -> None:
    live = serve(reconcile_seconds=0.05)
    made = make(live, "read")
    assert live.client(made["key"]).get("/v1/files").status_code == 200
    deadline = time.monotonic() + 10
    while (shown := live.http.get(f"{PATH}/{made['id']}").json())["last_used_at"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert 0 <= shown["last_used_at"] - made["created_at"] < 60
