"""A stored checkpoint that was damaged: the attempt resumes from the one before it."""

import contextlib
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.protocol.checkpoints import Manifest, ManifestFile
from dar.protocol.worker import Fail, Lease, MetricsRow, RegisterCheckpoint
from fakes.scripted_installation import ScriptedInstallation
from worker.api import WorkerClient
from worker.failures import failure_of
from worker.folders import AttemptRecord, SlotFolder
from worker.identity import claim_of
from worker.models.local import InputFetchError
from worker.spool import encode
from worker.supervisor.inputs import LocalInputs
from worker.supervisor.outcome import Finished
from worker.supervisor.state import AttemptState
from worker.supervisor.supervisor import Supervisor


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"we")


def lose_the_manifest(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()


def add_a_file(folder: Path) -> None:
    (folder / "resume" / "more.bin").write_bytes(b"?")


def lose_everything(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


DAMAGES = {
    flip_a_bit: "model.safetensors was altered",
    cut: "model.safetensors has 2 of 9 bytes",
    lose_the_manifest: "MANIFEST.json is missing",
    add_a_file: "resume/more.bin does not belong to it",
    lose_everything: "MANIFEST.json is missing",
}


class Setup:
    """A job that has written checkpoints of steps 2 and 4, and its next attempt."""

    def __init__(
        self, installation: ScriptedInstallation, work: Path, fetch: Callable[..., LocalInputs]
    ) -> None:
        self.installation = installation
        self.inputs_of = fetch
        self._work = work
        self._settings = installation.settings(node="test", slot="damaged")
        key = (installation.home / "worker_key").read_text().strip()
        self._worker = WorkerClient(installation.url, key, node="test")
        self.job_id = installation.submit(steps=8)

    def claim(self) -> Lease:
        lease = self._worker.claim(claim_of(self._settings))
        assert lease is not None
        assert lease.job_id == self.job_id
        return lease

    def folder(self, step: int, attempt: int = 1) -> Path:
        root = self.installation.home / "artifacts" / "checkpoints" / self.job_id
        return root / f"attempt-{attempt}" / f"step-{step}"

    def fetch(self, lease: Lease) -> Any:
        folder = SlotFolder.of(self._work, "damaged").attempt(lease.lease_id)
        folder.create(
            AttemptRecord(lease_id=lease.lease_id, job_id=lease.job_id, attempt=lease.attempt)
        )
        state = AttemptState(lease, folder, threading.Event())
        with contextlib.closing(self.client(lease)) as client:
            return self.inputs_of(state, client, self.installation.home / "models")

    def supervisor(self, lease: Lease) -> Supervisor:
        """Of an attempt whose trainer has ended, and whose rows and checkpoints have arrived."""
        slot = SlotFolder.of(self._work, "damaged")
        made = Supervisor(self._settings, lease, slot, threading.Event())
        made._folder.create(made._record)
        for arrived in made._arrived:
            arrived.set()
        return made

    def attempt(self) -> Any:
        """The newest one, as its user sees it."""
        path = f"/fine_tuning/jobs/{self.job_id}/attempts"
        return self.installation.api("GET", path)["data"][0]

    def client(self, lease: Lease) -> WorkerClient:
        return WorkerClient(self.installation.url, lease.token, node="test")

    def end(self, lease: Lease) -> None:
        fail = Fail(attempt=lease.attempt, kind="user", code="over", message="the test is over")
        with contextlib.closing(self.client(lease)) as client:
            client.end(lease.lease_id, fail)
        self.close()

    def close(self) -> None:
        self._worker.close()


def upload(client: WorkerClient, lease: Lease, step: int) -> None:
    contents = {"model.safetensors": b"weights-%d" % step, "resume/state.json": b"{}"}
    files = [
        ManifestFile(name=name, bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
        for name, body in contents.items()
    ]
    manifest = Manifest(step=step, kind="full", config_sha256="0" * 64, files=files)
    sha256 = hashlib.sha256(manifest.model_dump_json(indent=1).encode()).hexdigest()
    register = RegisterCheckpoint(attempt=lease.attempt, manifest=manifest, manifest_sha256=sha256)
    id_, made = lease.lease_id, client.register(lease.lease_id, register)
    for name, body in contents.items():
        client.put_part(id_, made.checkpoint_id, name, body, attempt=lease.attempt, offset=0)
    client.commit(id_, made.checkpoint_id, lease.attempt)


@pytest.fixture
def setup(
    installation: ScriptedInstallation, tmp_path: Path, fetch: Callable[..., LocalInputs]
) -> Setup:
    made = Setup(installation, tmp_path, fetch)
    lease = made.claim()
    with contextlib.closing(made.client(lease)) as client:
        for step in (2, 4):
            upload(client, lease, step)
    return made


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_next_older_checkpoint_is_used_and_an_event_says_so(
    setup: Setup, damage: Callable[[Path], None]
) -> None:
    damage(setup.folder(4))
    lease = setup.claim()
    inputs = setup.fetch(lease)
    assert (inputs.resume_from / "model.safetensors").read_bytes() == b"weights-2"
    assert (inputs.resume_from / "MANIFEST.json").is_file()
    assert [item["step_number"] for item in setup.installation.checkpoints(setup.job_id)] == [2]
    told = [text for text in setup.installation.messages(setup.job_id) if "set aside" in text]
    assert told == [
        f"checkpoint of step 4 is damaged and was set aside: {DAMAGES[damage]}; the newest whole "
        "one is that of step 2"
    ]
    assert setup.installation.job(setup.job_id)["progress"]["step"] == 2
    row = MetricsRow(type="metrics", seq=1, at=1.7e9, step=3, values={"dar/loss": 0.5})
    with contextlib.closing(setup.client(lease)) as client:
        client.batch(lease.lease_id, lease.attempt, [encode(row)])
    said = setup.installation.messages(setup.job_id)
    assert any(text.startswith("Step 3/8") for text in said), "this attempt's step is told"
    setup.end(lease)


def test_without_any_whole_checkpoint_the_job_begins_again(setup: Setup) -> None:
    cut(setup.folder(4))
    flip_a_bit(setup.folder(2))
    lease = setup.claim()
    assert setup.fetch(lease).resume_from is None
    told = [text for text in setup.installation.messages(setup.job_id) if "set aside" in text]
    assert told[-1].endswith("there is no older one, so the job begins again at step 0")
    setup.end(lease)


def test_a_stop_before_a_step_ends_the_job_with_the_checkpoint_that_was_fetched(
    setup: Setup,
) -> None:
    cut(setup.folder(4))
    lease = setup.claim()
    supervisor = setup.supervisor(lease)
    models = setup.installation.home / "models"
    setup.inputs_of(supervisor._state, supervisor._client, models)
    [whole] = setup.installation.checkpoints(setup.job_id)
    assert supervisor._state.resume_checkpoint_id == whole["id"]
    setup.installation.ask(setup.job_id, "stop")
    supervisor._state.stop.set()
    supervisor._stopping.asked = "stop"
    supervisor._report(Finished(0))
    job = setup.installation.job(setup.job_id)
    assert (job["status"], job["progress"]["step"]) == ("succeeded", 2)
    assert setup.attempt()["status"] == "succeeded"
    supervisor._client.close()
    setup.close()


def test_a_last_checkpoint_that_is_damaged_is_no_result_and_the_job_is_tried_again(
    setup: Setup,
) -> None:
    lease = setup.claim()
    supervisor = setup.supervisor(lease)
    upload(supervisor._client, lease, 8)
    last = setup.installation.checkpoints(setup.job_id)[0]["id"]
    supervisor._uploader.committed[8] = last
    cut(setup.folder(8, attempt=2))
    path = f"/fine_tuning/jobs/{setup.job_id}/checkpoints/{last}/files/model.safetensors"
    with pytest.raises(AssertionError, match="checkpoint_damaged"):
        setup.installation.api("GET", path)
    supervisor._report(Finished(0))
    job = setup.installation.job(setup.job_id)
    assert (job["status"], job["failures"]["storage"]) == ("queued", 1)
    attempt = setup.attempt()
    assert (attempt["status"], attempt["code"]) == ("failed", "checkpoint_missing")
    setup.installation.cancel(setup.job_id)
    supervisor._client.close()
    setup.close()


def test_another_damaged_input_is_named_and_blames_the_store(setup: Setup) -> None:
    files = setup.installation.home / "artifacts" / "files"
    path = files / setup.installation.job(setup.job_id)["training_file"]
    path.write_bytes(path.read_bytes().replace(b"Once", b"Ones"))
    lease = setup.claim()
    with pytest.raises(
        InputFetchError, match="damaged in the artifact store: training_file"
    ) as found:
        setup.fetch(lease)
    assert failure_of(found.value).owner == "storage"
    path.write_bytes(b"")
    with pytest.raises(InputFetchError, match="damaged in the artifact store") as found:
        setup.fetch(lease)
    assert failure_of(found.value).owner == "storage"
    setup.end(lease)
