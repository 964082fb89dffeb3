"""What each credential opens, tried on every route: docs/security.md says the same."""

import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text

from fakes.live_service import Lease, Live, announced_paths

PAGE = (Path(__file__).parents[3] / "docs" / "security.md").read_text()
REFUSED = {401, 403, 404}
CLAIM = {
    "node": "node-1",
    "slot": "9",
    "incarnation": "life-9",
    "boot_id": "boot-1",
    "wants_job": False,
}
PARAMS = {
    "/v1/worker/leases/{lease_id}/directives": {"wait": "0"},
    "/v1/worker/leases/{lease_id}/checkpoints/{checkpoint_id}/files/{name}": {"attempt": "1"},
}
COLUMNS = ("any node", "its node", "another node", "its token", "another token")
"""Credentials in the order of the page's columns, each with regard to one attempt."""


def operations() -> list[tuple[str, str]]:
    announced = [
        (method.upper(), path) for path, methods in announced_paths().items() for method in methods
    ]
    return [("GET", "/openapi.json"), *announced]


def ask(client: httpx2.Client, method: str, path: str, ids: Mapping[str, str]) -> int:
    """The status of a request that is right but for its body."""
    filled = re.sub(r"{(\w+)}", lambda found: ids.get(found[1], "x"), path)
    if "/checkpoints/" in path:
        filled = filled.replace("training_file", "model.safetensors")
    options: dict[str, Any] = {"params": PARAMS.get(path)}
    if path.endswith("/files/{name}") and method == "PUT":
        options["content"] = b""
    elif method in {"POST", "PUT", "PATCH"}:
        options["json"] = CLAIM if path.endswith("/claim") else {}
    return client.request(method, filled, **options).status_code


def made(live: Live, *scopes: str, **fields: Any) -> dict[str, Any]:
    answer = live.http.post("/v1/api_keys", json={"scopes": scopes, **fields})
    found: dict[str, Any] = answer.json()
    return found


def client(live: Live, key: str) -> httpx2.Client:
    return live.client(key, **{"x-dar-node": "node-1"})


def two_attempts(live: Live) -> tuple[Lease, Lease]:
    live.submit()
    live.submit()
    mine, other = live.claim(), live.claim(slot="1")
    assert mine is not None
    assert other is not None
    return mine, other


def written() -> dict[tuple[str, str], tuple[bool, ...]]:
    """The page's table: which credentials open a route. Routes without a row open to none."""
    rows = re.findall(r"^\| `([A-Z]+) (\S+)` \|((?: (?:yes|no) \|){5})$", PAGE, re.MULTILINE)
    return {(m, p): tuple(cell == "yes" for cell in re.findall(r"yes|no", c)) for m, p, c in rows}


def test_worker_keys_and_attempt_tokens_open_what_the_page_says_and_no_more(live: Live) -> None:
    mine, other = two_attempts(live)
    checkpoint_id = mine.announce(1, {"model.safetensors": b"x"}).json()["checkpoint_id"]
    ids = {
        "lease_id": mine.body["lease_id"],
        "checkpoint_id": checkpoint_id,
        "name": "training_file",
    }
    keys = {
        "any node": live.key("worker_key"),
        "its node": made(live, "worker", node="node-1")["key"],
        "another node": made(live, "worker", node="node-2")["key"],
        "its token": mine.body["token"],
        "another token": other.body["token"],
    }
    clients = [client(live, keys[name]) for name in COLUMNS]
    found = {
        (method, path): tuple(ask(one, method, path, ids) not in REFUSED for one in clients)
        for method, path in operations()
    }
    assert len(found) > 60
    opened = {route: cells for route, cells in found.items() if any(cells)}
    assert opened == written(), "\n".join(
        f"| `{m} {p}` | {' | '.join('yes' if cell else 'no' for cell in cells)} |"
        for (m, p), cells in opened.items()
    )


@pytest.mark.parametrize("state", ["expired", "revoked", "altered"])
def test_a_key_that_has_ended_opens_what_is_open_to_all(live: Live, state: str) -> None:
    mine, _ = two_attempts(live)
    key = made(live, "worker", node="node-1")
    secret = key["key"]
    if state == "revoked":
        live.http.post(f"/v1/api_keys/{key['id']}/revoke")
    elif state == "expired":
        with live.runtime.database.write() as transaction:
            at = (transaction.now - timedelta(seconds=1)).replace(tzinfo=None)
            statement = text("UPDATE api_keys SET expires_at = :at WHERE id = :id")
            transaction.execute(statement, {"at": at, "id": key["id"]})
    else:
        secret = secret[:-4] + "AAAA"
    ids = {"lease_id": mine.body["lease_id"], "name": "training_file"}
    ended = client(live, secret)
    opened = {route for route in operations() if ask(ended, *route, ids) not in REFUSED}
    assert opened == {route for route, cells in written().items() if all(cells)}


def test_a_users_key_opens_what_its_scope_says(live: Live) -> None:
    """Routes that read need ``read``, those of the page's list ``admin``."""
    listed = re.findall(r"^- `([A-Z]+) (/v1/\S+)`", PAGE, re.MULTILINE)
    admin = set(listed)
    assert len(admin) == len(listed) > 5
    scopes = ("read", "submit", "admin")
    clients = {scope: client(live, made(live, scope)["key"]) for scope in scopes}
    for method, path in operations():
        opened = [
            scope for scope, one in clients.items() if ask(one, method, path, {}) not in {401, 403}
        ]
        if not path.startswith("/v1/"):
            expected = list(scopes)
        elif path.startswith(("/v1/worker/", "/v1/reward_callbacks/")):
            expected = []
        elif (method, path) in admin:
            expected = ["admin"]
        else:
            expected = ["read"] if method in {"GET", "HEAD"} else ["submit"]
        assert opened == expected, (method, path)
