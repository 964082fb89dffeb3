"""A job's way through the worker's routes, and everything that may go wrong on it."""

import gzip
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from fakes.live_service import Live
from fakes.row_audit import audit_rows
from service.store import outcomes

WEIGHTS = b"weights" * 1000


def metric(step: int, **values: float | None) -> dict[str, Any]:
    return {"type": "metrics", "step": step, "values": {f"dar/{k}": v for k, v in values.items()}}


def test_a_job_from_claim_to_download(live: Live) -> None:
    job_id, lease = live.running(seed=3)
    assert lease.body["total_steps"] == 4
    assert lease.body["seed"] == 3
    assert lease.body["reward_secret"] is None
    assert lease.body["rewards"]["letters"]["secrets"] == [live.key("reward_secret")]
    model, entry = sorted(lease.http.get("/inputs").json()["files"], key=lambda file: file["name"])
    assert (model["name"], entry["name"]) == ("model/config.json", "training_file")
    assert lease.http.get("/inputs/model/config.json").content == b"{}"
    assert len(lease.http.get("/inputs/training_file").content) == entry["bytes"]
    progress = {"phase": "sampling", "step": 0, "message": "8 of 16"}
    assert lease.post("/heartbeat", progress=progress).json()["ttl_seconds"] == 300
    assert live.job(job_id)["status_detail"] == "sampling"
    for step in (1, 2, 3, 4):
        assert lease.say(metric(step, loss=1 / step), is_packed=True).json()["acked_seq"] == step
    final = lease.checkpoint(4)
    ended = lease.post("/complete", last_seq=4, checkpoint_id=final)
    assert ended.json() == {"status": "succeeded", "status_detail": None}
    job = live.job(job_id)
    assert (job["status"], job["progress"]["percent"]) == ("succeeded", 100.0)
    assert job["fine_tuned_model"].startswith("ft-base-")
    [shown] = live.job(job_id, "/checkpoints")["data"]
    assert (shown["id"], shown["step_number"], shown["has_optimizer"]) == (final, 4, True)
    assert shown["metrics"] == {"step": 4.0, "dar/loss": 0.5}
    for file in shown["files"]:
        path = f"/v1/fine_tuning/jobs/{job_id}/checkpoints/{final}/files/{file['name']}"
        got = live.http.get(path)
        assert len(got.content) == file["bytes"]
        assert got.headers["etag"] == f'"{file["sha256"]}"'
        assert got.headers["repr-digest"].startswith("sha-256=:")
        assert got.headers["content-disposition"].startswith("attachment")
        assert got.headers["x-content-type-options"] == "nosniff"
        assert live.http.head(path).headers["content-length"] == str(file["bytes"])
    kinds = [event["data"].get("kind", "metrics") for event in live.job(job_id, "/events")["data"]]
    assert kinds == ["status", "checkpoint", *["metrics"] * 4, "status", "status"]


def test_a_result_is_a_model_to_start_from(live: Live, error_of: Callable[..., Any]) -> None:
    job_id, lease = live.running(suffix="mine")
    lease.post("/complete", last_seq=0, checkpoint_id=lease.checkpoint(4))
    name = live.job(job_id)["fine_tuned_model"]
    listed = [model["id"] for model in live.http.get("/v1/models").json()["data"]]
    assert listed == ["base", name, f"{name}-step-4"]
    assert live.http.get(f"/v1/models/{name}").json()["job_id"] == job_id
    assert error_of(live.http.get("/v1/models/a%2Fb"))["code"] == "not_found"
    _, later = live.running(model=name)
    names = {file["name"] for file in later.http.get("/inputs").json()["files"]}
    assert names == {"training_file", "model/model.safetensors"}
    assert later.http.get("/inputs/model/model.safetensors").content == b"weights"


def test_the_next_attempt_gets_the_whole_checkpoint_it_goes_on_from(live: Live) -> None:
    _, lease = live.running()
    lease.checkpoint(2)
    again = live.claim(incarnation="life-2")
    assert again.attempt == 2
    names = {file["name"] for file in again.http.get("/inputs").json()["files"]}
    inside = {"MANIFEST.json", "model.safetensors", "resume/state.json"}
    base = {"training_file", "model/config.json"}
    assert names == base | {f"resume/{name}" for name in inside}


def test_a_broken_upload_goes_on_where_it_broke_off(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running()
    files = {"model.safetensors": WEIGHTS}
    started = lease.announce(4, files).json()
    checkpoint = started["checkpoint_id"]
    assert started["received"] == {"model.safetensors": 0, "MANIFEST.json": 0}
    lease.put(checkpoint, "model.safetensors", WEIGHTS[:100])
    early = lease.post(f"/checkpoints/{checkpoint}/commit")
    assert error_of(early)["code"] == "upload_incomplete"
    gap = lease.put(checkpoint, "model.safetensors", WEIGHTS[200:], offset=200)
    assert (gap.status_code, error_of(gap)["code"]) == (409, "offset_mismatch")
    again = lease.announce(4, files).json()
    assert again["checkpoint_id"] == checkpoint
    assert again["received"]["model.safetensors"] == 100
    assert live.job(job_id, "/checkpoints")["data"] == []
    lease.put(checkpoint, "model.safetensors", WEIGHTS[100:], offset=100)
    for _ in range(2):
        assert lease.post(f"/checkpoints/{checkpoint}/commit").json()["status"] == "available"
    assert len(live.job(job_id, "/checkpoints")["data"]) == 1


def test_a_file_that_arrives_altered_is_refused_and_can_be_sent_again(
    live: Live, error_of: Callable[..., Any]
) -> None:
    _, lease = live.running()
    checkpoint = lease.announce(4, {"model.safetensors": WEIGHTS}).json()["checkpoint_id"]
    lease.put(checkpoint, "model.safetensors", WEIGHTS[:-1] + b"X")
    answer = lease.post(f"/checkpoints/{checkpoint}/commit")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "checksum_mismatch")
    lease.put(checkpoint, "model.safetensors", WEIGHTS)
    assert lease.post(f"/checkpoints/{checkpoint}/commit").status_code == 200


def test_only_what_the_manifest_names_can_be_sent_or_fetched(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running()
    checkpoint = lease.announce(4, {"model.safetensors": WEIGHTS}).json()["checkpoint_id"]
    for name in ("other", "..%2F..%2Fescape", "%2Fetc%2Fpasswd", "resume%2F..%2F..%2Fx"):
        assert lease.put(checkpoint, name, b"x").status_code == 404
    answer = lease.put(checkpoint, "model.safetensors", WEIGHTS + b"more")
    assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")
    done = lease.checkpoint(2)
    path = f"/v1/fine_tuning/jobs/{job_id}/checkpoints/{done}/files"
    for name in ("other", "..%2F..%2F..%2Fdar.db", "%2e%2e/state.json"):
        assert error_of(live.http.get(f"{path}/{name}"))["code"] == "not_found"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b/c", ".hidden", "a\\b", "", "a/../b"])
def test_a_manifest_cannot_name_what_lies_outside(
    live: Live, error_of: Callable[..., Any], name: str
) -> None:
    _, lease = live.running()
    manifest, _ = lease.manifest(4, {"model.safetensors": b"x"})
    body = manifest.model_dump(mode="json")
    body["files"][0]["name"] = name
    answer = lease.post("/checkpoints", manifest=body, manifest_sha256="0" * 64)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "manifest.files[0].name")


def test_a_late_attempt_is_turned_away_but_its_rows_are_kept(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, late = live.running()
    assert live.claim(incarnation="life-2").attempt == 2
    posts = [
        late.post("/heartbeat"),
        late.post("/fail", kind="transient", code="x", message="x"),
        late.post("/release", reason="drained"),
        late.post("/complete", last_seq=0, checkpoint_id="ckpt-x"),
        late.announce(4, {"model.safetensors": b"x"}),
        late.http.get("/directives", params={"wait": 20}),
        late.http.get("/inputs"),
    ]
    for answer in posts:
        assert (answer.status_code, error_of(answer)["code"]) == (409, "fenced")
    assert late.say(metric(1, loss=1.0)).json()["acked_seq"] == 1
    spool = live.client(
        live.key("worker_key"),
        f"/v1/worker/leases/{late.body['lease_id']}",
        **{"x-dar-node": "node-1"},
    )
    late.http = spool
    assert late.say(metric(2, loss=2.0)).json()["acked_seq"] == 2
    spool.headers["x-dar-node"] = "node-2"
    assert late.say(metric(3, loss=2.0)).status_code == 404
    kept = live.job(job_id, "/metrics", rewound=True)
    assert kept["series"] == {}
    assert kept["rewound"][0]["series"]["dar/loss"]["step"] == [1, 2]


class DeadlockError(Exception):
    """What PostgreSQL's driver says of a transaction that it rolled back."""

    sqlstate = "40P01"


def test_the_end_of_an_attempt_that_meets_a_deadlock_is_tried_again(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, lease = live.running()
    real, tries = outcomes.end, []

    def end(*arguments: Any) -> Any:
        tries.append(real(*arguments))
        if len(tries) == 1:
            raise OperationalError("UPDATE", None, DeadlockError())
        return tries[-1]

    monkeypatch.setattr(outcomes, "end", end)
    assert lease.post("/release", reason="drained").status_code == 200
    assert (len(tries), live.job(job_id)["status"]) == (2, "queued")


def test_a_token_opens_its_own_lease_only(live: Live, error_of: Callable[..., Any]) -> None:
    _, mine = live.running()
    live.submit()
    theirs = live.claim(slot="1")
    stranger = live.client(mine.body["token"], f"/v1/worker/leases/{theirs.body['lease_id']}")
    for path in ("/inputs", "/directives"):
        assert error_of(stranger.get(path))["code"] == "not_found"
    assert stranger.post("/heartbeat", json={"attempt": 1}).status_code == 404
    for path in ("/v1/files", "/v1/fine_tuning/jobs"):
        assert live.client(mine.body["token"]).get(path).status_code == 401
    user = live.client(live.key("api_key"), f"/v1/worker/leases/{theirs.body['lease_id']}")
    assert user.post("/heartbeat", json={"attempt": 1}).status_code == 401
    assert user.post("/batch", json={"attempt": 1, "rows": []}).status_code == 403


def test_rows_that_contradict_are_refused_and_told(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running()
    lease.say(metric(1, loss=1.0))
    lease.seq = 0
    answer = lease.say(metric(1, loss=9.0))
    assert (answer.status_code, error_of(answer)["code"]) == (409, "integrity")
    event = live.job(job_id, "/events")["data"][0]
    assert (event["level"], event["data"]["kind"]) == ("error", "integrity")
    lease.seq = 5
    assert error_of(lease.say(metric(2, loss=1.0)))["code"] == "seq_gap"


def test_rows_that_cannot_be_are_a_400(live: Live, error_of: Callable[..., Any]) -> None:
    _, lease = live.running()
    unknown = error_of(lease.say({"type": "metrics", "step": 1, "values": {"dar/los": 1.0}}))
    assert (unknown["param"], unknown["code"]) == ("rows[0].values", "unknown_metric")
    rows = [metric(1, loss=1.0) | {"seq": seq, "at": 1.0} for seq in (1, 3)]
    assert error_of(lease.post("/batch", rows=rows))["code"] == "not_consecutive"
    body = b'{"attempt":1,"rows":[{"type":"metrics","seq":1,"at":1,"step":1,"values":{"dar/loss":NaN}}]}'
    nan = lease.http.post("/batch", content=body, headers={"content-type": "application/json"})
    assert (nan.status_code, error_of(nan)["code"]) == (400, "finite_number")


def test_packed_rows_are_unpacked_within_bounds(
    serve: Callable[..., Any], error_of: Callable[..., Any]
) -> None:
    live = serve(max_batch_bytes=100_000)
    _, lease = live.running()
    headers = {"content-type": "application/json", "content-encoding": "gzip"}

    def send(body: bytes, **more: str) -> Any:
        return lease.http.post("/batch", content=body, headers=headers | more)

    bomb = send(gzip.compress(b" " * 50_000_000))
    assert (bomb.status_code, error_of(bomb)["code"]) == (413, "payload_too_large")
    for broken in (b"nonsense", gzip.compress(b"{}" * 1000)[:-20]):
        answer = send(broken)
        assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_gzip")
    other = send(b"{}", **{"content-encoding": "br"})
    assert (other.status_code, error_of(other)["code"]) == (415, "unsupported_media_type")


def test_a_cancellation_reaches_the_worker_within_a_second(live: Live) -> None:
    job_id, lease = live.running()
    told: list[tuple[float, Any]] = []

    def listen() -> None:
        answer = lease.http.get("/directives", params={"wait": 20}).json()
        told.append((time.perf_counter(), answer))

    listener = threading.Thread(target=listen)
    listener.start()
    time.sleep(0.3)
    asked = time.perf_counter()
    job = live.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").json()
    listener.join(20)
    assert (job["status"], job["status_detail"], job["actions"]) == ("running", "cancelling", [])
    [(heard, answer)] = told
    assert heard - asked < 1
    assert answer == {"directives": [{"id": 1, "type": "cancel"}], "cursor": "1"}
    again = lease.http.get("/directives", params={"after": "1", "wait": 0.1}).json()
    assert again == {"directives": [], "cursor": "1"}
    ended = lease.post("/release", reason="cancelled").json()
    assert ended == {"status": "cancelled", "status_detail": None}


def test_a_cancellation_in_another_replica_is_found(serve: Callable[..., Any], live: Live) -> None:
    job_id, lease = live.running()
    replica = serve()
    told: list[Any] = []
    listener = threading.Thread(
        target=lambda: told.append(lease.http.get("/directives", params={"wait": 20}).json())
    )
    listener.start()
    time.sleep(0.2)
    replica.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    listener.join(5)
    assert [item["directives"] for item in told] == [[{"id": 1, "type": "cancel"}]]


def test_waiting_workers_hold_no_thread(live: Live) -> None:
    _, lease = live.running()
    listeners = [
        threading.Thread(target=lambda: lease.http.get("/directives", params={"wait": 1}))
        for _ in range(50)
    ]
    for listener in listeners:
        listener.start()
    time.sleep(0.3)
    started = time.perf_counter()
    assert live.http.get("/v1/files").status_code == 200
    assert time.perf_counter() - started < 1
    for listener in listeners:
        listener.join(20)


def test_nothing_due_is_a_204(live: Live) -> None:
    assert live.claim() is None


def test_a_lease_that_runs_out_frees_the_job(serve: Callable[..., Any]) -> None:
    live = serve(lease_ttl_seconds=1.0, reconcile_seconds=0.1)
    job_id, _ = live.running()
    deadline = time.monotonic() + 10
    while live.job(job_id)["status"] != "queued":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert live.claim(slot="other").attempt == 2


def test_metrics_are_columns_with_a_cursor_and_a_tag(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running()
    path = f"/v1/fine_tuning/jobs/{job_id}/metrics"
    lease.say(metric(1, loss=1.0, rewards_mean=None), metric(2, loss=0.5))
    first = live.http.get(path)
    series = first.json()["series"]
    assert (series["dar/loss"]["step"], series["dar/loss"]["value"]) == ([1, 2], [1.0, 0.5])
    assert series["dar/rewards_mean"]["value"] == [None]
    same = live.http.get(path, headers={"if-none-match": first.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    lease.say(metric(3, loss=0.25))
    cursor = first.json()["cursor"]
    new = live.http.get(
        path, params={"after": cursor}, headers={"if-none-match": first.headers["etag"]}
    )
    assert {name: s["step"] for name, s in new.json()["series"].items()} == {"dar/loss": [3]}
    narrow = live.job(job_id, "/metrics", names="dar/rewards_mean", from_step=1, to_step=1)
    assert list(narrow["series"]) == ["dar/rewards_mean"]
    assert error_of(live.http.get(path, params={"names": "x"}))["code"] == "unknown_metric"
    for wrong in ("x", "-1", "9" * 30, ""):
        assert error_of(live.http.get(path, params={"after": wrong}))["code"] == "invalid_cursor"
    names = live.http.get("/v1/fine_tuning/metrics/names").json()["data"]
    assert {"name": "dar/loss"}.items() <= names[0].items()


def test_samples_come_back_with_all_that_decided_their_weight(live: Live) -> None:
    job_id, lease = live.running()
    sample = {
        "group": 0,
        "index": 1,
        "prompt": "p",
        "completion": "c",
        "finish_reason": "stop",
        "completion_tokens": 2,
        "reward": 0.5,
        "reward_status": "reward",
        "components": {"letters": 0.5},
        "advantage": 0.1,
        "weight": 1.2,
        "logp_policy": -1.0,
        "logp_ref": -1.0,
        "logp_behavior": -1.0,
    }
    others = [sample | {"index": n, "reward": float(n)} for n in range(3)]
    lease.say({"type": "samples", "step": 1, "samples": others})
    page = live.job(job_id, "/samples", order="-reward", limit=2)
    assert ([item["reward"] for item in page["data"]], page["has_more"]) == ([2.0, 1.0], True)
    rest = live.job(job_id, "/samples", order="-reward", limit=2, after=page["last_id"])
    assert ([item["reward"] for item in rest["data"]], rest["has_more"]) == ([0.0], False)
    assert page["data"][1] == page["data"][1] | sample | {"reward": 1.0, "step": 1, "attempt": 1}


def test_old_checkpoints_go_and_the_newest_stay(serve: Callable[..., Live]) -> None:
    live = serve(reconcile_seconds=0.1)
    job_id, lease = live.running(
        dar={"hyperparameters": {"max_steps": 9}, "checkpointing": {"keep_last": 2}}
    )
    for step in (1, 2, 3, 4):
        lease.checkpoint(step)
    deadline = time.monotonic() + 10
    while len(live.job(job_id, "/checkpoints")["data"]) > 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    steps = [item["step_number"] for item in live.job(job_id, "/checkpoints")["data"]]
    assert steps == [4, 3]


def test_rows_count_once_however_often_and_in_which_order_they_come(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running()

    def metric(seq: int, step: int) -> dict[str, Any]:
        values = {"dar/loss": 1 / step}
        return {"type": "metrics", "seq": seq, "at": 1.0, "step": step, "values": values}

    note = {"type": "event", "seq": 3, "at": 1.0, "level": "info", "message": "note", "step": 2}
    rows = [metric(1, 1), metric(2, 2), note, metric(4, 3), metric(5, 4)]

    def send(*sent: dict[str, Any]) -> Any:
        return lease.post("/batch", rows=list(sent))

    assert error_of(send(*rows[3:]))["code"] == "seq_gap"
    with ThreadPoolExecutor(4) as pool:  # retries that overtake each other
        answers = list(pool.map(lambda _: send(*rows[:3]), range(4)))
    assert {answer.json()["acked_seq"] for answer in answers} == {3}
    for start, end, acked in ((0, 2, 3), (1, 4, 4), (3, 4, 4), (0, 4, 4)):
        assert send(*rows[start:end]).json() == {"acked_seq": acked}
    altered = rows[1] | {"values": {"dar/loss": 9.0}}
    for sent in ([altered], [altered, *rows[2:]]):
        answer = send(*sent)
        assert (answer.status_code, error_of(answer)["code"]) == (409, "integrity")
    last = send(rows[4]).json()
    assert last == {"acked_seq": 5}
    assert audit_rows(live.runtime.database, job_id, "dar/loss", lambda step: 1 / step) == []
    events = live.job(job_id, "/events", order="asc", limit=100)["data"]
    assert [event["message"] for event in events].count("note") == 1
    assert [event["data"]["step"] for event in events if event["type"] == "metrics"] == [1, 2, 3, 4]
    assert [event["data"]["kind"] for event in events if event["level"] == "error"] == [
        "integrity",
        "integrity",
    ]


def test_the_newest_log_of_each_attempt_is_shown(
    live: Live, error_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.store.logs.MOST_ATTEMPTS", 2)
    job_id, lease = live.running()
    path = f"/v1/fine_tuning/jobs/{job_id}/logs"
    missing = live.http.get(path)
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")

    def put(lease: Any, text: str) -> int:
        body = {"attempt": lease.attempt, "text": text, "bytes": 10 * len(text)}
        return int(lease.http.put("/log", json=body).status_code)

    for text in ("one\n", "one\ntwo\nthree"):
        assert put(lease, text) == 204
    shown = live.job(job_id, "/logs")
    assert (shown["attempt"], shown["text"], shown["bytes"]) == (1, "one\ntwo\nthree", 130)
    assert live.job(job_id, "/logs", tail=2)["text"] == "two\nthree"
    leases = [lease, *(live.claim(incarnation=f"life-{n}") for n in (2, 3))]
    assert [put(one, f"of {one.attempt}") for one in leases[1:]] == [204, 204]
    assert live.job(job_id, "/logs")["text"] == "of 3"
    assert live.job(job_id, "/logs", attempt=2)["text"] == "of 2"
    gone = live.http.get(path, params={"attempt": 1})
    assert "newest 2 of a job" in error_of(gone)["message"]
    live.submit()
    other = live.claim(slot="1")
    assert other is not None
    stranger = live.client(other.body["token"], f"/v1/worker/leases/{lease.body['lease_id']}")
    assert stranger.put("/log", json={"attempt": 1, "text": "x", "bytes": 1}).status_code == 404
    long = lease.http.put("/log", json={"attempt": 1, "text": "x" * 65537, "bytes": 1})
    assert error_of(long)["param"] == "text"
