"""A running service with clients for it, and what a worker and a reward service say to it."""

import functools
import gzip
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
from fastapi import FastAPI

from dar.protocol.checkpoints import Manifest
from dar.settings import Settings
from fakes.reward_server import ScoreRequest
from service.app import create_app
from service.openapi import describe
from service.runtime import Runtime

SAMPLE = {
    "group": 0, "index": 0, "prompt": "hi", "completion": "ho", "finish_reason": "stop",
    "completion_tokens": 1, "reward": 1.0, "reward_status": "reward", "advantage": 0.5,
    "weight": 1.5, "logp_policy": -1.0, "logp_ref": -1.0, "logp_behavior": -1.0,
}  # fmt: skip
"""A row of samples has some of these."""


@functools.cache
def announced_paths() -> dict[str, Any]:
    """The paths of the OpenAPI document, which is the same for every service."""
    paths: dict[str, Any] = describe(create_app(Settings()))["paths"]
    return paths


@functools.cache
def operations_of(path: str) -> dict[str, Any]:
    """The operations of the route that answers ``path``; none if there is no such route."""
    known = sorted(announced_paths(), key=lambda one: (one.count("{"), -len(one)))
    patterns = {
        one: re.sub(r"{\w+}", "[^/]+", re.sub(r"{(name|model)}$", ".+", one)) for one in known
    }
    fitting = (one for one in known if re.fullmatch(patterns[one], path))
    route = next(fitting, None)  # of several the first one is the route
    return {} if route is None else announced_paths()[route]


@dataclass
class Lease:
    """A claimed job, seen from its worker."""

    body: dict[str, Any]
    http: httpx2.Client
    seq: int = 0
    metrics: dict[str, float] = field(default_factory=lambda: {"dar/loss": 0.5})
    """Of the manifest of its next checkpoint."""

    @property
    def attempt(self) -> int:
        number: int = self.body["attempt"]
        return number

    def post(self, path: str, **values: Any) -> httpx2.Response:
        return self.http.post(path, json={"attempt": self.attempt, **values})

    def say(self, *rows: dict[str, Any], is_packed: bool = False) -> httpx2.Response:
        numbered = []
        for row in rows:
            self.seq += 1
            numbered.append({"seq": self.seq, "at": 1.7e9 + self.seq, **row})
        body = json.dumps({"attempt": self.attempt, "rows": numbered}).encode()
        headers = {"content-type": "application/json"}
        if is_packed:
            body, headers = gzip.compress(body), headers | {"content-encoding": "gzip"}
        return self.http.post("/batch", content=body, headers=headers)

    def manifest(self, step: int, files: dict[str, bytes]) -> tuple[Manifest, bytes]:
        entries = [
            {"name": name, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
            for name, body in sorted(files.items())
        ]
        made = Manifest.model_validate(
            {
                "step": step,
                "kind": "full",
                "last_seq": self.seq,
                "config_sha256": "0" * 64,
                "metrics": self.metrics,
                "files": entries,
            }
        )
        return made, made.model_dump_json(indent=1).encode()

    def announce(self, step: int, files: dict[str, bytes]) -> httpx2.Response:
        manifest, content = self.manifest(step, files)
        sha256 = hashlib.sha256(content).hexdigest()
        values = {"manifest": manifest.model_dump(mode="json"), "manifest_sha256": sha256}
        return self.post("/checkpoints", **values)

    def put(self, checkpoint: str, name: str, part: bytes, offset: int = 0) -> httpx2.Response:
        where = {"attempt": self.attempt, "offset": offset}
        return self.http.put(f"/checkpoints/{checkpoint}/files/{name}", params=where, content=part)

    def checkpoint(self, step: int, files: dict[str, bytes] | None = None) -> str:
        """An available checkpoint."""
        files = files or {"model.safetensors": b"weights", "resume/state.json": b"{}"}
        checkpoint_id: str = self.announce(step, files).json()["checkpoint_id"]
        for name, body in files.items():
            assert self.put(checkpoint_id, name, body).status_code == 200
        committed = self.post(f"/checkpoints/{checkpoint_id}/commit")
        assert committed.status_code == 200, committed.text
        return checkpoint_id


@dataclass
class Live:
    """A running service and clients for it."""

    app: FastAPI
    settings: Settings
    url: str
    http: httpx2.Client
    opened: list[httpx2.Client] = field(default_factory=list)

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = self.app.state.runtime
        return runtime

    def key(self, name: str) -> str:
        return (self.settings.home / name).read_text().strip()

    def client(self, key: str | None, path: str = "", **headers: str) -> httpx2.Client:
        """A client that accepts only what the OpenAPI document announces."""
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        made = httpx2.Client(
            base_url=self.url + path,
            headers=headers,
            timeout=30,
            trust_env=False,
            verify=False,
            event_hooks={"response": [self._is_announced]},
        )
        self.opened.append(made)
        return made

    def _is_announced(self, answer: httpx2.Response) -> None:
        path, method = answer.request.url.path, answer.request.method.lower()
        operation = operations_of(path)
        if method in operation and answer.status_code < 500:
            announced = operation[method]["responses"]
            assert str(answer.status_code) in announced, (method, path, answer.status_code)

    def worker(self) -> httpx2.Client:
        return self.client(self.key("worker_key"))

    def upload(self, content: bytes = b'{"prompt": "hi"}\n{"prompt": "ho"}\n') -> httpx2.Response:
        form = {"purpose": "fine-tune"}
        return self.http.post("/v1/files", data=form, files={"file": ("rows.jsonl", content)})

    def spec(self, **values: Any) -> dict[str, Any]:
        component = {"name": "letters", "url": "http://127.0.0.1:61999/score"}
        dar = {"hyperparameters": {"max_steps": 4}, "rewards": {"components": [component]}}
        file_id = values.pop("training_file", None) or self.upload().json()["id"]
        method = {"type": "dar", "dar": dar | values.pop("dar", {})}
        return {"model": "base", "training_file": file_id, "method": method, **values}

    def register(self, url: str, **values: Any) -> dict[str, Any]:
        """A reward endpoint with a secret header."""
        headers = {"Authorization": "Bearer s3cret-of-the-header"}
        body = {"name": "judge", "url": url, "headers": headers, **values}
        answer = self.http.post("/v1/reward_endpoints", json=body)
        assert answer.status_code == 200, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def submit(self, **values: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/fine_tuning/jobs", json=self.spec(**values))
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def job(self, job_id: str, path: str = "", **params: Any) -> Any:
        answer = self.http.get(f"/v1/fine_tuning/jobs/{job_id}{path}", params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def claim(self, slot: str = "0", incarnation: str = "life-1") -> Lease | None:
        asks = {"node": "node-1", "slot": slot, "incarnation": incarnation, "boot_id": "boot-1"}
        answer = self.worker().post("/v1/worker/leases/claim", json=asks)
        if answer.status_code == 204:
            return None
        body = answer.json()
        path = f"/v1/worker/leases/{body['lease_id']}"
        return Lease(body, self.client(body["token"], path))

    def running(self, **values: Any) -> tuple[str, Lease]:
        """A job that was submitted and claimed."""
        job_id: str = self.submit(**values)["id"]
        lease = self.claim()
        assert lease is not None
        assert lease.body["job_id"] == job_id
        return job_id, lease


@dataclass
class Judge:
    """A reward service: gives each completion its length, and remembers what it was sent."""

    url: str = ""
    status: int = 200
    answer: Callable[[dict[str, Any]], Any] | None = None
    delay: float = 0.0
    seen: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def __call__(self, request: ScoreRequest) -> None:
        self.seen.append((request.headers, request.body))
        time.sleep(self.delay)
        request.json((self.answer or self.lengths)(request.content), self.status)

    @staticmethod
    def lengths(asked: dict[str, Any]) -> dict[str, Any]:
        rewards = [float(len(sample["completion"])) for sample in asked["samples"]]
        return {"request_id": asked["request_id"], "rewards": rewards}
