"""Checkpoints and inputs over a network that breaks."""

import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dar.client.transport import Backoff, failure_of
from dar.errors import CheckpointError, FencedError, ModelNotFoundError, ServiceConnectionError
from dar.protocol.checkpoints import Manifest, ManifestFile
from dar.protocol.worker import CheckpointUpload, Fail, Lease, NewCheckpointRow
from fakes.cutting_proxy import CuttingProxy
from fakes.scripted_installation import ScriptedInstallation
from worker.api import GaveUpError, WorkerClient
from worker.folders import AttemptRecord, SlotFolder
from worker.identity import claim_of
from worker.models.local import InputFetchError, safe_path
from worker.supervisor import checkpoints
from worker.supervisor.checkpoints import CheckpointUploader
from worker.supervisor.inputs import LocalInputs
from worker.supervisor.state import AttemptState

PART = 256 * 1024
SIZE = 10 * PART


@pytest.fixture
def lease(installation: ScriptedInstallation, request: pytest.FixtureRequest) -> Iterator[Lease]:
    """Of a job with one reward service, or with the components that are the parameter."""
    installation.stop_plain_worker()  # it would claim the job
    if (components := getattr(request, "param", None)) is None:
        installation.submit(steps=4)
    else:
        dar = {"hyperparameters": {"max_steps": 4}, "rewards": {"components": components}}
        installation.submit_spec(b'{"prompt": "Once"}\n', dar)
    key = (installation.home / "worker_key").read_text().strip()
    settings = installation.settings(node="test", slot="uploads")
    with contextlib.closing(WorkerClient(installation.url, key, node="test")) as client:
        lease = client.claim(claim_of(settings))
        assert lease is not None
        yield lease
    with contextlib.closing(WorkerClient(installation.url, lease.token, node="test")) as client:
        fail = Fail(attempt=lease.attempt, kind="user", code="over", message="the test is over")
        client.end(lease.lease_id, fail)


@pytest.fixture
def state(lease: Lease, tmp_path: Path) -> AttemptState:
    folder = SlotFolder.of(tmp_path, "uploads").attempt(lease.lease_id)
    folder.create(AttemptRecord(lease_id=lease.lease_id, job_id=lease.job_id, attempt=1))
    state = AttemptState(lease, folder, threading.Event())
    state.gives_up_at = (
        time.monotonic() + 20
    )  # a broken service fails the test instead of being waited for
    return state


@pytest.fixture
def connect(state: AttemptState) -> Iterator[Callable[[str], WorkerClient]]:
    clients: list[WorkerClient] = []

    def connect(url: str) -> WorkerClient:
        client = WorkerClient(url, state.lease.token, node="test", give_up=state.is_given_up)
        clients.append(client)
        return client

    yield connect
    for client in clients:
        client.close()


def publish(state: AttemptState, step: int) -> NewCheckpointRow:
    folder = state.folder.work / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    content = os.urandom(SIZE)
    (folder / "model.safetensors").write_bytes(content)
    file = ManifestFile(
        name="model.safetensors", bytes=SIZE, sha256=hashlib.sha256(content).hexdigest()
    )
    manifest = Manifest(step=step, kind="full", config_sha256="0" * 64, files=[file])
    text = manifest.model_dump_json(indent=1).encode()
    (folder / "MANIFEST.json").write_bytes(text)
    return NewCheckpointRow(
        type="checkpoint",
        seq=1,
        at=0.0,
        step=step,
        folder=folder.name,
        manifest_sha256=hashlib.sha256(text).hexdigest(),
    )


def test_an_upload_that_breaks_goes_on_where_it_was(
    installation: ScriptedInstallation,
    state: AttemptState,
    connect: Callable[[str], WorkerClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "PART_BYTES", PART)
    monkeypatch.setattr("dar.client.transport.FIRST_BACKOFF_SECONDS", 0.05)
    proxy = CuttingProxy(installation.port, cuts=3, after=int(2.5 * PART))
    uploader = CheckpointUploader(state, connect(proxy.url), keep_last=3)
    uploader.take(publish(state, 2))
    uploader.finish()
    uploader.run()
    proxy.close()
    assert proxy.cuts_left == 0, "the network must have broken"
    (found,) = installation.checkpoints(state.lease.job_id)
    assert uploader.committed == {2: found["id"]}
    assert proxy.sent < SIZE + 4 * PART, "only what was cut off is sent again"


class AnswerLost(WorkerClient):
    """A client that hears no answer to the parts behind the first, and so sends each again."""

    def put_part(self, *args: Any, offset: int, **options: Any) -> CheckpointUpload:
        answer = super().put_part(*args, offset=offset, **options)
        if offset:
            raise ServiceConnectionError("the answer was lost")
        return answer


def test_an_upload_may_disagree_with_the_service_as_often_as_it_gets_on(
    installation: ScriptedInstallation, state: AttemptState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PART_BYTES", PART)
    monkeypatch.setattr("dar.client.transport.FIRST_BACKOFF_SECONDS", 0.01)
    assert SIZE // PART > checkpoints.UPLOAD_ATTEMPTS
    lossy = AnswerLost(installation.url, state.lease.token, node="test", give_up=state.is_given_up)
    with contextlib.closing(lossy) as client:
        uploader = CheckpointUploader(state, client, keep_last=3)
        uploader.take(publish(state, 2))
        uploader.finish()
        uploader.run()
    assert list(uploader.committed) == [2]


def test_local_copies_go_when_a_newer_checkpoint_is_committed(
    installation: ScriptedInstallation, state: AttemptState, connect: Callable[[str], WorkerClient]
) -> None:
    uploader = CheckpointUploader(state, connect(installation.url), keep_last=3)
    for step in (1, 2):
        uploader.take(publish(state, step))
    uploader.finish()
    uploader.run()
    assert list(uploader.committed) == [1, 2]
    left = [path.name for path in (state.folder.work / "checkpoints").iterdir()]
    assert left == ["step-2"]


def test_checkpoints_beyond_keep_last_are_not_uploaded(
    installation: ScriptedInstallation, state: AttemptState, connect: Callable[[str], WorkerClient]
) -> None:
    uploader = CheckpointUploader(state, connect(installation.url), keep_last=3)
    for step in (1, 2, 3, 4):
        uploader.take(publish(state, step))
    uploader.finish()
    uploader.run()
    assert list(uploader.committed) == [2, 3, 4]


def test_an_altered_local_checkpoint_never_becomes_visible(
    installation: ScriptedInstallation,
    state: AttemptState,
    connect: Callable[[str], WorkerClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dar.client.transport.FIRST_BACKOFF_SECONDS", 0.01)
    row = publish(state, 2)
    file = state.folder.work / "checkpoints" / row.folder / "model.safetensors"
    file.write_bytes(bytes(SIZE))
    uploader = CheckpointUploader(state, connect(installation.url), keep_last=3)
    uploader.take(row)
    with pytest.raises(CheckpointError, match="could not be uploaded"):
        uploader.run()
    assert installation.checkpoints(state.lease.job_id) == []


def test_inputs_are_fetched_over_a_broken_network_and_verified(
    installation: ScriptedInstallation,
    state: AttemptState,
    connect: Callable[[str], WorkerClient],
    fetch: Callable[..., LocalInputs],
) -> None:
    proxy = CuttingProxy(installation.port, cuts=1, after=10)
    models = installation.home / "models"
    inputs = fetch(state, connect(proxy.url), models)
    proxy.close()
    assert proxy.cuts_left == 0
    assert inputs.training_file.read_bytes() == b'{"prompt": "Once"}\n'
    assert inputs.model_folder == models / "tiny"


def test_a_model_that_is_not_here_comes_from_the_service(
    installation: ScriptedInstallation,
    state: AttemptState,
    connect: Callable[[str], WorkerClient],
    fetch: Callable[..., LocalInputs],
    tmp_path: Path,
) -> None:
    inputs = fetch(state, connect(installation.url), tmp_path)
    assert inputs.model_folder.is_relative_to(state.folder.path.with_name("models"))
    assert (inputs.model_folder / "config.json").read_text() == "{}"


def test_a_model_that_is_nowhere_is_said(
    installation: ScriptedInstallation,
    state: AttemptState,
    connect: Callable[[str], WorkerClient],
    fetch: Callable[..., LocalInputs],
    tmp_path: Path,
) -> None:
    folder = installation.home / "models" / "tiny"
    aside = folder.rename(tmp_path / "aside")
    try:
        with pytest.raises(ModelNotFoundError, match="model 'tiny' was removed"):
            fetch(state, connect(installation.url), tmp_path)
    finally:
        aside.rename(folder)


@pytest.fixture
def judge(installation: ScriptedInstallation) -> Iterator[Path]:
    """A folder of a reward model in the service's models directory."""
    folder: Path = installation.home / "models" / "judge"
    folder.mkdir()
    (folder / "config.json").write_text('{"num_labels": 1}')
    yield folder
    shutil.rmtree(folder)


MODELS = [
    {"name": "rm", "kind": "hf_model", "model": "judge"},
    {"name": "hub", "kind": "hf_model", "model": "owner/judge"},
]


@pytest.mark.usefixtures("judge")
@pytest.mark.parametrize("lease", [MODELS], indirect=True)
def test_a_reward_model_comes_from_the_service_unless_it_is_here(
    installation: ScriptedInstallation,
    state: AttemptState,
    connect: Callable[[str], WorkerClient],
    fetch: Callable[..., LocalInputs],
    tmp_path: Path,
) -> None:
    inputs = fetch(state, connect(installation.url), tmp_path)
    [fetched] = inputs.reward_models.values()
    assert fetched.is_relative_to(state.folder.path.with_name("models"))
    assert (fetched / "config.json").read_text() == '{"num_labels": 1}'
    here = tmp_path / "judge"
    here.mkdir()
    inputs = fetch(state, connect(installation.url), tmp_path)
    assert inputs.reward_models == {"rm": here}


@pytest.mark.parametrize("lease", [MODELS], indirect=True)
def test_a_reward_model_that_is_nowhere_is_said(
    installation: ScriptedInstallation,
    judge: Path,
    state: AttemptState,
    connect: Callable[[str], WorkerClient],
    fetch: Callable[..., LocalInputs],
    tmp_path: Path,
) -> None:
    aside = judge.rename(tmp_path / "aside")
    try:
        with pytest.raises(ModelNotFoundError, match="component rm was removed"):
            fetch(state, connect(installation.url), tmp_path)
    finally:
        aside.rename(judge)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "."])
def test_an_input_cannot_be_named_out_of_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputFetchError, match="not a path in a folder"):
        safe_path(tmp_path, name)


def test_a_token_of_another_attempt_is_fenced_or_refused_and_not_tried_again(
    installation: ScriptedInstallation, state: AttemptState, connect: Callable[[str], WorkerClient]
) -> None:
    client = connect(installation.url)
    late = Fail(attempt=99, kind="transient", code="late", message="too late")
    with pytest.raises(FencedError):
        client.until_answered(lambda: client.end(state.lease.lease_id, late), "outcome")


def test_a_service_that_is_away_is_asked_until_nobody_waits_any_more(
    state: AttemptState, connect: Callable[[str], WorkerClient], unused_port: Callable[[], int]
) -> None:
    client = connect(f"http://127.0.0.1:{unused_port()}")
    with pytest.raises(ServiceConnectionError, match="cannot reach the DAR service"):
        client.inputs(state.lease.lease_id)
    threading.Timer(0.3, state.over.set).start()
    with pytest.raises(GaveUpError):
        client.until_answered(lambda: client.inputs(state.lease.lease_id), "inputs")


def test_a_retry_after_is_heeded_and_pauses_grow_to_their_limit() -> None:
    error = failure_of(httpx2.Response(503, headers={"retry-after": "7"}))
    assert error.retryable
    assert Backoff(30.0).next(error.retry_after_seconds) == 7
    backoff = Backoff(longest=2.0)
    drawn = [backoff.next() for _ in range(6)]
    assert all(pause <= 2.0 for pause in drawn)
    assert drawn[-1] >= 1.0
