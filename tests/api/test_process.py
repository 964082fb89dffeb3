"""The service as a process of its own: start, keys, memory, and a prompt end."""

import json
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from dar.settings import environment
from fakes.live_service import Live
from fakes.scripted_installation import wait_until

LOOPBACK = {"egress_allow_cidrs": "127.0.0.0/8", "egress_allow_http": "127.0.0.1"}
MAX_IDLE_BYTES = 150 * 1024**2


class Process:
    """``python -m service serve`` on a home."""

    def __init__(self, home: Path, port: int, **settings: object) -> None:
        variables = {f"DAR_{name.upper()}": str(value) for name, value in settings.items()}
        self.url = f"http://127.0.0.1:{port}"
        self.log = home.parent / f"log-{port}"
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "service", "serve", "--port", str(port)],
                env=environment(**LOOPBACK) | {"DAR_HOME": str(home)} | variables,
                stderr=log,
            )
        self.home = home

    def wait(self) -> None:
        deadline = time.monotonic() + 30
        while b'"ready"' not in self.log.read_bytes():
            assert self.popen.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def client(self, key: str = "api_key") -> httpx2.Client:
        headers = {"authorization": f"Bearer {(self.home / key).read_text().strip()}"}
        return httpx2.Client(
            base_url=self.url, headers=headers, timeout=30, trust_env=False, verify=False
        )


@contextmanager
def running(home: Path, port: int, **settings: object) -> Iterator[Process]:
    process = Process(home, port, **settings)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.wait(10)


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Process]:
    """A service at the first start of an installation, with a broker that is down."""
    home = tmp_path_factory.mktemp("first") / "home"
    settings = {"broker_url": "redis://127.0.0.1:1/0", "log_level": "debug"}
    with running(home, free_port(), **settings) as process:
        process.wait()
        yield process


def test_an_idle_service_is_small_and_without_torch(first: Process) -> None:
    with first.client() as client:
        assert client.get("/v1/files").status_code == 200
    seen = psutil.Process(first.popen.pid)
    assert seen.memory_info().rss < MAX_IDLE_BYTES
    assert not [item.path for item in seen.memory_maps() if "torch" in item.path]


def test_the_first_start_makes_keys_that_only_their_owner_reads(first: Process) -> None:
    assert stat.S_IMODE(first.home.stat().st_mode) == 0o700
    for name in ("api_key", "worker_key", "reward_secret"):
        assert stat.S_IMODE((first.home / name).stat().st_mode) == 0o600
    with first.client() as client:
        file = {"file": ("a.jsonl", b'{"prompt": "x"}\n')}
        client.post("/v1/files", data={"purpose": "fine-tune"}, files=file).raise_for_status()
    made = [path.relative_to(first.home).as_posix() for path in first.home.rglob("*")]
    assert {"dar.db", "dar.db-wal", "artifacts/files"} < set(made)
    assert [name for name in made if (first.home / name).stat().st_mode & 0o077] == []
    key = (first.home / "api_key").read_text().strip()
    database = b"".join(path.read_bytes() for path in first.home.glob("dar.db*"))
    assert key[-43:].encode() not in database
    assert key not in first.log.read_text()


def test_a_database_that_others_could_read_is_closed_to_them(serve: Callable[..., Live]) -> None:
    live = serve()
    database = live.settings.home / "dar.db"
    database.chmod(0o644)
    live.runtime.database.engine.dispose()
    assert live.http.get("/v1/files").status_code == 200
    assert stat.S_IMODE(database.stat().st_mode) == 0o600


def test_log_lines_are_json_with_the_requests_id(first: Process) -> None:
    with first.client() as client:
        client.get("/v1/files", headers={"x-request-id": "find-me"})

    def find() -> dict[str, Any] | None:  # the line is written after the answer
        lines = map(json.loads, first.log.read_text().splitlines())
        return next((line for line in lines if line.get("request_id") == "find-me"), None)

    line = wait_until(find, what="the log line")
    assert (line["method"], line["path"], line["status"]) == ("GET", "/v1/files", 200)


@pytest.mark.slow  # two processes
def test_two_services_that_start_at_once_share_keys_and_schema(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    home = tmp_path / "home"
    with running(home, free_port()) as one, running(home, free_port()) as two:
        for process in (one, two):
            process.wait()
        for process in (one, two):
            with process.client() as client:
                assert client.get("/v1/files").status_code == 200


def test_a_term_signal_ends_it_promptly_though_a_worker_waits(
    home: Path, free_port: Callable[[], int], serve: Callable[..., Any]
) -> None:
    with running(home, free_port()) as process:
        process.wait()
        with process.client() as client, process.client("worker_key") as worker:
            lease = submit_and_claim(client, worker)
            answers = []

            def listen() -> None:
                headers = {"authorization": f"Bearer {lease['token']}"}
                path = f"/v1/worker/leases/{lease['lease_id']}/directives"
                answers.append(worker.get(path, headers=headers, params={"wait": 20}))

            listener = threading.Thread(target=listen)
            listener.start()
            time.sleep(0.3)
            started = time.monotonic()
            process.popen.send_signal(signal.SIGTERM)
            status = process.popen.wait(10)
            listener.join(10)
    assert time.monotonic() - started < 5
    assert status == 0
    assert [answer.status_code for answer in answers] == [200]
    # After a restart the job is still there, and still its worker's.
    job = serve().job(lease["job_id"])
    assert (job["status"], job["attempt"]) == ("running", 1)


def submit_and_claim(client: httpx2.Client, worker: httpx2.Client) -> dict[str, Any]:
    file = {"file": ("a.jsonl", b'{"prompt": "x"}\n')}
    file_id = client.post("/v1/files", data={"purpose": "fine-tune"}, files=file).json()["id"]
    rewards = {"components": [{"name": "a", "url": "http://127.0.0.1:61999/"}]}
    spec = {"model": "base", "training_file": file_id}
    method = {"type": "dar", "dar": {"rewards": rewards}}
    assert client.post("/v1/fine_tuning/jobs", json=spec | {"method": method}).status_code == 200
    asks = {"node": "n", "slot": "0", "incarnation": "i", "boot_id": "b"}
    lease: dict[str, Any] = worker.post("/v1/worker/leases/claim", json=asks).json()
    return lease


def test_a_setting_replaces_a_key_and_the_old_one_is_refused(serve: Callable[..., Any]) -> None:
    old, new = serve().key("api_key"), "made-up-by-an-operator"
    live = serve(api_key=new)
    statuses = [live.client(key).get("/v1/files").status_code for key in (new, old)]
    assert statuses == [200, 401]


@pytest.mark.slow  # a process for each case
@pytest.mark.parametrize("command", ["serve", "migrate"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DAR_DATABASE_URL", "postgresql+psycopg://nobody:hush@127.0.0.1:1/none"),
        ("DAR_DATABASE_URL", "postgresql://u:hush@host:port/none"),
        ("DAR_BROKER_URL", "amqp://x"),
    ],
)
def test_what_it_cannot_start_with_is_told_in_one_line(
    tmp_path: Path, free_port: Callable[[], int], command: str, name: str, value: str
) -> None:
    given = {"DAR_HOME": str(tmp_path), "DAR_DATABASE_WAIT_SECONDS": "0.1", name: value}
    port = str(free_port())
    ended = subprocess.run(
        [sys.executable, "-m", "service", command],
        env=environment() | given | {"DAR_PORT": port},
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert ended.returncode == 1
    [line] = ended.stderr.decode().splitlines()
    assert name in json.loads(line)["message"]
    assert "hush" not in line
