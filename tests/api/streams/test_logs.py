"""The log of a trainer by level, and from where a reader has got to."""

from collections.abc import Callable
from typing import Any

import pytest

from dar.client import Client
from fakes.live_service import Lease, Live

LINES = (
    "2026-12-01 03:00:00,123 INFO dar.training: step 1\n",
    "2026-12-01 03:00:01,123 WARNING dar.training: few rewards\n",
    "2026-12-01 03:00:02,123 ERROR dar.training: it broke\n",
    "Traceback (most recent call last):\n",
    "2026-12-01 03:00:03,123 INFO dar.training: ünd then\n",
)
BAD = [
    ("level=loud", "level", "literal_error"),
    ("after=-1", "after", "greater_than_equal"),
    ("after=x", "after", "int_parsing"),
    ("follow=1", "follow", "unknown_parameter"),
]


def put(lease: Lease, text: str, size: int) -> None:
    body = {"attempt": lease.attempt, "text": text, "bytes": size}
    assert lease.http.put("/log", json=body).status_code == 204


def test_a_log_is_read_by_level_and_followed(live: Live) -> None:
    job_id, lease = live.running()
    text = "".join(LINES)
    put(lease, text, len(text.encode()))
    with Client(live.key("api_key"), live.url) as client:
        assert client.jobs.log(job_id).text == text
        assert client.jobs.log(job_id, level="debug").text == text
        warnings = client.jobs.log(job_id, level="warning")
        assert warnings.text == "".join(LINES[1:4])
        assert client.jobs.log(job_id, level="error", tail=1).text == LINES[3]
        assert client.jobs.log(job_id, after=warnings.bytes).text == ""
        size = warnings.bytes
        for more in ("2026-12-01 03:00:04,123 INF", "O dar.training: done\n"):
            text, size = text + more, size + len(more)
            put(lease, text, size)
            newer = client.jobs.log(job_id, attempt=1, after=size - len(more))
            assert (newer.text, newer.bytes, newer.missed_bytes) == (more, size, 0)
        put(lease, "the end\n", size + 1008)
        newer = client.jobs.log(job_id, after=size)
        assert (newer.text, newer.missed_bytes) == ("the end\n", 1000)
        assert client.jobs.log(job_id, after=10**9).text == "the end\n", "of another attempt"


def test_the_id_of_the_submission_goes_with_the_job(live: Live) -> None:
    spec = live.spec()
    answer = live.http.post(
        "/v1/fine_tuning/jobs", json=spec, headers={"x-request-id": "req-of-a-user"}
    )
    assert answer.headers["x-request-id"] == "req-of-a-user"
    job_id = answer.json()["id"]
    lease = live.claim()
    assert lease is not None
    assert (lease.body["job_id"], lease.body["request_id"]) == (job_id, "req-of-a-user")
    first = live.job(job_id, "/events", order="asc", limit=1)["data"][0]
    assert first["data"]["request_id"] == "req-of-a-user"


@pytest.mark.parametrize(("query", "param", "code"), BAD)
def test_bad_input_is_refused(
    live: Live, error_of: Callable[..., dict[str, Any]], query: str, param: str, code: str
) -> None:
    job_id, lease = live.running()
    put(lease, "text", 4)
    answer = live.http.get(f"/v1/fine_tuning/jobs/{job_id}/logs?{query}")
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param
    assert code in {error["code"], *(problem["code"] for problem in error["errors"])}
