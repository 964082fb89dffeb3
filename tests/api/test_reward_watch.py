"""Jobs that are paused for want of rewards go on by themselves when a look at their reward service shows rewards."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from sqlalchemy import update

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_spec import RewardComponent
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import RewardContext, RewardSample
from service.reward_watch import RewardWatch
from service.store.tables import Job


class Judge:
    """A reward service that is told what to answer."""

    def __init__(self) -> None:
        judge = self
        self.status = 200
        self.asked: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                judge.asked.append(body)
                samples = body["samples"] if "samples" in body else body["query"]
                rewards = [1.0] * len(samples)
                content = json.dumps(
                    {"request_id": body.get("request_id"), "rewards": rewards}
                ).encode()
                self.send_response(judge.status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/score"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def judge() -> Iterator[Judge]:
    judge = Judge()
    yield judge
    judge.close()


@pytest.fixture
def paused(live: Any) -> Callable[..., str]:
    """Makes a job that is paused for want of rewards; the service's own thread leaves it alone for a minute."""

    def make(*components: dict[str, Any], training_file: str | None = None, **release: Any) -> str:
        file_id = (
            training_file
            or live.upload(
                b'{"prompt": "hi", "ground_truth": "42", "more": 1}\n{"prompt": [{"role": "user", "content": "ho"}]}\n'
            ).json()["id"]
        )
        dar = {"rewards": {"components": list(components)}}
        job_id, lease = live.running(dar=dar, training_file=file_id, skip_validation=True)
        said = {"reason": "paused_reward", "code": "http_503", "message": "HTTP 503", **release}
        assert lease.post("/release", **said).json()["status"] == "paused"
        return str(job_id)

    return make


def make_due(live: Any) -> None:
    with live.runtime.database.write() as transaction:
        transaction.execute(update(Job).values(not_before=transaction.now - timedelta(seconds=1)))


def test_a_job_goes_on_when_its_service_gives_rewards_again(
    live: Any, judge: Judge, paused: Callable[..., str]
) -> None:
    job_id = paused({"name": "letters", "url": judge.url})
    watch = RewardWatch(live.runtime)
    watch.run_once()
    assert judge.asked == [], "not due yet"
    judge.status = 503
    make_due(live)
    watch.run_once()
    assert live.job(job_id)["status"] == "paused"
    watch.run_once()
    assert len(judge.asked) == 1, "the next look takes its time"
    judge.status = 200
    make_due(live)
    watch.run_once()
    job = live.job(job_id)
    assert (job["status"], job["error"]) == ("queued", None)
    asked = judge.asked[-1]
    assert (asked["mode"], asked["job_id"]) == ("validate", job_id)
    assert [sample["ground_truth"] for sample in asked["samples"]] == ["42", None]
    assert [sample["prompt"] for sample in asked["samples"]] == ["hi", None]
    assert "dar_reward_resumes_total 1.0" in live.http.get("/metrics").text


def test_a_service_is_asked_in_its_own_protocol(
    live: Any, judge: Judge, paused: Callable[..., str]
) -> None:
    text = {"protocol": "openrlhf", "prompt_format": "text"}
    file_id = live.upload(b'{"prompt": "hi"}\n{"prompt": "ho"}\n').json()["id"]
    job_id = paused({"name": "letters", "url": judge.url, **text}, training_file=file_id)
    make_due(live)
    RewardWatch(live.runtime).run_once()
    assert live.job(job_id)["status"] == "queued"
    assert "query" in judge.asked[-1]


def test_every_component_must_be_back(
    live: Any, judge: Judge, paused: Callable[..., str], free_port: Callable[[], int]
) -> None:
    job_id = paused(
        {"name": "one", "url": judge.url},
        {"name": "two", "url": f"http://127.0.0.1:{free_port()}/score"},
    )
    make_due(live)
    RewardWatch(live.runtime).run_once()
    assert live.job(job_id)["status"] == "paused"


def test_a_refusal_and_a_hanging_service_hold_up_no_other_job(
    live: Any, paused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.reward_watch.PROBE_SECONDS", 0.2)
    names = ("hangs", "refuses", "fine")
    ids = {name: paused({"name": name, "url": f"http://127.0.0.1:61999/{name}"}) for name in names}

    async def probe(
        component: RewardComponent,
        access: ComponentAccess,
        samples: Sequence[RewardSample],
        context: RewardContext,
    ) -> bool:
        assert access.secrets == [live.runtime.reward_secret]
        assert access.secrets[0] not in repr(access)
        if component.name == "hangs":
            await asyncio.sleep(60)
        if component.name == "refuses":
            raise RewardMisconfiguredError("no", code="http_401")
        return bool(samples) and context.mode == "validate"

    make_due(live)
    started = time.monotonic()
    RewardWatch(live.runtime, probe).run_once()
    assert time.monotonic() - started < 30
    statuses = {name: live.job(job_id)["status"] for name, job_id in ids.items()}
    assert statuses == {"hangs": "paused", "refuses": "paused", "fine": "queued"}


def test_what_is_not_asked_over_http_waits_for_its_user(
    live: Any, paused: Callable[..., str], judge: Judge
) -> None:
    job_id = paused({"name": "letters", "url": judge.url})
    make_due(live)
    RewardWatch(live.runtime, access_of=lambda _job, _component: None).run_once()
    assert (live.job(job_id)["status"], judge.asked) == ("paused", [])


def test_the_services_own_thread_does_it(serve: Callable[..., Any], judge: Judge) -> None:
    live = serve(reward_probe_seconds=0.1)
    component = {"name": "letters", "url": judge.url}
    job_id, lease = live.running(dar={"rewards": {"components": [component]}})
    lease.post("/release", reason="paused_reward", is_outage=True)
    until = time.monotonic() + 20
    while live.job(job_id)["status"] != "queued":
        assert time.monotonic() < until
        time.sleep(0.05)
