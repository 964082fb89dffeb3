"""A real service in its own process, and a scripted one for what a healthy service never does."""

import contextlib
import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dar.client import Client
from dar.protocol.checkpoints import Checkpoint
from dar.protocol.jobs import Job
from dar.settings import environment
from fakes.loopback import LoopbackServer, Request

PROMPTS = b"".join(
    json.dumps({"prompt": f"prompt {n}", "ground_truth": "x"}).encode() + b"\n" for n in range(5)
)
METHOD: dict[str, Any] = {
    "type": "dar",
    "dar": {
        "hyperparameters": {"max_steps": 2},
        "rewards": {"components": [{"name": "none", "url": "http://127.0.0.1:61999/score"}]},
    },
}


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    home: Path
    api_key: str
    worker_key: str


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx2.get(f"{url}/readyz", trust_env=False, verify=False).is_success:
                return
        except httpx2.TransportError:
            time.sleep(0.05)
    pytest.fail(f"the service did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def service(
    tmp_path_factory: pytest.TempPathFactory,
    end_of_folder: Callable[[Path], contextlib.ExitStack],
) -> Service:
    home = tmp_path_factory.mktemp("home")
    model = home / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    log = home / "service.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve", "--port", str(port)],
            env=environment(
                home=home, egress_allow_cidrs="127.0.0.0/8", egress_allow_http="127.0.0.1"
            ),
            stdout=sink,
            stderr=sink,
        )
    end = end_of_folder(Path(__file__).parent)
    end.callback(shutil.rmtree, home, ignore_errors=True)
    end.callback(process.wait, timeout=20)
    end.callback(process.send_signal, signal.SIGTERM)
    _wait_for(url, process, log)
    keys = [(home / name).read_text().strip() for name in ("api_key", "worker_key")]
    return Service(url, home, *keys)


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.api_key, service.url) as client:
        yield client


@pytest.fixture
def prompts() -> bytes:
    return PROMPTS


@pytest.fixture
def method() -> dict[str, Any]:
    return METHOD


@pytest.fixture
def new_job(client: Client) -> Callable[..., Job]:
    def create(**fields: Any) -> Job:
        file = client.files.create(PROMPTS)
        return client.jobs.create(model="tiny", training_file=file.id, method=METHOD, **fields)

    return create


@dataclass(frozen=True)
class Trained:
    """A job with a checkpoint and all that a worker says on the way."""

    job_id: str
    checkpoint: Checkpoint
    content: dict[str, bytes]


class Worker:
    """What a worker says to the service, without training anything."""

    def __init__(self, service: Service) -> None:
        self._http = httpx2.Client(
            base_url=f"{service.url}/v1/worker", trust_env=False, verify=False
        )
        claim = {"node": "n", "slot": "0", "incarnation": "i", "boot_id": "b"}
        key = {"authorization": f"Bearer {service.worker_key}"}
        answer = self._http.post("/leases/claim", json=claim, headers=key)
        self.lease = answer.json()
        self._http.headers["authorization"] = f"Bearer {self.lease['token']}"

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        body = {"attempt": self.lease["attempt"], **body}
        answer = self._http.post(f"/leases/{self.lease['lease_id']}/{path}", json=body)
        assert answer.is_success, answer.text
        return dict(answer.json())

    def upload(self, content: dict[str, bytes], step: int) -> str:
        manifest = {
            "step": step,
            "kind": "full",
            "last_seq": 2,
            "config_sha256": "0" * 64,
            "metrics": {"dar/rewards_mean": 0.5},
            "files": [
                {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in sorted(content.items())
            ],
        }
        text = json.dumps(manifest).encode()
        content = {**content, "MANIFEST.json": text}
        digest = hashlib.sha256(text).hexdigest()
        made = self.post("checkpoints", manifest=manifest, manifest_sha256=digest)
        folder = f"checkpoints/{made['checkpoint_id']}"
        for name, data in content.items():
            path = f"/leases/{self.lease['lease_id']}/{folder}/files/{name}"
            query = {"attempt": self.lease["attempt"], "offset": 0}
            answer = self._http.put(path, content=data, params=query)
            assert answer.is_success, answer.text
        self.post(f"{folder}/commit")
        return str(made["checkpoint_id"])

    def close(self) -> None:
        self._http.close()


SAMPLE = {
    "group": 0,
    "prompt": "prompt 0",
    "finish_reason": "stop",
    "completion_tokens": 3,
    "reward_status": "reward",
    "advantage": 0.0,
    "weight": 1.0,
    "logp_policy": -1.0,
    "logp_ref": -1.0,
    "logp_behavior": -1.0,
}


@pytest.fixture(scope="session")
def trained(service: Service) -> Iterator[Trained]:
    content = {
        "config.json": b"{}",
        "model.safetensors": bytes(range(256)) * 12_000,
        "resume/optimizer.safetensors": b"o" * 1000,
        "resume/state.json": b"{}",
    }
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(service.api_key, service.url))
        file = client.files.create(PROMPTS)
        job = client.jobs.create(model="tiny", training_file=file.id, method=METHOD)
        worker = stack.enter_context(contextlib.closing(Worker(service)))
        assert worker.lease["job_id"] == job.id
        samples = [
            {**SAMPLE, "index": n, "completion": f"text {n}", "reward": float(n)} for n in range(3)
        ]
        values = {"dar/rewards_mean": 0.5, "dar/loss": None}
        rows = [
            {"type": "metrics", "seq": 1, "at": 1.0, "step": 1, "values": values},
            {"type": "samples", "seq": 2, "at": 1.0, "step": 1, "samples": samples},
        ]
        worker.post("batch", rows=rows)
        checkpoint_id = worker.upload(content, step=1)
        yield Trained(job.id, client.checkpoints.retrieve(job.id, checkpoint_id), content)


@dataclass
class Answer:
    """One scripted answer; a status of 0 closes the connection instead."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    declared_bytes: int | None = None


class Scripted:
    """A server that gives its answers in turn, the last one again and again, and keeps what it was
    sent.
    """

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.url = ""

    def __call__(self, request: Request) -> None:
        self.requests.append((f"{request.method} {request.target}", request.headers, request.body))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer.status == 0:
            return
        body = json.dumps(answer.body).encode() if answer.raw is None else answer.raw
        headers = {name.replace("-", "_"): value for name, value in answer.headers.items()}
        length = str(answer.declared_bytes or len(body))
        request.answer(body, answer.status, content_length=length, **headers)
        request.keeps = answer.declared_bytes is None


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    with contextlib.ExitStack() as stack:

        def start(*answers: Answer) -> Scripted:
            script = Scripted(*answers)
            server = stack.enter_context(LoopbackServer(script))
            script.url = server.url.rstrip("/")
            return script

        yield start


@pytest.fixture
def answer() -> type[Answer]:
    return Answer


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off in hundredths of its length."""
    monkeypatch.setattr("dar.client.transport.FIRST_BACKOFF_SECONDS", 0.005)
