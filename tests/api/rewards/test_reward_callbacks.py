"""Callbacks of reward services: who may give a result, what becomes of it, and how it reaches the
worker.
"""

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest

from dar.protocol.rewards import MAX_DEPTH, decode_result
from dar.rewards.http.signing import decode_secret, signed_headers
from fakes.live_service import Lease, Live
from service.secret_box import Binding, SecretBox, new_key
from service.store.tables import RewardRequestRow

OTHER_SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@dataclass
class Pending:
    """An announced request, seen from its reward service."""

    request_id: str
    token: str
    state: dict[str, Any]
    http: httpx2.Client

    def body(self, *rewards: float | None, **fields: Any) -> bytes:
        content = {"type": "reward.result", "request_id": self.request_id, "rewards": list(rewards)}
        return json.dumps(content | fields).encode()

    def post(self, body: bytes, token: str | None = None, **headers: str) -> httpx2.Response:
        sent = {
            "content-type": "application/json",
            "authorization": f"Bearer {token or self.token}",
        }
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post(f"/v1/reward_callbacks/{self.request_id}", content=body, headers=sent)


def announcement(request_id: str, token: str, seconds: float = 60.0) -> dict[str, Any]:
    deadline = (datetime.now(UTC) + timedelta(seconds=seconds)).timestamp()
    sha256 = hashlib.sha256(token.encode()).hexdigest()
    return {
        "request_id": request_id, "component": "letters", "step": 3, "sample_ids": ["s0", "s1"], "token_sha256": sha256,
        "deadline": deadline,
    }  # fmt: skip


def announce(live: Live, lease: Lease, request_id: str = "rwq_1", seconds: float = 60.0) -> Pending:
    token = f"rwt_{secrets.token_urlsafe(32)}"
    answer = lease.post("/reward_requests", requests=[announcement(request_id, token, seconds)])
    assert answer.status_code == 200, answer.text
    [state] = answer.json()["requests"]
    return Pending(request_id, token, state, live.client(None))


def note(lease: Lease, state: str, **more: Any) -> httpx2.Response:
    said = {"request_id": "rwq_1", "state": state, **more}
    answer: httpx2.Response = lease.post("/reward_requests/progress", requests=[said])
    return answer


@pytest.fixture
def pending(live: Live) -> Pending:
    _, lease = live.running()
    return announce(live, lease)


def directives(lease: Lease, after: str = "", wait: float = 0.0) -> Any:
    return lease.http.get("/directives", params={"after": after, "wait": wait}).json()


def callback_events(live: Live, job_id: str) -> list[str]:
    kinds = [(event["data"] or {}).get("kind", "") for event in live.job(job_id, "/events")["data"]]
    return [kind for kind in kinds if kind.startswith("reward_callback")]


def test_the_first_valid_result_is_taken_and_its_repetition_is_a_duplicate(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running()
    pending = announce(live, lease)
    assert pending.state["callback_url"].endswith("/v1/reward_callbacks/rwq_1")
    body = pending.body(0.5, -1)
    first, again = pending.post(body), pending.post(body)
    assert (first.status_code, first.json()) == (200, {"status": "accepted"})
    assert (again.status_code, again.json()) == (200, {"status": "duplicate"})
    other = pending.post(pending.body(0.5, 1))
    assert (other.status_code, error_of(other)["code"]) == (409, "result_conflict")
    assert pending.post(b"not JSON").status_code == 409
    [told] = directives(lease)["directives"]
    assert (told["id"], told["type"], told["request_id"]) == (1000, "reward_result", "rwq_1")
    assert told["result"].encode() == body
    assert callback_events(live, job_id) == ["reward_callback_conflict"]
    assert live.runtime.telemetry._callbacks == {"accepted": 1, "duplicate": 1, "conflict": 2}


def test_a_result_ends_the_long_poll_at_once_and_the_cursor_remembers_it(live: Live) -> None:
    job_id, lease = live.running()
    one, two = announce(live, lease, "rwq_1"), announce(live, lease, "rwq_2")
    told: list[Any] = []
    listener = threading.Thread(target=lambda: told.append(directives(lease, wait=20)))
    started = time.monotonic()
    listener.start()
    time.sleep(0.3)
    assert two.post(two.body(1, 2)).status_code == 200
    listener.join(15)
    assert time.monotonic() - started < 10
    assert [item["request_id"] for item in told[0]["directives"]] == ["rwq_2"]
    assert told[0]["cursor"] == "1000"
    live.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    assert one.post(one.body(1, 2)).status_code == 410
    now = directives(lease, "1000")
    assert [item["type"] for item in now["directives"]] == ["cancel"]
    assert now["cursor"] == "1.1000"
    assert directives(lease, now["cursor"]) == {"directives": [], "cursor": "1.1000"}


def test_a_result_that_another_replica_took_is_found(serve: Callable[..., Any], live: Live) -> None:
    _, lease = live.running()
    pending = announce(live, lease)
    elsewhere = Pending("rwq_1", pending.token, {}, serve().client(None))
    told: list[Any] = []
    listener = threading.Thread(target=lambda: told.append(directives(lease, wait=20)))
    listener.start()
    time.sleep(0.3)
    assert elsewhere.post(pending.body(1, 2)).status_code == 200
    listener.join(15)
    assert [item["request_id"] for item in told[0]["directives"]] == ["rwq_1"]


@pytest.mark.parametrize("after", ["x", "1.x", "-1", "1..2", "9" * 30])
def test_a_cursor_that_was_never_given_is_refused(
    live: Live, error_of: Callable[..., Any], after: str
) -> None:
    _, lease = live.running()
    answer = lease.http.get("/directives", params={"after": after, "wait": 0})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "after")


def test_whoever_has_not_the_token_of_this_request_hears_always_the_same(
    live: Live, error_of: Callable[..., Any]
) -> None:
    _, lease = live.running()
    pending, other = announce(live, lease), announce(live, lease, "rwq_2")
    body = pending.body(1, 2)
    unknown = Pending("rwq_none", pending.token, {}, pending.http)
    refused = [
        pending.post(body, authorization=""),
        pending.post(body, authorization=f"Basic {pending.token}"),
        pending.post(body, token="rwt_" + "x" * 43),
        pending.post(body, token=other.token),
        pending.post(body, authorization=f"Bearer {live.key('api_key')}"),
        unknown.post(body),
        pending.post(b"x" * 100, token="rwt_" + "x" * 43, content_type="text/plain"),
    ]
    errors = [error_of(answer) for answer in refused]
    assert {answer.status_code for answer in refused} == {401}
    assert len({error["message"] for error in errors}) == 1
    assert {error["code"] for error in errors} == {"invalid_callback"}
    assert pending.post(body).json() == {"status": "accepted"}


@pytest.mark.parametrize(("depth", "status"), [(MAX_DEPTH - 1, 200), (1000, 422)])
def test_a_deeply_nested_result_is_taken_or_refused_and_never_lost(
    live: Live, error_of: Callable[..., Any], depth: int, status: int
) -> None:
    _, lease = live.running()
    pending = announce(live, lease)
    deep = pending.body(1, 2)[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}"
    answer = pending.post(deep)
    assert answer.status_code == status
    if status == 422:
        assert error_of(answer)["errors"][0]["code"] == "contract.json"
        assert pending.post(pending.body(1, 2)).json() == {"status": "accepted"}


def test_wrong_tokens_are_slowed_down_and_right_ones_never(live: Live, pending: Pending) -> None:
    codes = [pending.post(b"", token="rwt_wrong").status_code for _ in range(70)]
    assert set(codes) == {401, 429}
    assert codes == sorted(codes)
    slowed = pending.post(b"", token="rwt_wrong")
    assert 0 < int(slowed.headers["retry-after"]) <= 60
    assert pending.post(pending.body(1, 2)).json() == {"status": "accepted"}


def test_a_result_after_the_deadline_is_late(live: Live, error_of: Callable[..., Any]) -> None:
    job_id, lease = live.running()
    pending = announce(live, lease, seconds=0.2)
    time.sleep(0.3)
    for _ in range(2):
        answer = pending.post(pending.body(1, 2))
        assert (answer.status_code, error_of(answer)["code"]) == (410, "gone")
    assert callback_events(live, job_id) == ["reward_callback_late"]
    assert live.runtime.telemetry._callbacks == {"late": 2}
    assert directives(lease)["directives"] == []


def test_nobody_waits_for_a_request_that_was_answered_at_once_or_whose_job_has_ended(
    live: Live,
) -> None:
    _, lease = live.running()
    answered, open_one = announce(live, lease), announce(live, lease, "rwq_2")
    done = note(lease, "closed")
    assert (done.status_code, done.json()) == (200, {"unknown": []})
    assert answered.post(answered.body(1, 2)).status_code == 410
    lease.post("/fail", kind="user", code="x", message="x")
    assert open_one.post(open_one.body(1, 2)).status_code == 410


INVALID = {
    "no JSON": b"{",
    "another request": b'{"type":"reward.result","request_id":"rwq_2","rewards":[1,2]}',
    "no type": b'{"request_id":"rwq_1","rewards":[1,2]}',
    "too few": b'{"type":"reward.result","request_id":"rwq_1","rewards":[1]}',
    "NaN": b'{"type":"reward.result","request_id":"rwq_1","rewards":[1,NaN]}',
    "a text": b'{"type":"reward.result","request_id":"rwq_1","rewards":[1,"2"]}',
    "a NUL": b'{"type":"reward.result","request_id":"rwq_1","results":[{"id":"s0","reward":1,"components":{"\\u0000":1}}]}',
    "bad UTF-8": b'{"type":"reward.result","request_id":"rwq_1","rewards":[1,2],"x":"\xff"}',
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_result_leaves_the_token_good_for_a_corrected_one(
    pending: Pending, error_of: Callable[..., Any], name: str
) -> None:
    answer = pending.post(INVALID[name])
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (422, "invalid_result")
    assert error["errors"][0]["code"].startswith("contract.")
    assert pending.post(pending.body(1, 2)).json() == {"status": "accepted"}


def test_after_five_invalid_results_none_is_taken_any_more(live: Live) -> None:
    job_id, lease = live.running()
    pending = announce(live, lease)
    assert [pending.post(b"{}").status_code for _ in range(6)] == [422] * 5 + [410]
    assert pending.post(pending.body(1, 2)).status_code == 410
    events = ["reward_callback_burned", "reward_callback_invalid"]
    assert sorted(callback_events(live, job_id)) == events


def test_a_body_that_is_packed_too_large_or_no_json_is_refused_and_costs_no_try(
    pending: Pending,
) -> None:
    assert pending.post(b"{}", content_type="text/plain").status_code == 415
    assert pending.post(b"{}", content_encoding="gzip").status_code == 415
    for _ in range(6):
        assert pending.post(b" " * (8 * 1024**2 + 1)).status_code == 413
    assert pending.post(pending.body(1, 2)).json() == {"status": "accepted"}


# --- signatures -----------------------------------------------------------------------------------


@pytest.fixture
def signed(live: Live) -> Pending:
    component = {
        "name": "letters",
        "url": "http://127.0.0.1:61999/score",
        "require_signed_responses": True,
    }
    _, lease = live.running(dar={"rewards": {"components": [component]}})
    return announce(live, lease)


def signature(
    live: Live, body: bytes, message_id: str = "rwr_1", age: float = 0.0, secret: str | None = None
) -> dict[str, str]:
    key = decode_secret(secret or live.key("reward_secret"))
    return signed_headers([key], message_id, int(datetime.now(UTC).timestamp() - age), body)


def test_where_a_signature_is_due_only_a_fresh_one_of_the_right_secret_opens(
    live: Live, signed: Pending
) -> None:
    body = signed.body(1, 2)
    request = json.dumps({"type": "reward.request", "request_id": "rwq_1", "samples": []}).encode()
    refused = [
        signed.post(body),
        signed.post(body, **signature(live, body, secret=OTHER_SECRET)),
        signed.post(body, **signature(live, body, age=310)),
        signed.post(body, **signature(live, body, age=-310)),
        signed.post(body, **signature(live, body, age=600)),
        signed.post(body, **signature(live, body, age=-600)),
        signed.post(body, **signature(live, body, message_id="rwq_1")),
        signed.post(body, **signature(live, signed.body(3, 4))),
        signed.post(request, **signature(live, request, message_id="rwq_1")),
        signed.post(request, **signature(live, request)),
        signed.post(body, **(signature(live, body) | {"webhook-signature": "v1,!!!! v2 junk"})),
    ]
    assert [answer.status_code for answer in refused] == [401] * len(refused)
    assert len({answer.json()["error"]["message"] for answer in refused}) == 1
    assert signed.post(body, **signature(live, body, age=200)).json() == {"status": "accepted"}


def test_a_signature_of_a_replaced_secret_opens_nothing(live: Live) -> None:
    made = live.register("https://judge.example/score")
    component = {"name": "letters", "endpoint": made["id"], "require_signed_responses": True}
    _, lease = live.running(dar={"rewards": {"components": [component]}}, skip_validation=True)
    pending = announce(live, lease)
    rotate = f"/v1/reward_endpoints/{made['id']}/rotate_secret"
    second = live.http.post(rotate, json={}).json()["signing_secret"]
    body, broken = pending.body(1, 2), pending.body(1)
    old = signature(live, broken, secret=made["signing_secret"])
    assert pending.post(broken, **old).status_code == 422, "both are good for a day"
    third = live.http.post(rotate, json={"keep_old_secret_active_for_24_hours": False}).json()
    for replaced in (made["signing_secret"], second):
        headers = signature(live, body, message_id="rwr_2", secret=replaced)
        assert pending.post(body, **headers).status_code == 401
    headers = signature(live, body, message_id="rwr_3", secret=third["signing_secret"])
    assert pending.post(body, **headers).json() == {"status": "accepted"}


def test_junk_before_a_valid_signature_does_no_harm(live: Live, signed: Pending) -> None:
    body = signed.body(1, 2)
    headers = signature(live, body)
    headers["webhook-signature"] = f"junk v1a,zzz v1,!! {headers['webhook-signature']}"
    assert signed.post(body, **headers).json() == {"status": "accepted"}


def test_a_replayed_callback_changes_nothing(live: Live, signed: Pending) -> None:
    body = signed.body(1, 2)
    headers = signature(live, body)
    assert signed.post(body, **headers).json() == {"status": "accepted"}
    assert signed.post(body, **headers).json() == {"status": "duplicate"}
    other = signed.body(3, 4)
    assert signed.post(other, **signature(live, other)).status_code == 401  # its id is used up
    fresh = signature(live, other, message_id="rwr_2")
    assert signed.post(other, **fresh).status_code == 409
    assert signed.post(body, **signature(live, body, age=310)).status_code == 401


def test_our_own_request_sent_back_is_refused_without_a_signature_too(pending: Pending) -> None:
    request = json.dumps({"type": "reward.request", "request_id": "rwq_1"}).encode()
    assert pending.post(request).status_code == 401
    assert pending.post(pending.body(1, 2)).json() == {"status": "accepted"}


# --- attempts that follow each other --------------------------------------------------------------


def test_the_next_attempt_gets_what_came_for_the_one_before(live: Live) -> None:
    _, lease = live.running()
    pending = announce(live, lease)
    note(lease, "accepted", poll_url="/results/1")
    again = live.claim(incarnation="life-2")
    body = pending.body(1, 2)
    assert pending.post(body).json() == {"status": "accepted"}  # while nobody has announced it anew
    assert directives(again)["directives"] == []
    state = announce(live, again).state
    assert (state["is_accepted"], state["poll_url"]) == (True, "/results/1")
    assert state["result"].encode() == body


def test_a_request_that_was_accepted_is_not_begun_anew_and_either_token_opens_it(
    live: Live,
) -> None:
    _, lease = live.running()
    first = announce(live, lease, seconds=60)
    note(lease, "accepted")
    again = live.claim(incarnation="life-2")
    second = announce(live, again, seconds=90)
    assert second.state["is_accepted"]
    assert second.state["deadline"] == first.state["deadline"]  # it never moves
    assert first.post(first.body(1, 2)).json() == {"status": "accepted"}
    assert second.post(second.body(1, 2)).json() == {"status": "duplicate"}
    assert [d["request_id"] for d in directives(again)["directives"]] == ["rwq_1"]


def test_a_request_whose_time_ran_out_is_begun_anew(live: Live) -> None:
    _, lease = live.running()
    announce(live, lease, seconds=0.1)
    note(lease, "accepted")
    time.sleep(0.2)
    anew = announce(live, live.claim(incarnation="life-2"), seconds=60)
    assert not anew.state["is_accepted"]
    assert anew.state["deadline"] > datetime.now(UTC).timestamp() + 30
    assert anew.post(anew.body(1, 2)).json() == {"status": "accepted"}


def test_an_attempt_that_has_lost_its_job_announces_nothing(
    live: Live, error_of: Callable[..., Any]
) -> None:
    _, lease = live.running()
    announce(live, lease)
    live.claim(incarnation="life-2")
    late = lease.post("/reward_requests", requests=[announcement("rwq_2", "rwt_x")])
    assert (late.status_code, error_of(late)["code"]) == (409, "fenced")
    noted = note(lease, "closed")
    assert (noted.status_code, error_of(noted)["code"]) == (409, "fenced")


def test_callbacks_go_to_the_address_that_the_operator_names(serve: Callable[..., Any]) -> None:
    live = serve(public_url="https://dar.example/base/")
    _, lease = live.running()
    url = announce(live, lease).state["callback_url"]
    assert url == "https://dar.example/base/v1/reward_callbacks/rwq_1"


def test_no_token_is_stored_or_logged(live: Live) -> None:
    _, lease = live.running()
    pending = announce(live, lease)
    pending.post(pending.body(1, 2))
    stored = b"".join(path.read_bytes() for path in live.settings.home.glob("dar.db*"))
    assert pending.request_id.encode() in stored
    assert pending.token.encode() not in stored


# --- refused callbacks are events of the job ------------------------------------------------------

REFUSALS: dict[str, tuple[Callable[[Pending], httpx2.Response], int, str]] = {
    "a wrong token": (
        lambda pending: pending.post(pending.body(1, 2), token="rwt_wrong"),
        401,
        "401: its token is missing or wrong",
    ),
    "a wrong signature": (
        lambda pending: pending.post(
            pending.body(1, 2), webhook_signature="v1,x", webhook_id="rwr_1"
        ),
        401,
        "401: the request is not signed",
    ),
    "the request itself": (
        lambda pending: pending.post(b'{"type": "reward.request"}'),
        401,
        "401: its body is the request itself",
    ),
    "no JSON": (
        lambda pending: pending.post(pending.body(1, 2), content_type="text/plain"),
        415,
        "415: send the body of a callback as application/json",
    ),
    "compressed": (
        lambda pending: pending.post(pending.body(1, 2), content_encoding="gzip"),
        415,
        "415: send the body of a callback without a content-encoding",
    ),
    "too large": (lambda pending: pending.post(b" " * (8 * 1024**2 + 1)), 413, "413: the callback"),
    "too few rewards": (
        lambda pending: pending.post(pending.body(1)),
        422,
        "contract.length: 1 rewards for 2 samples",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refused_callback_is_an_event_at_once_and_known_to_the_trainer(
    live: Live, what: str
) -> None:
    job_id, lease = live.running()
    pending = announce(live, lease)
    post, status, reason = REFUSALS[what]
    assert [post(pending).status_code for _ in range(2)] == [status] * 2
    deadline = time.monotonic() + 10
    while not (kinds := callback_events(live, job_id)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert kinds == [f"reward_callback_{'invalid' if status == 422 else 'refused'}"]
    messages = [event["message"] for event in live.job(job_id, "/events")["data"]]
    assert any(reason in message for message in messages), messages
    again = lease.post("/reward_requests", requests=[announcement("rwq_1", pending.token)])
    assert reason in again.json()["requests"][0]["problem"]
    assert pending.post(pending.body(1, 2)).json() == {"status": "accepted"}


def test_a_refused_callback_of_a_request_that_ended_is_no_event(live: Live) -> None:
    job_id, lease = live.running()
    pending = announce(live, lease)
    assert pending.post(pending.body(1, 2)).json() == {"status": "accepted"}
    assert pending.post(pending.body(1, 2), token="rwt_wrong").status_code == 401
    live.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    assert callback_events(live, job_id) == []


# --- secrets that a service repeats ---------------------------------------------------------------

HEADER = "s3cret-of-the-header"
ECHO = f"{HEADER.upper()} and …{HEADER[6:]}\x1b[31m"


def registered(live: Live) -> tuple[str, Lease]:
    made = live.register("https://judge.example/score?token=9f8e7d6c5b4a")
    component = {"name": "letters", "endpoint": made["id"], "reply": "either"}
    return live.running(dar={"rewards": {"components": [component]}}, skip_validation=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"request_id": ECHO},
        {"type": ECHO},
        {"rewards": [ECHO, 1]},
        {"rewards": None, "results": [{"id": ECHO, "reward": 1}, {"id": "s1", "reward": 1}]},
        {"rewards": None, "results": [
            {"id": "s0", "reward": 0.5, "feedback": ECHO, "components": {"s3cret_of_the_header": 1}},
            {"id": "s1", "skip": True, "reason": ECHO}]},
        {"rewards": None, "results": [
            {"id": "s0", "error": {"code": ECHO, "message": ECHO, "retryable": True}},
            {"id": "s1", "reward": -0.1}]},
        {"info": {"authorization": ECHO}},
        {"info": "key 9F8E7D6C5B4A"},
    ],
)  # fmt: skip
def test_a_secret_in_a_callback_is_neither_stored_nor_passed_on(
    live: Live, fields: dict[str, Any]
) -> None:
    job_id, lease = registered(live)
    pending = announce(live, lease)
    content = {name: value for name, value in fields.items() if value is not None}
    body = json.loads(pending.body(0.5, -0.1, **content))
    if "results" in content:
        del body["rewards"]
    answer = pending.post(json.dumps(body).encode())
    passed = directives(lease)["directives"]
    shown = json.dumps([passed, live.job(job_id, "/events")["data"], answer.text])
    stored = b"".join(path.read_bytes() for path in live.settings.home.glob("dar.db*")).lower()
    for fragment in (HEADER[:9], HEADER[6:], "s3cret_of", "9f8e7d6c"):
        assert fragment not in shown.lower()
        # The URL is a field of the endpoint, which its owner may read.
        assert fragment == "9f8e7d6c" or fragment.encode() not in stored
    assert "\\u001b" not in shown
    if answer.status_code == 200:
        results = decode_result(passed[0]["result"].encode(), request_id="rwq_1", ids=["s0", "s1"])
        rewards = [result.reward for result in results]
        assert [reward for reward in rewards if reward is not None] in ([0.5, -0.1], [0.5], [-0.1])
        assert pending.post(json.dumps(body).encode()).json() == {"status": "duplicate"}
    else:
        assert answer.status_code == 422
        assert pending.post(pending.body(0.5, -0.1)).json() == {"status": "accepted"}


def test_a_poll_url_is_encrypted_at_rest(live: Live) -> None:
    _, lease = registered(live)
    announce(live, lease)
    url = f"/results/1?token={HEADER}"
    assert note(lease, "accepted", poll_url=url).status_code == 200
    stored = b"".join(path.read_bytes() for path in live.settings.home.glob("dar.db*"))
    assert HEADER.encode() not in stored
    assert b"/results/1" not in stored
    again = live.claim(incarnation="life-2")
    assert again is not None
    assert announce(live, again).state["poll_url"] == url


def test_a_request_whose_poll_url_no_key_opens_is_sent_again(live: Live) -> None:
    _, lease = registered(live)
    announce(live, lease)
    note(lease, "accepted", poll_url="/results/1")
    with live.runtime.database.write() as transaction:
        row = transaction.get_one(RewardRequestRow, "rwq_1")
        row.poll_url = SecretBox([new_key()]).seal(Binding("p", "rwq_1", "", "poll_url"), "/r")
    again = live.claim(incarnation="life-2")
    assert again is not None
    state = announce(live, again).state
    assert (state["is_accepted"], state["poll_url"]) == (False, None)
