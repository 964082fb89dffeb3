"""The end of a trainer's log is shown while it runs and afterwards."""

from collections.abc import Callable
from typing import Any

import pytest

from fakes.live_service import Live


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
