"""An installation of real processes that are restarted when they die, as by systemd."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import httpx2
import psutil

from dar.settings import environment
from fakes.postgres import Postgres
from fakes.scripted_installation import FAST, Valkey, free_port
from service.artifacts import Artifacts
from service.storage.folder import FolderStorage
from service.store.database import Database

Dialect = Literal["sqlite", "postgresql"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

TESTS = Path(__file__).parents[1]
SERVICE = ("-m", "service")
UNFENCED = (str(TESTS / "chaos" / "unfenced_service.py"),)
WATCH_SECONDS = 0.05
COOLDOWN_SECONDS = 0.3
"""Between the death of a process and its restart."""


def until(look: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until ``look`` gives something true, and return that.

    Raises:
        TimeoutError: It did not in time.
    """
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.05)
    return found


class Stack:
    """Services, workers, a database and a broker; each is a process of its own.

    Args:
        folder: Where everything is; made anew.
        dialect: Of the database.
        replicas: Number of services.
        slots: Names of the workers' slots.
        has_broker: Whether a Valkey wakes the workers.
        has_faults: Whether `faults` may arm instants of `dar.fault_points`.
        service: How a service is started.
        **settings: Settings of all processes that differ from `FAST`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dialect: Dialect = "sqlite",
        replicas: int = 1,
        slots: Sequence[str] = (),
        has_broker: bool = False,
        has_faults: bool = False,
        service: Sequence[str] = SERVICE,
        **settings: object,
    ) -> None:
        self.home, self.dialect, self.slots = folder, dialect, tuple(slots)
        self.ports = [free_port() for _ in range(replicas)]
        self._service = tuple(service)
        self.faults = folder / "faults"
        self._settings = FAST | settings | ({"fault_points": self.faults} if has_faults else {})
        self._wanted: dict[str, Callable[[], subprocess.Popen[bytes]]] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        self._watch = threading.Thread(target=self._restart_the_dead, name="watch")
        self.valkey = Valkey(folder) if has_broker else None
        self.postgres: Postgres | None = None

    # --- start and end

    def __enter__(self) -> "Stack":
        for name in ("models/tiny", "logs"):
            (self.home / name).mkdir(parents=True)
        (self.home / "models" / "tiny" / "config.json").write_text("{}")
        if self.valkey is not None:
            self.valkey.start()
        if self.dialect == "postgresql":
            self._postgres_folder = Path(tempfile.mkdtemp(prefix="dar-chaos-"))
            self._postgres_folder.chmod(0o755)
            self.postgres = Postgres(self._postgres_folder)
            self.postgres.wait()
            self._settings["database_url"] = self.postgres.url(self.postgres.create())
        for replica, port in enumerate(self.ports):
            self.want(f"service-{replica}", self._service_command(port))
            until((self.home / "api_key").exists, 60, "the keys")
        self._watch.start()
        for replica in range(len(self.ports)):
            self.until_ready(replica)
        for slot in self.slots:
            self.want_worker(slot)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closing.set()
        if self._watch.is_alive():
            self._watch.join()
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for trainer in self.trainers():
            with contextlib.suppress(psutil.NoSuchProcess):
                trainer.kill()
        if "database" in self.__dict__:
            self.database.close()
        if self.valkey is not None:
            self.valkey.stop()
        if self.postgres is not None:
            self.postgres.stop()
            shutil.rmtree(self._postgres_folder, ignore_errors=True)

    def _service_command(self, port: int) -> Sequence[str]:
        return [*self._service, "serve", "--port", str(port)]

    def want_worker(self, slot: str, **changes: object) -> None:
        """Run a worker, now and after each of its deaths."""
        number = self.slots.index(slot) if slot in self.slots else 0
        command = [str(TESTS / "worker" / "scripted_worker.py")]
        url = self.url(number % len(self.ports))
        self.want(f"worker-{slot}", command, slot=slot, base_url=url, **changes)

    def want(self, name: str, command: Sequence[str], **changes: object) -> None:
        """Run a process, now and after each of its deaths."""
        broker_url = None if self.valkey is None else self.valkey.url
        given = {"home": self.home, "base_url": self.url(0), "broker_url": broker_url}
        variables = environment(**(given | self._settings | changes))

        def start() -> subprocess.Popen[bytes]:
            with (self.home / "logs" / f"{name}.log").open("ab") as log:
                return subprocess.Popen(
                    [sys.executable, *command],
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

        with self._lock:
            self._wanted[name] = start
            self._running[name] = start()

    def drop(self, name: str) -> subprocess.Popen[bytes]:
        """Restart a process no longer; it is left as it is."""
        with self._lock:
            del self._wanted[name]
            return self._running[name]

    def _restart_the_dead(self) -> None:
        died: dict[str, float] = {}
        while not self._is_closing.wait(WATCH_SECONDS):
            with self._lock:
                for name, start in self._wanted.items():
                    if self._running[name].poll() is None:
                        continue
                    if (
                        time.monotonic() - died.setdefault(name, time.monotonic())
                        >= COOLDOWN_SECONDS
                    ):
                        self._running[name] = start()
                        del died[name]

    # --- what a row does to it

    def process(self, name: str) -> subprocess.Popen[bytes]:
        with self._lock:
            return self._running[name]

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until it is dead."""
        process = self.process(name)
        process.kill()
        process.wait()

    def until_ready(self, replica: int = 0, seconds: float = 60) -> None:
        until(lambda: self._is_ready(replica), seconds, f"service {replica}")

    def _is_ready(self, replica: int) -> bool:
        try:
            answer = httpx2.get(f"{self.url(replica)}/readyz", timeout=5, trust_env=False)
        except httpx2.HTTPError:
            return False
        return bool(answer.status_code == 200)

    def trainers(self, slot: str | None = None) -> list[psutil.Process]:
        """Trainers that live, of one slot or of all."""
        folder = str(self.home / "worker" / ("" if slot is None else f"slot-{slot}"))
        found = []
        for process in psutil.process_iter(["cwd", "status"]):
            is_dead = process.info["status"] == psutil.STATUS_ZOMBIE
            if not is_dead and (process.info["cwd"] or "").startswith(folder):
                found.append(process)
        return found

    # --- what a row asks of it

    def url(self, replica: int = 0) -> str:
        return f"http://127.0.0.1:{self.ports[replica]}"

    @cached_property
    def headers(self) -> dict[str, str]:
        key = (self.home / "api_key").read_text().strip()
        return {"authorization": f"Bearer {key}"}

    @cached_property
    def database(self) -> Database:
        """The database, to be looked into."""
        if self.postgres is None:
            return Database(f"sqlite:///{self.home / 'dar.db'}")
        return Database(str(self._settings["database_url"]))

    @property
    def artifacts(self) -> Artifacts:
        return Artifacts(FolderStorage(self.home / "artifacts"))

    def api(self, method: str, path: str, replica: int = 0, **options: Any) -> Any:
        """One call that must succeed; a service that is away or busy is called again."""
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = httpx2.request(
                    method,
                    f"{self.url(replica)}/v1{path}",
                    headers=self.headers,
                    timeout=20,
                    trust_env=False,
                    **options,
                )
                if answer.is_success:
                    return answer.json()
                if answer.status_code < 500 and answer.status_code != 429:
                    raise RuntimeError(f"{method} {path}: {answer.text}")
            except httpx2.HTTPError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    @cached_property
    def training_file(self) -> str:
        files = {"file": ("prompts.jsonl", b'{"prompt": "Once"}\n')}
        return str(self.api("POST", "/files", data={"purpose": "fine-tune"}, files=files)["id"])

    def spec(
        self, number: int, *, steps: int = 4, every: int = 2, **script: object
    ) -> dict[str, Any]:
        """A job whose training is scripted; ``number`` makes it differ from every other."""
        metadata = {"number": str(number)} | {name: str(value) for name, value in script.items()}
        return {
            "model": "tiny",
            "training_file": self.training_file,
            "seed": number,
            "metadata": metadata,
            "method": {
                "type": "dar",
                "dar": {
                    "hyperparameters": {"max_steps": steps},
                    "checkpointing": {"every_steps": every},
                    "rewards": {
                        "components": [{"name": "r", "url": "http://127.0.0.1:61999/score"}]
                    },
                },
            },
        }

    def submit(self, number: int, **options: Any) -> str:
        """Submit a job whose retries have one key."""
        headers = {**self.headers, "idempotency-key": f"job-{number}"}
        body = json.dumps(self.spec(number, **options)).encode()
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = httpx2.post(
                    f"{self.url(number % len(self.ports))}/v1/fine_tuning/jobs",
                    content=body,
                    headers={**headers, "content-type": "application/json"},
                    timeout=20,
                    trust_env=False,
                )
                if answer.is_success:
                    return str(answer.json()["id"])
            except httpx2.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} was not accepted")
            time.sleep(0.2)

    def job(self, job_id: str) -> Any:
        return self.api("GET", f"/fine_tuning/jobs/{job_id}")


@contextlib.contextmanager
def stack(**options: Any) -> Iterator[Stack]:
    """A running stack in a folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="dar-chaos-"))
    try:
        with Stack(folder, **options) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)
