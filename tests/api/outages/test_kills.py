"""Submissions while the service or its database is killed: none is lost, none is done twice."""

import contextlib
import json
import random
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from fakes.postgres import Postgres
from fakes.scripted_installation import ScriptedInstallation, wait_until

PATH = "/v1/fine_tuning/jobs"
CLIENTS = 4


@pytest.fixture
def own(tmp_path: Path) -> Iterator[ScriptedInstallation]:
    installation = ScriptedInstallation(tmp_path)
    with ExitStack() as stack:
        stack.callback(installation.close)
        yield installation


class Submitters:
    """Clients that submit until they are stopped, and repeat each call until it gets a response.

    Half of the calls have a key; a tenth is sent again after its response.
    """

    def __init__(self, installation: ScriptedInstallation, file_id: str) -> None:
        self._installation = installation
        self._file_id = file_id
        self._stop = threading.Event()
        self.acknowledged: dict[str, str] = {}
        """Job by call."""
        self.errors: list[str] = []
        self.retries = 0
        self._threads = [
            threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        key = (self._installation.home / "api_key").read_text().strip()
        headers = {"authorization": f"Bearer {key}"}
        count = 0
        with httpx2.Client(headers=headers, trust_env=False, verify=False, timeout=40) as http:
            while not self._stop.is_set():
                count += 1
                call = f"{number}-{count}"
                with_key = rng.random() < 0.5
                tries = self._send(http, call, with_key=with_key, first=0)
                if rng.random() < 0.1:
                    self._send(http, call, with_key=with_key, first=tries)

    def _send(self, http: httpx2.Client, call: str, *, with_key: bool, first: int) -> int:
        """Send a call until it has a response; returns how many tries it has had."""
        spec = {
            "model": "tiny",
            "training_file": self._file_id,
            "metadata": {"call": call},
            "method": {"type": "dar", "dar": {"rewards": REWARDS}},
        }
        for tries in range(first, 10_000):
            headers = (
                {"idempotency-key": call} if with_key else {"x-stainless-retry-count": str(tries)}
            )
            try:
                answer = http.post(f"{self._installation.url}{PATH}", json=spec, headers=headers)
            except httpx2.RequestError:
                answer = None
            if answer is not None and answer.status_code == 200:
                job_id = answer.json()["id"]
                if self.acknowledged.setdefault(call, job_id) != job_id:
                    self.errors.append(f"{call} got two jobs")
                return tries + 1
            if answer is not None and answer.status_code != 503:
                self.errors.append(f"{call}: {answer.status_code} {answer.text}")
            self.retries += 1
            time.sleep(0.05)
        raise AssertionError("no response")


REWARDS = {"components": [{"name": "r", "url": "http://127.0.0.1:61999/score"}]}


def audit(clients: Submitters, stored: list[tuple[str, dict[str, Any]]]) -> None:
    """Every acknowledged submission is there, and each call has one job."""
    assert clients.errors == []
    assert clients.retries > 0
    assert len(clients.acknowledged) > CLIENTS
    assert dict.fromkeys(dict(stored)) == dict.fromkeys(clients.acknowledged.values())
    assert Counter(labels["call"] for _, labels in stored) == Counter(list(clients.acknowledged))


@contextlib.contextmanager
def submitting(own: ScriptedInstallation) -> Iterator[Submitters]:
    clients = Submitters(own, own.upload(b'{"prompt": "Once"}\n'))
    try:
        yield clients
    finally:
        clients.stop()


@pytest.mark.slow  # starts the service 20 times
def test_a_service_that_is_killed_amid_writes_loses_and_doubles_no_submission(
    own: ScriptedInstallation,
) -> None:
    own.start_service()
    with submitting(own) as clients:
        for _ in range(20):
            before = len(clients.acknowledged)
            wait_until(lambda before=before: len(clients.acknowledged) >= before + 3)
            time.sleep(random.uniform(0, 0.1))
            own.kill_service()
            own.start_service()
    with sqlite3.connect(own.home / "dar.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = database.execute("SELECT id, json(labels) FROM jobs").fetchall()
    audit(clients, [(job_id, json.loads(labels)) for job_id, labels in rows])


@pytest.mark.slow  # starts a PostgreSQL six times, and the service twice
def test_a_database_that_is_killed_under_load_loses_and_doubles_no_submission(
    own: ScriptedInstallation,
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="dar-pg-"))
    folder.chmod(0o755)  # PostgreSQL runs as a user of its own
    postgres = Postgres(folder)
    postgres.wait()
    url = postgres.url(postgres.create())
    try:
        own.start_service(database_url=url)
        with submitting(own) as clients:
            for number in range(5):
                before = len(clients.acknowledged)
                wait_until(lambda before=before: len(clients.acknowledged) >= before + 10)
                postgres.kill()
                if number == 2:
                    own.kill_service()
                    starting = threading.Timer(1.0, postgres.start)
                    starting.start()
                    own.start_service(database_url=url)  # waits for a database that recovers
                    starting.join()
                else:
                    postgres.start()
                postgres.wait()
                began = time.monotonic()
                before = len(clients.acknowledged)
                wait_until(lambda before=before: len(clients.acknowledged) > before)
                assert time.monotonic() - began < 10
        with psycopg.connect(url.replace("+psycopg", "")) as database:
            rows = database.execute("SELECT id, labels FROM jobs").fetchall()
        audit(clients, rows)
    finally:
        own.close()
        postgres.stop()
