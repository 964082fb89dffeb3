"""Where an attempt gets its models from: the host itself, the service, or a hub."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from dar.errors import HubUnreachableError, ModelNotFoundError
from dar.protocol.worker import Lease, Release
from fakes.hub import Hub
from fakes.loopback import LoopbackServer
from fakes.scripted_installation import ScriptedInstallation
from worker.api import WorkerClient
from worker.folders import AttemptRecord, SlotFolder
from worker.identity import claim_of
from worker.models import fetching
from worker.models.cache import ModelCache, ModelRecord
from worker.models.local import InputFetchError
from worker.supervisor.inputs import LocalInputs
from worker.supervisor.state import AttemptState

TOKEN = "hf_9XkQ2vRbW7mLpZt4"
NAME = "team/policy"
FILES = {
    "config.json": b"{}",
    "model.safetensors": os.urandom(300_000),
    "tokenizer.json": b'{"version": "1.0"}',
    "pytorch_model.bin": b"the same weights",
    "consolidated.safetensors": b"the same weights",
    "original/params.json": b"{}",
}
WANTED = {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one gated model."""
    monkeypatch.setattr("dar.client.transport.FIRST_BACKOFF_SECONDS", 0.01)
    models = frozenset({NAME})
    with Hub(
        {NAME: FILES}, gated=models, readers={TOKEN: models, "hf_stranger": frozenset()}
    ) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "library"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield server


class Host:
    """A machine that claims jobs and fetches their inputs."""

    def __init__(
        self, installation: ScriptedInstallation, folder: Path, fetch: Callable[..., LocalInputs]
    ) -> None:
        self._installation = installation
        self._fetch = fetch
        self.folder = folder
        self.jobs: list[str] = []
        self.cache = ModelCache(folder / "work" / "models", 10**9)
        self._settings = installation.settings(node="host", slot="models")
        self._key = (installation.home / "worker_key").read_text().strip()

    def submit(self) -> None:
        """A job with the hub's model."""
        dar = {"hyperparameters": {"max_steps": 2}}
        rows = b'{"prompt": "a", "completion": "b", "reward": 1}\n'
        self.jobs.append(self._installation.submit_spec(rows, dar, model=NAME))

    def client(self, key: str) -> WorkerClient:
        return WorkerClient(self._installation.url, key, node="host")

    def claim(self, slot: str = "models") -> Lease:
        settings = self._settings.model_copy(update={"slot": slot})
        with contextlib.closing(self.client(self._key)) as client:
            lease = client.claim(claim_of(settings))
        assert lease is not None
        return lease

    def give_back(self, lease: Lease) -> None:
        with contextlib.closing(self.client(lease.token)) as client:
            client.end(lease.lease_id, Release(attempt=lease.attempt, reason="drained"))

    def fetch(self, lease: Lease, **settings: Any) -> LocalInputs:
        folder = SlotFolder.of(self.folder / "work", "models").attempt(lease.lease_id)
        record = AttemptRecord(lease_id=lease.lease_id, job_id=lease.job_id, attempt=lease.attempt)
        folder.create(record)
        state = AttemptState(lease, folder, threading.Event())
        given = {"is_offline": False, "hf_token": TOKEN, "work_dir": self.folder / "work"}
        with contextlib.closing(self.client(lease.token)) as client:
            return self._fetch(state, client, self.folder / "own", **(given | settings))


@pytest.fixture
def host(
    installation: ScriptedInstallation, tmp_path: Path, fetch: Callable[..., LocalInputs]
) -> Iterator[Host]:
    installation.stop_plain_worker()  # it would claim the jobs
    made = Host(installation, tmp_path, fetch)
    yield made
    for job_id in made.jobs:
        installation.cancel(job_id)


def read(folder: Path | None) -> dict[str, bytes]:
    assert folder is not None
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_hub_model_is_downloaded_once_resumed_and_pinned_for_all_attempts(
    host: Host, hub: Hub
) -> None:
    host.submit()
    first = host.claim()
    hub.cuts = [100_000, 0, 100_000]
    inputs = host.fetch(first)
    assert read(inputs.model_folder) == {name: FILES[name] for name in WANTED}
    assert hub.asked().keys() == {(NAME, TOKEN)}
    ranges = [one.headers["range"] for one in hub.requests if "range" in one.headers]
    assert ranges == ["bytes=100000-", "bytes=100000-", "bytes=200000-"]
    assert not any("bin" in one.path or "original" in one.path for one in hub.requests)
    host.give_back(first)

    hub.commit = "c" * 40
    second = host.claim()
    assert second.model.revisions == {NAME: "b" * 40}
    asked = len(hub.requests)
    assert host.fetch(second).model_folder == inputs.model_folder
    assert len(hub.requests) == asked, "this host has the commit with which the job was begun"
    host.give_back(second)


def test_a_download_that_breaks_off_is_not_replaced_by_another_commit(host: Host, hub: Hub) -> None:
    host.submit()
    first = host.claim()
    host.fetch(first)
    host.give_back(first)
    hub.commit = "c" * 40
    hub.cuts = [0] * 3
    host.submit()
    _, second = host.claim(), host.claim("other")
    with pytest.raises(HubUnreachableError):
        host.fetch(second)
    host.give_back(second)
    assert host.claim("other").model.revisions == {NAME: "c" * 40}


def test_a_slot_shows_that_it_waits_for_the_download_of_another(host: Host, hub: Hub) -> None:
    host.submit()
    lease = host.claim()
    sizes = {name: len(FILES[name]) for name in WANTED}
    record = ModelRecord(name=NAME, version="b" * 40, files=sizes)
    held = host.cache.hold(record, lambda: None)
    assert held is not None
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        held.lock.close()

    host.fetch(lease, note=note)
    assert notes[0] == (
        "waiting for another worker of this host, which downloads the model 'team/policy'"
    )


def test_the_rest_of_a_download_needs_room_for_the_rest_alone(
    host: Host, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    check = fetching.check_room

    def checked(folder: Path, needs: int) -> None:
        needed.append(needs)
        check(folder, needs)

    monkeypatch.setattr(fetching, "check_room", checked)
    hub.cuts = [100_000, 0, 0, 0]
    host.submit()
    lease = host.claim()
    with pytest.raises(HubUnreachableError):
        host.fetch(lease, model_cache_bytes=1)
    assert host.fetch(lease, model_cache_bytes=1).model_folder is not None
    whole = sum(len(FILES[name]) for name in WANTED)
    arrived = 100_000 + len(FILES["config.json"])
    model = [needs for needs in needed if needs > 1000]
    assert model == [whole, whole - arrived]


def test_the_files_of_another_host_do_not_get_the_token(host: Host, hub: Hub) -> None:
    with LoopbackServer(lambda request: request.answer(FILES["model.safetensors"])) as storage:
        hub.storage = storage.url.rstrip("/").replace("127.0.0.1", "localhost")
        host.submit()
        assert read(host.fetch(host.claim()).model_folder).keys() == WANTED
        [request] = storage.requests
        assert "authorization" not in request.headers


def test_a_file_that_arrives_altered_is_no_model(host: Host, hub: Hub) -> None:
    altered = FILES["model.safetensors"][:-1] + b"?"
    with LoopbackServer(lambda request: request.answer(altered)) as storage:
        hub.storage = storage.url.rstrip("/")
        host.submit()
        with pytest.raises(InputFetchError, match=r"model\.safetensors of the model 'team/policy'"):
            host.fetch(host.claim())
        assert len(storage.requests) == 3
    assert host.cache.names() == []


def test_a_host_without_the_hub_uses_what_it_has(host: Host, hub: Hub, tmp_path: Path) -> None:
    host.submit()
    first = host.claim()
    hub.close()
    with pytest.raises(HubUnreachableError, match="cannot be reached to load the model 'team/pol"):
        host.fetch(first)
    snapshot = tmp_path / "library" / "models--team--policy" / "snapshots" / ("d" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("d" * 40)
    (snapshot / "config.json").write_text("{}")
    assert host.fetch(first).model_folder == snapshot
    host.give_back(first)
    assert host.claim().model.revisions == {NAME: "d" * 40}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hf_token": None}, "only to accounts that its owner has accepted; accept its licence"),
        ({"hf_token": "hf_stranger"}, "and set DAR_HF_TOKEN on the worker"),
        ({"hf_token": "hf_B6wEzK0rYf2aNx7i"}, r"HTTP 401: \[redacted\] is no token"),
    ],
    ids=["no token", "of another account", "expired"],
)
def test_what_the_hub_refuses_is_one_sentence_with_the_way_out(
    host: Host, hub: Hub, settings: dict[str, str | None], words: str
) -> None:
    hub.complaint = "hf_B6wEzK0rYf2aNx7i is no token"
    host.submit()
    with pytest.raises(ModelNotFoundError, match=words) as refused:
        host.fetch(host.claim(), **settings)
    assert "the model 'team/policy'" in refused.value.message
    assert refused.value.param == "model"


def test_a_job_whose_hub_model_cannot_be_had_fails_at_once_and_says_why(
    installation: ScriptedInstallation, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    installation.start_worker(hf_token="hf_stranger")
    dar = {"hyperparameters": {"max_steps": 2}}
    rows = b'{"prompt": "a", "completion": "b", "reward": 1}\n'
    errors = []
    for _ in range(2):
        job_id = installation.submit_spec(rows, dar, model=NAME)
        job = installation.wait(job_id, "succeeded", "failed")
        errors.append((job["error"]["code"], job["error"]["param"], job["failures"]))
        hub.close()
    assert errors == [
        ("model_not_found", "model", {"user": 1}),
        ("hub_unreachable", "model", {"user": 1}),
    ]
