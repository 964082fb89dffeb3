"""The commands, settings and secrets of ``docker/`` run a whole installation.

What runs is read from the files of ``docker/``: nothing of it is written here again.
"""

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import psutil
import pytest

from fakes.containers import children
from fakes.installation import eventually

if TYPE_CHECKING:
    from docker.conftest import Cluster

pytestmark = pytest.mark.timeout(600)
Users = Callable[..., openai.OpenAI]


def upload(client: openai.OpenAI, content: bytes) -> str:
    return client.files.create(file=("prompts.jsonl", content), purpose="fine-tune").id


def until(client: openai.OpenAI, job_id: str, step: int, seconds: float = 120) -> None:
    def reached() -> bool:
        job: Any = client.fine_tuning.jobs.retrieve(job_id)
        assert job.status not in {"failed", "cancelled"}, job.error
        return job.status == "succeeded" or bool(job.progress["step"] >= step)

    eventually(reached, seconds, f"{job_id} reaches step {step}")


@pytest.mark.slow  # a whole installation, and a job of its own
def test_a_job_ends_though_a_replica_a_worker_and_the_proxy_are_killed(
    cluster: "Cluster", users: Users, reviews_base: Path
) -> None:
    made = cluster.containers
    for name in made.made:  # what a container may do
        process = psutil.Process(made.processes[name].pid)
        said = Path(f"/proc/{process.pid}/status").read_text()
        assert process.uids().effective == int(made.made[name].user.partition(":")[0]), name
        assert re.findall(r"^(?:Cap\w+|NoNewPrivs):\t(\w+)$", said, re.MULTILINE) == [
            *("0" * 16,) * 5,
            "1",
        ]
        assert made.run(name, "touch", "/x", "/etc/x", "/usr/x") != 0, f"{name} writes to its root"

    client = users(max_retries=8)
    file_id = upload(client, (reviews_base / "prompts.jsonl").read_bytes())
    key: Any = {"Idempotency-Key": "one"}
    spec = cluster.spec(file_id, steps=30)
    with pytest.raises(openai.BadRequestError, match=r"may not read model\.safetensors"):
        client.fine_tuning.jobs.create(**spec | {"model": "closed"})
    job = client.fine_tuning.jobs.create(**spec, extra_headers=key)

    until(client, job.id, 4)
    made.kill("service-1")
    until(client, job.id, 8)
    made.kill("proxy")
    made.start("proxy")
    until(client, job.id, 12)
    (busy,) = [name for name in ("worker-0", "worker-1") if trainers(cluster, name)]
    made.kill(busy)
    eventually(lambda: not trainers(cluster, busy), 10, "the trainer ends with its worker")
    made.start(busy)
    made.start("service-1")
    until(client, job.id, 30, seconds=240)
    eventually(
        lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded", 60, "its end"
    )

    assert client.fine_tuning.jobs.create(**spec, extra_headers=key).id == job.id
    path = f"/fine_tuning/jobs/{job.id}"
    attempts: Any = client.get(f"{path}/attempts", cast_to=object)
    assert [one["status"] for one in attempts["data"]] in (
        ["succeeded", "lost"],
        ["lost", "succeeded"],
    )
    series: Any = client.get(f"{path}/metrics", cast_to=object)
    assert series["series"]["dar/loss"]["step"] == list(range(1, 31))
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert checkpoint.step_number == 30
    for name in ("service-1", "service-2", "worker-0", "worker-1", "postgres", "storage"):
        made.until_healthy(name)
    stored: Any = client.get(f"{path}/checkpoints/{checkpoint.id}", cast_to=object)
    assert stored["files"]
    for file in stored["files"]:
        url = f"{cluster.url}{path}/checkpoints/{checkpoint.id}/files/{file['name']}"
        sent = client._client.get(url, headers=client.auth_headers).raise_for_status()
        assert hashlib.sha256(sent.content).hexdigest() == file["sha256"], file["name"]
    assert not list(made.volume("dar").glob("artifacts/checkpoints/*")), "all is in the bucket"
    assert made.run("service-2", "dar", "backup", "/var/lib/dar/backup") == 0, made.log("service-2")
    for name in made.made:
        for secret in made.made[name].secrets.values():
            text = Path(secret).read_text().strip()
            assert not text or text not in made.log(name), f"{name} logs {Path(secret).name}"


def trainers(cluster: "Cluster", worker: str) -> list[psutil.Process]:
    """Processes of a worker that train."""
    process = cluster.containers.processes.get(worker)
    return [] if process is None else children(process.pid)


class Load:
    """Clients with the retries that are theirs, which upload, submit and read all the time."""

    def __init__(self, cluster: "Cluster", users: Users, threads: int) -> None:
        self.requests = Counter[str]()
        self.failures: list[str] = []
        self.submitted: list[str] = []
        self._cluster, self._stop = cluster, threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(users(), f"{id(self)}-{number}"))
            for number in range(threads)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, client: openai.OpenAI, name: str) -> None:
        def count(response: Any) -> None:
            self.requests[f"{response.request.method} {response.status_code // 100}xx"] += 1

        client._client.event_hooks["response"].append(count)
        turn = 0
        while not self._stop.is_set():
            turn += 1
            try:
                self._use(client, f"{name}-{turn}")
            except openai.OpenAIError as error:
                self.failures.append(repr(error))

    def _use(self, client: openai.OpenAI, name: str) -> None:
        file_id = upload(client, f'{{"prompt": "{name}"}}\n'.encode())
        assert client.files.content(file_id).read().decode().count(name) == 1
        spec = self._cluster.spec(file_id, steps=1)
        headers: Any = {"Idempotency-Key": f"load-{name}"}
        job = client.fine_tuning.jobs.create(**spec, extra_headers=headers)
        self.submitted.append(job.id)
        client.fine_tuning.jobs.cancel(job.id)
        client.fine_tuning.jobs.list(limit=5)
        client.fine_tuning.jobs.retrieve(job.id)


@pytest.mark.slow  # a whole installation, whose replicas are replaced
def test_no_request_fails_while_the_replicas_are_replaced_one_after_the_other(
    cluster: "Cluster", users: Users
) -> None:
    made = cluster.containers
    with Load(cluster, users, threads=4) as load:
        time.sleep(1)
        for name in ("service-1", "service-2"):
            assert made.stop(name) == 0
            made.start(name)
            made.until_healthy(name)
        time.sleep(1)
    assert load.failures == []
    assert load.requests["GET 2xx"] > 50, load.requests
    files = Counter(job.training_file for job in users().fine_tuning.jobs.list(limit=100))
    assert max(files.values()) == 1, "each submission is one job"
    assert len(files) >= len(load.submitted)
    print(dict(load.requests))  # noqa: T201 - the figures, for `pytest -s`
