"""Jobs that are paused because rewards are missing go on by themselves when a look at their reward
service shows rewards.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import update

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_spec import RewardComponent
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import RewardContext, RewardSample
from fakes.live_service import Live
from fakes.reward_server import RewardServer, ScoreRequest
from service.rewards.watch import RewardWatch
from service.store import reward_pauses
from service.store.tables import AttemptRow, JobRow


class Judge:
    """A reward service whose answers the test sets."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.asked: list[Any] = []
        self.limits_ms: list[int] = []
        self.pause_seconds = 0.0
        self.accepts_as: Callable[[str], str] | None = None
        """Makes the ``request_id`` of a 202 from that of the request; None: rewards at once."""

    def __call__(self, request: ScoreRequest) -> None:
        body = request.content
        self.asked.append(body)
        self.limits_ms.append(int(request.headers["x-dar-deadline-ms"]))
        time.sleep(self.pause_seconds)
        if self.accepts_as is not None:
            request_id = self.accepts_as(body["request_id"])
            request.json({"request_id": request_id, "status": "accepted"}, 202)
            return
        rewards = [1.0] * len(body["samples"] if "samples" in body else body["query"])
        request.json({"request_id": body.get("request_id"), "rewards": rewards}, self.status)


@contextlib.contextmanager
def serving(judge: Judge) -> Iterator[Judge]:
    with RewardServer(judge) as server:
        judge.url = server.url
        yield judge


@pytest.fixture
def live(serve: Callable[..., Any]) -> Any:
    """A service whose own thread makes its first look when these tests are long over."""
    return serve(reconcile_seconds=600.0, reward_probe_seconds=600.0)


@pytest.fixture
def judge() -> Iterator[Judge]:
    with serving(Judge()) as judge:
        yield judge


@pytest.fixture
def refusing() -> Iterator[Judge]:
    with serving(Judge()) as judge:
        judge.status = 401
        yield judge


@pytest.fixture
def paused(live: Live) -> Callable[..., str]:
    """Makes a job that is paused because rewards are missing."""

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


def make_due(live: Live) -> None:
    with live.runtime.database.write() as transaction:
        transaction.execute(
            update(JobRow).values(not_before=transaction.now - timedelta(seconds=1))
        )


def stored_statuses(live: Live, *job_ids: str) -> list[str]:
    with live.runtime.database.read() as transaction:
        return [transaction.get_one(JobRow, job_id).status for job_id in job_ids]


def test_a_job_goes_on_when_its_service_gives_rewards_again(
    live: Live, judge: Judge, paused: Callable[..., str]
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


@pytest.fixture
def waiting(live: Live) -> Callable[..., str]:
    """Makes a job whose first attempt found no reward service."""

    def make(*components: dict[str, Any]) -> str:
        dar = {"rewards": {"components": list(components)}}
        job_id, lease = live.running(dar=dar, skip_validation=True)
        said = {"reason": "waiting_for_reward", "message": "connection refused"}
        assert lease.post("/release", **said).json()["status_detail"] == "waiting_for_reward"
        return str(job_id)

    return make


def test_a_job_that_never_had_a_reward_is_claimed_when_its_service_answers(
    live: Live, judge: Judge, waiting: Callable[..., str]
) -> None:
    job_id = waiting({"name": "letters", "url": judge.url})
    watch = RewardWatch(live.runtime)
    for status, why in ((503, "HTTP 503"), (401, "HTTP 401")):
        judge.status = status
        make_due(live)
        assert live.claim() is None
        watch.run_once()
        job = live.job(job_id)
        assert (job["status"], job["status_detail"]) == ("queued", "waiting_for_reward")
        assert job["status_message"].endswith(f"{judge.url}: {why}")
        assert live.claim() is None
    younger = live.submit(skip_validation=True)["id"]
    judge.status = 200
    make_due(live)
    watch.run_once()
    job = live.job(job_id)
    assert (job["status"], job["status_detail"]) == ("queued", None)
    claimed = [live.claim(slot) for slot in ("1", "2")]
    assert [lease and lease.body["job_id"] for lease in claimed] == [younger, job_id]


def test_a_service_that_only_workers_may_reach_is_tried_by_one_in_ten_minutes(
    live: Live, waiting: Callable[..., str], free_port: Callable[[], int]
) -> None:
    url = f"http://127.0.0.1:{free_port()}/score"
    job_id = waiting({"name": "letters", "url": url})
    watch = RewardWatch(live.runtime)
    make_due(live)
    watch.run_once()
    first = live.job(job_id)["status_message"]
    assert first.startswith("the service cannot connect to the reward service")
    assert f"{url}: connection refused" in first
    assert live.claim() is None
    with live.runtime.database.write() as transaction:
        ago = transaction.now - reward_pauses.WORKER_TRIES_AFTER
        transaction.execute(update(AttemptRow).values(ended_at=ago))
    make_due(live)
    watch.run_once()
    assert "A worker tries now" in live.job(job_id)["status_message"]
    lease = live.claim()
    assert lease is not None
    assert lease.post("/release", reason="waiting_for_reward").json()["status"] == "queued"
    facts = [
        event["data"]
        for event in live.job(job_id, "/events", limit=100)["data"]
        if event["data"].get("by")
    ]
    assert [fact["by"] for fact in facts] == ["worker", "worker", "service", "worker"]


def test_a_paused_job_says_once_that_the_service_cannot_connect(
    live: Live, paused: Callable[..., str], free_port: Callable[[], int]
) -> None:
    url = f"http://127.0.0.1:{free_port()}/score"
    job_id = paused({"name": "letters", "url": url}, is_outage=True)
    for _ in range(3):
        make_due(live)
        RewardWatch(live.runtime).run_once()
    messages = [event["message"] for event in live.job(job_id, "/events", limit=100)["data"]]
    assert len([text for text in messages if "cannot connect" in text and url in text]) == 1
    assert "Resume the job" in messages[0]
    assert live.job(job_id)["status"] == "paused"


def test_a_job_whose_rewards_the_worker_computes_is_tried_by_a_worker(
    live: Live, waiting: Callable[..., str]
) -> None:
    job_id = waiting({"name": "json", "kind": "builtin", "fn": "json_valid"})
    make_due(live)
    RewardWatch(live.runtime).run_once()
    assert "a worker" in live.job(job_id)["status_message"]
    with live.runtime.database.write() as transaction:
        ago = transaction.now - reward_pauses.WORKER_TRIES_AFTER
        transaction.execute(update(AttemptRow).values(ended_at=ago))
    make_due(live)
    RewardWatch(live.runtime).run_once()
    assert live.claim() is not None


def test_a_service_is_asked_in_its_own_protocol(
    live: Live, judge: Judge, paused: Callable[..., str]
) -> None:
    text = {"protocol": "openrlhf", "prompt_format": "text"}
    file_id = live.upload(b'{"prompt": "hi"}\n{"prompt": "ho"}\n').json()["id"]
    job_id = paused({"name": "letters", "url": judge.url, **text}, training_file=file_id)
    make_due(live)
    RewardWatch(live.runtime).run_once()
    assert live.job(job_id)["status"] == "queued"
    assert "query" in judge.asked[-1]


def test_every_component_must_be_back(
    live: Live, judge: Judge, paused: Callable[..., str], free_port: Callable[[], int]
) -> None:
    job_id = paused(
        {"name": "one", "url": judge.url},
        {"name": "two", "url": f"http://127.0.0.1:{free_port()}/score"},
    )
    make_due(live)
    RewardWatch(live.runtime).run_once()
    assert live.job(job_id)["status"] == "paused"


def test_a_slow_service_has_the_time_that_its_job_allows(
    live: Live, judge: Judge, paused: Callable[..., str]
) -> None:
    judge.pause_seconds = 0.3
    ids = [
        paused({"name": "letters", "url": judge.url, "timeouts": {"attempt": seconds}})
        for seconds in (0.1, 60)
    ]
    make_due(live)
    RewardWatch(live.runtime).run_once()
    assert [live.job(job_id)["status"] for job_id in ids] == ["paused", "queued"]
    assert 50_000 < max(judge.limits_ms) <= 60_000


def test_a_look_has_an_end_whatever_its_job_allows(
    live: Live, judge: Judge, paused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.rewards.watch.PROBE_SECONDS", 0.2)
    judge.pause_seconds = 1.0
    job_id = paused({"name": "letters", "url": judge.url, "timeouts": {"attempt": 3600}})
    make_due(live)
    RewardWatch(live.runtime).run_once()
    assert (live.job(job_id)["status"], len(judge.asked)) == ("paused", 1)


def test_a_service_that_accepts_a_request_is_back_before_its_result_comes(
    live: Live, judge: Judge, paused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.rewards.watch.PROBE_SECONDS", 5.0)
    job_id = paused({"name": "letters", "url": judge.url, "reply": "either"})
    watch = RewardWatch(live.runtime)
    judge.accepts_as = lambda _request_id: "rwr_of_somebody_else"
    make_due(live)
    watch.run_once()
    assert live.job(job_id)["status"] == "paused", "that was another request"
    judge.accepts_as = str
    make_due(live)
    watch.run_once()
    assert live.job(job_id)["status"] == "queued"
    callback = judge.asked[-1]["reply"]["callback"]
    late = live.http.post(
        urlsplit(callback["url"]).path,
        json={"request_id": judge.asked[-1]["request_id"], "rewards": [1.0, 1.0]},
        headers={"authorization": f"Bearer {callback['token']}"},
    )
    assert late.status_code == 410, late.text


def test_a_202_that_the_job_does_not_allow_resumes_nothing(
    live: Live, judge: Judge, paused: Callable[..., str]
) -> None:
    judge.accepts_as = str
    job_id = paused({"name": "letters", "url": judge.url})
    make_due(live)
    RewardWatch(live.runtime).run_once()
    assert (live.job(job_id)["status"], len(judge.asked)) == ("paused", 1)


@pytest.mark.parametrize(
    ("other", "status"),
    [({"weight": 0}, "queued"), ({"required": False}, "queued"), ({"role": "gate"}, "paused")],
)
def test_only_a_component_that_makes_samples_errors_keeps_a_job_paused(
    live: Live,
    judge: Judge,
    paused: Callable[..., str],
    free_port: Callable[[], int],
    other: dict[str, Any],
    status: str,
) -> None:
    down = {"name": "down", "url": f"http://127.0.0.1:{free_port()}/score", **other}
    job_id = paused({"name": "letters", "url": judge.url}, down)
    make_due(live)
    RewardWatch(live.runtime).run_once()
    assert live.job(job_id)["status"] == status


def test_where_no_component_is_required_one_must_be_back(
    live: Live, judge: Judge, paused: Callable[..., str], free_port: Callable[[], int]
) -> None:
    down = {"url": f"http://127.0.0.1:{free_port()}/score", "required": False}
    none = paused({"name": "one", **down}, {"name": "two", **down})
    one = paused({"name": "one", "url": judge.url, "required": False}, {"name": "two", **down})
    make_due(live)
    RewardWatch(live.runtime).run_once()
    assert [live.job(job_id)["status"] for job_id in (none, one)] == ["paused", "queued"]


def test_a_refusal_by_a_component_that_only_watches_would_pause_the_job_again(
    live: Live, judge: Judge, paused: Callable[..., str], refusing: Judge
) -> None:
    watches = {"name": "watches", "url": refusing.url, "weight": 0}
    job_id = paused({"name": "letters", "url": judge.url}, watches)
    watch = RewardWatch(live.runtime)
    make_due(live)
    watch.run_once()
    assert live.job(job_id)["status"] == "paused"
    refusing.status = 503
    make_due(live)
    watch.run_once()
    assert live.job(job_id)["status"] == "queued"


def test_a_refusal_marks_the_endpoint_until_its_service_gives_rewards_again(
    live: Any, refusing: Judge, paused: Callable[..., str]
) -> None:
    endpoint = live.register(refusing.url)["id"]
    job_id = paused({"name": "letters", "endpoint": endpoint})
    watch = RewardWatch(live.runtime)
    states = []
    for status in (401, 503, 200):
        refusing.status = status
        make_due(live)
        watch.run_once()
        states.append(live.http.get(f"/v1/reward_endpoints/{endpoint}").json()["state"])
    assert states == ["misconfigured", "misconfigured", "ok"]
    assert live.job(job_id)["status"] == "queued"


def test_a_refusal_of_an_older_revision_says_nothing_of_the_endpoint(
    live: Any, refusing: Judge, paused: Callable[..., str]
) -> None:
    endpoint = live.register(refusing.url)["id"]
    paused({"name": "letters", "endpoint": endpoint})

    async def probe(*_: Any) -> bool:
        path = f"/v1/reward_endpoints/{endpoint}/rotate_secret"
        assert (await asyncio.to_thread(live.http.post, path)).status_code == 200
        raise RewardMisconfiguredError("no", code="http_401")

    make_due(live)
    RewardWatch(live.runtime, probe).run_once()
    assert live.http.get(f"/v1/reward_endpoints/{endpoint}").json()["state"] == "ok"


def test_a_job_that_cannot_be_looked_at_keeps_no_other_job_paused(
    live: Live, judge: Judge, paused: Callable[..., str]
) -> None:
    component = {"name": "letters", "url": judge.url}
    bad_spec, bad_row, fine = (paused(component) for _ in range(3))
    with live.runtime.database.write() as transaction:
        transaction.execute(update(JobRow).where(JobRow.id == bad_spec).values(spec={"dar": 1}))
        training_file = transaction.get_one(JobRow, bad_row).training_file
    (live.settings.artifacts_path / "files" / training_file).write_bytes(b"[1, 2]\n")
    make_due(live)
    RewardWatch(live.runtime).run_once()
    statuses = stored_statuses(live, bad_spec, bad_row, fine)
    assert statuses == ["paused", "paused", "queued"]
    with live.runtime.database.read() as transaction:
        assert reward_pauses.due(transaction, 16) == [], "their next look takes its time"


def test_a_job_goes_on_while_another_one_is_still_being_looked_at(
    live: Live, paused: Callable[..., str]
) -> None:
    seen: list[str] = []
    slow, fast = (
        paused({"name": name, "url": f"http://127.0.0.1:61999/{name}"}) for name in ("slow", "fast")
    )

    def wait_for_fast() -> None:
        until = time.monotonic() + 20
        while stored_statuses(live, fast) != ["queued"] and time.monotonic() < until:
            time.sleep(0.01)
        seen.extend(stored_statuses(live, slow, fast))

    async def probe(
        component: RewardComponent,
        access: ComponentAccess,
        samples: Sequence[RewardSample],
        context: RewardContext,
    ) -> bool:
        del access, samples, context
        if component.name == "slow":
            await asyncio.to_thread(wait_for_fast)
        return True

    make_due(live)
    RewardWatch(live.runtime, probe).run_once()
    assert seen == ["paused", "queued"]


def test_a_refusal_and_a_hanging_service_hold_up_no_other_job(
    live: Live, paused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.rewards.watch.PROBE_SECONDS", 0.2)
    names = ("hangs", "refuses", "fine")
    ids = {name: paused({"name": name, "url": f"http://127.0.0.1:61999/{name}"}) for name in names}

    async def probe(
        component: RewardComponent,
        access: ComponentAccess,
        samples: Sequence[RewardSample],
        context: RewardContext,
    ) -> bool:
        assert access.secrets == list(live.runtime.reward_secrets)
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
    live: Live, paused: Callable[..., str], judge: Judge
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


def test_a_service_that_hangs_delays_no_job_that_is_due_later(
    serve: Callable[..., Any], judge: Judge
) -> None:
    live = serve(reward_probe_seconds=0.1)
    asked, released = threading.Event(), threading.Event()

    def hang(_: ScoreRequest) -> None:
        asked.set()
        released.wait(30)

    def pause(url: str) -> str:
        rewards = {"components": [{"name": "letters", "url": url}]}
        job_id, lease = live.running(dar={"rewards": rewards}, skip_validation=True)
        lease.post("/release", reason="paused_reward", is_outage=True)
        return str(job_id)

    with RewardServer(hang) as hanging:
        try:
            stuck = pause(hanging.url)
            assert asked.wait(20)
            fine = pause(judge.url)
            until = time.monotonic() + 15
            while live.job(fine)["status"] != "queued" and time.monotonic() < until:
                time.sleep(0.05)
            assert [live.job(job)["status"] for job in (stuck, fine)] == ["paused", "queued"]
        finally:
            released.set()
