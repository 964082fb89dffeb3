"""The stream of a job: its whole history and what comes, each event once, whatever breaks."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from sqlalchemy import delete

from dar.client import Client
from dar.errors import ConfigurationError, InvalidRequestError
from dar.protocol.stream import StreamFrame
from fakes.cutting_proxy import CuttingProxy
from fakes.live_service import SAMPLE, Lease, Live
from fakes.postgres import Postgres
from service.api import stream
from service.background import feeds
from service.store.tables import JobEventRow

BAD = [
    ("/stream?types=metrics,nonsense", "types", "unknown_type"),
    ("/stream?types=", "types", "unknown_type"),
    ("/stream?from_seq=0", "from_seq", "greater_than_equal"),
    ("/stream?from_seq=x", "from_seq", "int_parsing"),
    ("/stream?after=1", "after", "unknown_parameter"),
    ("/events?types=nonsense", "types", "unknown_type"),
    ("/events?wait=5", "wait", "missing_field"),
    ("/events?order=asc&after_seq=0&wait=31", "wait", "less_than_equal"),
    ("/events?order=asc&after_seq=-1", "after_seq", "greater_than_equal"),
    ("/events?after_seq=1", "after_seq", "exclusive_fields"),
    ("/events?order=asc&after_seq=1&after=ftevent-1", "after_seq", "exclusive_fields"),
]


def step_rows(step: int) -> tuple[dict[str, Any], ...]:
    return (
        {"type": "metrics", "step": step, "values": {"dar/loss": 1 / step}},
        {"type": "samples", "step": step, "samples": [SAMPLE, {**SAMPLE, "index": 1}]},
        {"type": "event", "level": "info", "message": f"after {step}", "data": {"kind": "note"}},
    )


def finish(lease: Lease, step: int) -> None:
    checkpoint_id = lease.checkpoint(step)
    ended = lease.post("/complete", last_seq=lease.seq, checkpoint_id=checkpoint_id)
    assert ended.status_code == 200, ended.text


def seqs(frames: list[dict[str, Any]]) -> list[int]:
    return [frame["seq"] for frame in frames if frame["type"] not in {"done", "gap"}]


@contextmanager
def opened(live: Live, job_id: str, last: int = 0, query: str = "") -> Iterator[httpx2.Response]:
    path = f"/v1/fine_tuning/jobs/{job_id}/stream{query}"
    headers = {"last-event-id": str(last)} if last else {}
    with live.http.stream("GET", path, headers=headers) as answer:
        yield answer


def frames_of(live: Live, job_id: str, last: int = 0, query: str = "") -> list[dict[str, Any]]:
    """All frames of a stream to its end, which is written out."""
    with opened(live, job_id, last, query) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    blocks = [block.removeprefix(": ping\n") for block in text.split("\n\n")]
    assert blocks[-2:] == ["data: [DONE]", ""]
    frames = []
    for block in blocks[:-2]:
        name, kind, data = (line.partition(": ")[2] for line in block.split("\n"))
        frame = json.loads(data)
        assert (name, kind) == (str(frame["seq"]), frame["type"])
        assert "error" not in frame
        StreamFrame.model_validate(frame)
        frames.append(frame)
    return frames


def test_openais_client_follows_a_job_from_its_beginning_to_its_end(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PING_SECONDS", 0.02)  # keepalives between all frames
    job_id, lease = live.running()
    lease.say(*step_rows(1))
    client = openai.OpenAI(
        api_key=live.key("api_key"),
        base_url=f"{live.url}/v1",
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )
    followed = client.get(
        f"/fine_tuning/jobs/{job_id}/stream",
        cast_to=object,
        stream=True,
        stream_cls=openai.Stream[object],
    )
    frames: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: frames.extend(followed))  # type: ignore[arg-type] # dicts, as the stream has no model
    reader.start()
    time.sleep(0.1)
    for step in (2, 3, 4):
        lease.say(*step_rows(step))
        time.sleep(0.05)
    finish(lease, 4)
    reader.join(20)
    assert not reader.is_alive()
    client.close()

    assert seqs(frames) == list(range(1, len(frames)))
    kinds = [frame["type"] for frame in frames]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "status": 3, "metrics": 4, "sample": 4, "event": 4, "checkpoint": 1, "done": 1,
    }  # fmt: skip
    assert kinds[-2:] == ["status", "done"]
    job = frames[-1]["job"]
    assert (job["id"], job["status"], job["error"]) == (job_id, "succeeded", None)
    samples = next(frame["event"]["data"] for frame in frames if frame["type"] == "sample")
    assert samples == {
        "kind": "samples", "step": 1, "attempt": 1, "count": 2, "min_reward": 1.0, "max_reward": 1.0,
    }  # fmt: skip
    listed = live.job(job_id, "/events", limit=100)["data"]
    assert {event["type"] for event in listed} == {"message", "metrics"}, "as before"
    assert frames_of(live, job_id) == frames, "the same once more, from the database"
    for kind in ("status", "metrics", "sample", "event", "checkpoint"):
        some = frames_of(live, job_id, query=f"?types={kind}")
        assert [frame["type"] for frame in some] == [kind] * kinds.count(kind) + ["done"]
        found = live.job(job_id, "/events", types=kind, order="asc", limit=100)["data"]
        assert [event["seq"] for event in found] == seqs(some)


def test_a_reader_that_is_cut_off_again_and_again_gets_each_event_once(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "HELD_FRAMES", 3)
    monkeypatch.setattr(feeds, "PAGE", 2)  # most readers are behind what is held
    job_id, lease = live.running(dar={"hyperparameters": {"max_steps": 29}})

    def write() -> None:
        for step in range(1, 30):
            lease.say(*step_rows(step))
        finish(lease, 29)

    writer = threading.Thread(target=write)
    writer.start()
    got: list[int] = []
    while not got or writer.is_alive():
        with opened(live, job_id, got[-1] if got else 0) as answer:
            for count, line in enumerate(answer.iter_lines()):
                if line.startswith("id: ") and not line.endswith(f" {got[-1] if got else 0}"):
                    got.append(int(line[4:]))
                if count > 17:
                    break
    rest = seqs(frames_of(live, job_id, got[-1]))
    assert got + rest == list(range(1, 29 * 3 + 4 + 1))


def test_the_sdk_follows_through_breaks_of_the_connection(live: Live) -> None:
    job_id, lease = live.running()
    proxy = CuttingProxy(urlsplit(live.url).port or 0, cuts=3, after=1500, of_answers=True)

    def write() -> None:
        for step in range(1, 5):
            lease.say(*step_rows(step))
            time.sleep(0.05)
        finish(lease, 4)

    with Client(live.key("api_key"), proxy.url) as client:
        writer = threading.Thread(target=write)
        writer.start()
        frames = list(client.jobs.stream(job_id))
        writer.join()
        assert proxy.cuts_left == 0
        assert [frame.seq for frame in frames[:-1]] == list(range(1, len(frames)))
        assert frames[-1].job is not None
        assert frames[-1].job.status == "succeeded"
        some = list(client.jobs.stream(job_id, types="metrics", from_seq=8))
        assert [frame.type for frame in some] == ["metrics"] * 2 + ["done"]
        polled = client.jobs.poll_events(job_id, after_seq=3, limit=2)
        assert [event.seq for event in polled] == [4, 5]
        with pytest.raises(ConfigurationError, match="from_seq"):
            client.jobs.stream(job_id, from_seq=0)
        with pytest.raises(InvalidRequestError, match="nonsense"):
            list(client.jobs.stream(job_id, types="nonsense"))  # type: ignore[arg-type] # on purpose
    proxy.close()


def test_what_is_no_longer_stored_is_a_gap_with_a_link(live: Live) -> None:
    job_id, lease = live.running(dar={"hyperparameters": {"max_steps": 1}})
    lease.say(*step_rows(1))
    finish(lease, 1)
    whole = frames_of(live, job_id)
    with live.runtime.database.write() as transaction:
        transaction.execute(
            delete(JobEventRow).where(JobEventRow.job_id == job_id, JobEventRow.seq < 4)
        )
    gap, *rest = frames_of(live, job_id)
    link = f"/v1/fine_tuning/jobs/{job_id}"
    assert (gap["type"], gap["seq"]) == ("gap", 3)
    assert gap["gap"] == {"from_seq": 1, "to_seq": 3, "link": link}
    assert rest == whole[3:]
    assert live.http.get(link).status_code == 200
    ahead, *rest = frames_of(live, job_id, last=1000)
    newest = whole[-1]["seq"]
    assert ahead["gap"] == {"from_seq": newest + 1, "to_seq": 1000, "link": link}
    assert rest == whole[-1:]
    with live.runtime.database.write() as transaction:
        transaction.execute(delete(JobEventRow).where(JobEventRow.job_id == job_id))
    gap, done = frames_of(live, job_id, last=2)
    assert (gap["gap"]["from_seq"], gap["gap"]["to_seq"]) == (3, newest)
    assert done == whole[-1]


def test_a_long_poll_waits_for_the_next_event_and_not_for_a_job_that_has_ended(
    live: Live,
) -> None:
    job_id, lease = live.running(dar={"hyperparameters": {"max_steps": 1}})
    first = live.job(job_id, "/events", order="asc", after_seq=0, wait=20)
    assert [event["seq"] for event in first["data"]] == [1, 2]
    writer = threading.Timer(0.2, lambda: lease.say(*step_rows(1)))
    writer.start()
    began = time.monotonic()
    news = live.job(job_id, "/events", order="asc", after_seq=2, wait=20, types="sample,event")
    assert time.monotonic() - began < 10
    assert [event["seq"] for event in news["data"]] == [4, 5]
    assert not live.job(job_id, "/events", order="asc", after_seq=5, wait=0)["data"]
    page = live.job(job_id, "/events", order="asc", after_seq=0, limit=2)
    assert page["has_more"] is True
    finish(lease, 1)
    newest = live.job(job_id, "/events", order="asc", after_seq=5)["data"][-1]["seq"]
    began = time.monotonic()
    assert not live.job(job_id, "/events", order="asc", after_seq=newest, wait=20)["data"]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("path", "param", "code"), BAD)
def test_bad_input_is_refused(
    live: Live, error_of: Callable[..., dict[str, Any]], path: str, param: str, code: str
) -> None:
    job_id = live.submit()["id"]
    answer = live.http.get(f"/v1/fine_tuning/jobs/{job_id}{path}")
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param
    assert code in {error["code"], *(problem["code"] for problem in error["errors"])}


def test_a_stream_needs_a_job_a_key_and_an_id_of_a_frame(
    live: Live, error_of: Callable[..., dict[str, Any]]
) -> None:
    job_id = live.submit()["id"]
    path = f"/v1/fine_tuning/jobs/{job_id}/stream"
    error = error_of(live.http.get(path, headers={"last-event-id": "x"}))
    assert (error["param"], error["code"]) == ("last-event-id", "invalid_cursor")
    assert live.http.get(path.replace(job_id, "ftjob-none")).status_code == 404
    assert live.client(None).get(path).status_code == 401
    assert live.worker().get(path).status_code == 403


def test_the_examples_of_the_page_work(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    job_id, lease = live.running(dar={"hyperparameters": {"max_steps": 1}})
    lease.say(*step_rows(1))
    finish(lease, 1)
    log = {"attempt": 1, "text": "the end\n", "bytes": 8}
    assert lease.http.put("/log", json=log).status_code == 204
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    section = page.split("## Stream, samples and logs\n")[1].split("\n## ")[0]
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(examples) >= 3
    http = openai.DefaultHttpxClient(trust_env=False)
    key = live.key("api_key")
    with (
        Client(key, live.url) as client,
        openai.OpenAI(api_key=key, base_url=f"{live.url}/v1", http_client=http) as other,
    ):
        job = client.jobs.retrieve(job_id)
        for example in examples:
            exec(example, {"client": client, "job": job, "openai": openai, "openai_client": other})
    assert "succeeded" in capsys.readouterr().out


def test_a_stop_of_the_service_ends_streams(live: Live) -> None:
    job_id, _ = live.running()
    with opened(live, job_id) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": ping"
        live.runtime.notifier.release()
        assert "data: [DONE]" not in list(lines), "the client is to come back"


@pytest.mark.slow  # a PostgreSQL of its own, and two services
def test_a_reader_of_one_replica_gets_what_another_one_stores(
    serve: Callable[..., Live], postgres: Postgres
) -> None:
    url = postgres.url(postgres.create())
    first, second = serve(database_url=url), serve(database_url=url)
    job_id, lease = first.running(dar={"hyperparameters": {"max_steps": 20}})
    got: list[dict[str, Any]] = []
    readers = [
        threading.Thread(target=lambda: got.extend(frames_of(second, job_id))) for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    waiting = threading.Thread(
        target=lambda: got.extend(
            second.job(job_id, "/events", order="asc", after_seq=2, wait=20)["data"][:1]
        )
    )
    waiting.start()
    for step in range(1, 21):
        lease.say(*step_rows(step))
    finish(lease, 20)
    for reader in (*readers, waiting):
        reader.join(30)
        assert not reader.is_alive()
    found = sorted(frame["seq"] for frame in got if frame["type"] != "done")
    whole = range(1, 2 + 20 * 3 + 2 + 1)
    assert found == sorted([*(seq for seq in whole for _ in readers), 3])


def test_a_revoked_key_reads_no_busy_stream_any_more(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHECK_SECONDS", 0.0)
    job_id, lease = live.running()
    made = live.http.post("/v1/api_keys", json={"scopes": ["read"]}).json()
    headers = {"authorization": f"Bearer {made['key']}"}
    path = f"/v1/fine_tuning/jobs/{job_id}/stream"
    with live.http.stream("GET", path, headers=headers) as answer:
        parts = answer.iter_text()
        next(parts)
        live.http.post(f"/v1/api_keys/{made['id']}/revoke")
        lease.say(*step_rows(1))
        rest = "".join(parts)  # it ends, though the job has not
    assert "[DONE]" not in rest
