"""A service with a bucket: workers and users transfer bytes without it, or through it."""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dar import Client
from dar.errors import CheckpointError, ServiceUnavailableError
from dar.protocol.checkpoints import Manifest, ManifestFile
from dar.protocol.worker import Lease as WorkerLease
from dar.protocol.worker import NewCheckpointRow
from dar.settings import Settings
from fakes.cutting_proxy import CuttingProxy
from fakes.live_service import Lease, Live
from fakes.loopback import LoopbackServer
from fakes.seaweed import SERVICE, SeaweedFS
from service.backup import backup, restore
from service.storage import signing
from service.storage.opening import open_storage
from worker.api import WorkerClient
from worker.folders import AttemptRecord, SlotFolder
from worker.models.fetching import MODEL, ModelFetcher
from worker.supervisor.checkpoints import CheckpointUploader
from worker.supervisor.inputs import InputFetcher, LocalInputs
from worker.supervisor.state import AttemptState

PART = 5 * 1024**2
FILES = {"model.safetensors": 2 * PART + 1000, "config.json": 2, "resume/state.json": 0}


@pytest.fixture
def bucket(seaweed: SeaweedFS) -> dict[str, Any]:
    """Settings of a service with a bucket of its own."""
    return {
        "storage_url": seaweed.url(),
        "s3_endpoint": seaweed.endpoint,
        "s3_access_key_id": SERVICE.access_key,
        "s3_secret_access_key": SERVICE.secret_key,
    }


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes the state and the client of an attempt."""
    monkeypatch.setattr("dar.client.transport.FIRST_BACKOFF_SECONDS", 0.05)
    monkeypatch.setattr(signing, "PART_BYTES", PART)
    monkeypatch.setattr(signing.SignedTransfers, "part_bytes", PART)
    with contextlib.ExitStack() as stack:

        def make(live: Live, lease: Lease) -> tuple[AttemptState, WorkerClient]:
            body = WorkerLease.model_validate(lease.body)
            folder = SlotFolder.of(tmp_path / "worker", "0").attempt(body.lease_id)
            folder.create(
                AttemptRecord(lease_id=body.lease_id, job_id=body.job_id, attempt=body.attempt)
            )
            state = AttemptState(body, folder, threading.Event())
            state.gives_up_at = time.monotonic() + 30
            client = WorkerClient(live.url, body.token, node="test", give_up=state.is_given_up)
            stack.callback(client.close)
            return state, client

        yield make


def publish(state: AttemptState, step: int) -> tuple[NewCheckpointRow, dict[str, bytes]]:
    """A checkpoint on the worker's disk."""
    folder = state.folder.work / "checkpoints" / f"step-{step}"
    (folder / "resume").mkdir(parents=True)
    contents = {name: os.urandom(size) for name, size in FILES.items()}
    files = []
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        files.append(ManifestFile(name=name, bytes=len(content), sha256=sha256))
    manifest = {"step": step, "kind": "full", "config_sha256": "0" * 64, "files": files}
    text = Manifest.model_validate(manifest).model_dump_json(indent=1).encode()
    (folder / "MANIFEST.json").write_bytes(text)
    sha256 = hashlib.sha256(text).hexdigest()
    row = {"type": "checkpoint", "seq": 1, "at": 0.0, "step": step, "folder": folder.name}
    return NewCheckpointRow.model_validate(row | {"manifest_sha256": sha256}), contents


def fetch(state: AttemptState, client: WorkerClient, work: Path) -> LocalInputs:
    settings = Settings(models_dir=work / "models", work_dir=work / "work")
    with contextlib.ExitStack() as held:
        models = ModelFetcher(
            state.lease,
            client,
            settings,
            state.folder.inputs,
            state.must_stop,
            lambda _: None,
            held,
            places={MODEL: work},
        )
        return InputFetcher(state, client, models).fetch()


def upload(state: AttemptState, client: WorkerClient, row: NewCheckpointRow) -> None:
    uploader = CheckpointUploader(state, client, keep_last=3)
    uploader.take(row)
    uploader.finish()
    uploader.run()
    assert list(uploader.committed) == [row.step]


def test_weights_go_to_the_bucket_and_back_over_a_broken_network_and_never_through_the_service(
    serve: Callable[..., Live],
    bucket: dict[str, Any],
    seaweed: SeaweedFS,
    worker: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = CuttingProxy(seaweed.port, cuts=2, after=PART // 2)
    live = serve(**bucket, s3_public_endpoint=proxy.url)
    job_id, lease = live.running()
    state, client = worker(live, lease)
    row, contents = publish(state, 2)
    monkeypatch.setattr(client, "put_part", only_manifests(client.put_part))
    upload(state, client, row)
    assert proxy.cuts_left == 0, "the network must have broken"
    size = sum(FILES.values())
    assert size < proxy.sent < size + 2 * PART, "only parts that were cut off are sent again"
    (found,) = live.job(job_id, "/checkpoints")["data"]
    folder = f"checkpoints/{job_id}/attempt-1/step-2"
    names = [f"{folder}/{name}" for name in (*FILES, "MANIFEST.json")]
    kept = [name for name in seaweed.names(bucket["storage_url"]) if name.startswith("check")]
    assert sorted(kept) == sorted(names)

    assert lease.post("/release", reason="drained").status_code == 200
    again = live.claim()
    assert again is not None
    with monkeypatch.context() as patch:
        patch.setattr(WorkerClient, "download", refuse)
        inputs = fetch(*worker(live, again), tmp_path)
    assert inputs.resume_from is not None
    assert inputs.training_file is not None
    for name, content in contents.items():
        assert (inputs.resume_from / name).read_bytes() == content
    assert inputs.training_file.read_bytes().startswith(b'{"prompt"')

    target = tmp_path / "weights"
    target.mkdir()
    whole = contents["model.safetensors"]
    begun = f".model.safetensors.{hashlib.sha256(whole).hexdigest()[:16]}.part"
    (target / begun).write_bytes(whole[:PART])
    received: list[httpx2.Request] = []
    with Client(live.key("api_key"), live.url) as user:
        user._transport._client.event_hooks = {"request": [received.append]}
        user.checkpoints.download(job_id, found["id"], target)
    assert (target / "model.safetensors").read_bytes() == whole
    stored = [one for one in received if one.url.port != httpx2.URL(live.url).port]
    assert {one.headers.get("range") for one in stored} >= {f"bytes={PART}-"}
    assert not any("authorization" in one.headers for one in stored), "no key goes to the store"
    proxy.close()


def test_an_endpoint_of_another_store_or_of_none_is_shown_and_waited_for(
    serve: Callable[..., Live], bucket: dict[str, Any], worker: Callable[..., Any], tmp_path: Path
) -> None:
    with LoopbackServer(
        lambda request: request.answer(b"", 200 if request.method == "PUT" else 503)
    ) as other:
        live = serve(**bucket, s3_public_endpoint=other.url.rstrip("/"))
        _, lease = live.running()
        state, client = worker(live, lease)
        row, _ = publish(state, 2)
        uploads = state.spawn("upload", lambda: upload(state, client, row))
        wait_for(lambda: "DAR_S3_PUBLIC_ENDPOINT must lead" in (state.blocked or ""))
        time.sleep(1)
        assert len(other.requests) < 60, "with growing pauses"

        def fetch_inputs() -> None:
            fetch(state, client, tmp_path)

        fetches = state.spawn("fetch", fetch_inputs)
        wait_for(lambda: "answers 503" in (state.first_progress.message or ""))
        state.lost.set()
        uploads.join(10)
        fetches.join(10)


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def only_manifests(put: Callable[..., Any]) -> Callable[..., Any]:
    def check(lease_id: str, checkpoint_id: str, name: str, *args: Any, **options: Any) -> Any:
        assert name == "MANIFEST.json", "weights must not pass through the service"
        return put(lease_id, checkpoint_id, name, *args, **options)

    return check


def refuse(*_: Any) -> None:
    raise AssertionError("inputs must not pass through the service")


def test_an_expired_url_is_asked_for_again_and_a_lost_bucket_is_waited_for(
    serve: Callable[..., Live],
    bucket: dict[str, Any],
    worker: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live = serve(**bucket)
    job_id, lease = live.running()
    state, client = worker(live, lease)
    ask, asked = client.direct_parts, []

    def late(*args: Any) -> Any:
        asked.append(args)
        if len(asked) == 2:
            raise ServiceUnavailableError("the store is away", code="storage_unavailable")
        monkeypatch.setattr(signing, "URL_SECONDS", 1 if len(asked) == 1 else 600)
        answer = ask(*args)
        time.sleep(2.1 if len(asked) == 1 else 0)
        return answer

    monkeypatch.setattr(client, "direct_parts", late)
    upload(state, client, publish(state, 2)[0])
    assert len(asked) == 4, "expired, away, sent, complete"
    assert [one["step_number"] for one in live.job(job_id, "/checkpoints")["data"]] == [2]


def test_an_altered_file_of_a_worker_never_becomes_visible(
    serve: Callable[..., Live], bucket: dict[str, Any], worker: Callable[..., Any]
) -> None:
    live = serve(**bucket)
    job_id, lease = live.running()
    state, client = worker(live, lease)
    row, _ = publish(state, 2)
    (state.folder.work / "checkpoints" / row.folder / "config.json").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="could not be uploaded"):
        upload(state, client, row)
    assert live.job(job_id, "/checkpoints")["data"] == []


def test_all_bytes_pass_through_the_service_where_the_settings_say_so_and_for_older_workers(
    serve: Callable[..., Live], bucket: dict[str, Any], seaweed: SeaweedFS
) -> None:
    live = serve(**bucket, downloads="stream", transfers="stream")
    job_id, lease = live.running()
    announced = lease.announce(2, {"model.safetensors": b"weights"})
    assert announced.json()["part_bytes"] is None
    answer = lease.post(
        f"/checkpoints/{announced.json()['checkpoint_id']}/parts", files={"a": ["0" * 64]}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_direct")
    checkpoint = lease.checkpoint(2, {"model.safetensors": b"weights"})
    path = f"/v1/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint}/files/model.safetensors"
    get = live.http.get
    whole = get(path)
    etag = whole.headers["etag"]
    assert (whole.status_code, whole.content) == (200, b"weights")
    assert etag == f'"{hashlib.sha256(b"weights").hexdigest()}"'
    for wanted, first, last in (("2-4", 2, 4), ("2-", 2, 6), ("-3", 4, 6), ("5-99", 5, 6)):
        part = get(path, headers={"range": f"bytes={wanted}", "if-range": etag})
        assert (part.status_code, part.content) == (206, b"weights"[first : last + 1])
        assert part.headers["content-range"] == f"bytes {first}-{last}/7"
    assert get(path, headers={"range": "bytes=7-"}).status_code == 416
    assert get(path, headers={"if-none-match": etag}).status_code == 304
    assert live.http.head(path).headers["content-length"] == "7"
    inputs = lease.http.get("/inputs").json()["files"]
    assert [one["url"] for one in inputs] == [None] * len(inputs)
    assert lease.http.get("/inputs/training_file").content.startswith(b'{"prompt"')
    file_id = live.job(job_id)["training_file"]
    assert live.http.get(f"/v1/files/{file_id}/content").content.startswith(b'{"prompt"')
    ready = live.client(None).get("/readyz").json()["checks"]
    assert (ready["storage"], ready["storage_room"]) == ("ok", "ok: a bucket has no size")
    assert "dar_storage_free_bytes" not in live.http.get("/metrics").text
    other = live.upload().json()["id"]
    assert live.http.delete(f"/v1/files/{other}").status_code == 200
    assert f"files/{other}" not in seaweed.names(bucket["storage_url"])


def test_a_redirect_is_for_users_and_only_for_content(
    serve: Callable[..., Live], bucket: dict[str, Any], seaweed: SeaweedFS
) -> None:
    live = serve(**bucket)
    job_id, lease = live.running()
    checkpoint = lease.checkpoint(2)  # by a worker of an earlier version
    path = f"/v1/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint}/files/model.safetensors"
    answer = live.http.get(path)
    assert (answer.status_code, answer.headers["cache-control"]) == (302, "no-store")
    assert "repr-digest" in answer.headers
    url = answer.headers["location"]
    assert SERVICE.secret_key not in url
    content = httpx2.get(url, trust_env=False)
    assert content.content == b"weights"
    assert content.headers["content-disposition"].startswith("attachment")
    forged = url.replace("model.safetensors", "MANIFEST.json")
    assert httpx2.get(forged, trust_env=False).status_code == 403
    assert live.http.head(path).status_code == 200
    assert live.http.get(path, headers={"range": "bytes=7-"}).status_code == 416
    assert lease.http.get("/inputs/training_file").status_code == 200
    with Client(live.key("api_key"), live.url) as user:
        assert user.files.content(live.job(job_id)["training_file"]).startswith(b'{"prompt"')
    place = f"checkpoints/{job_id}/attempt-1/step-2/model.safetensors"
    live.runtime.artifacts.storage.remove(place)
    damaged = live.http.get(path)
    assert (damaged.status_code, damaged.json()["error"]["code"]) == (409, "checkpoint_damaged")


def test_a_job_starts_from_a_model_in_the_bucket_and_a_backup_holds_it(
    serve: Callable[..., Live], bucket: dict[str, Any], seaweed: SeaweedFS, tmp_path: Path
) -> None:
    live = serve(**bucket)
    job_id, lease = live.running()
    files = {"config.json": b'{"max_position_embeddings": 8}', "model.safetensors": b"weights"}
    checkpoint = lease.checkpoint(4, files)
    assert lease.post("/complete", last_seq=0, checkpoint_id=checkpoint).status_code == 200
    model = live.job(job_id)["fine_tuned_model"]
    dar = {"sampling": {"max_new_tokens": 9}}
    refused = live.http.post("/v1/fine_tuning/jobs", json=live.spec(model=model, dar=dar))
    assert refused.status_code == 400, "its config.json was read"
    assert "max_new_tokens" in refused.text
    taken = backup.take(live.settings, tmp_path / "backup", is_copying=False, has_secret_keys=True)
    assert taken.damaged == []
    new = {**bucket, "storage_url": seaweed.url()}
    settings = Settings(home=tmp_path / "new", **new)
    restore.restore(settings, tmp_path / "backup")
    restored, stored = (set(seaweed.names(at["storage_url"])) for at in (new, bucket))
    assert {name for name in restored if name[0] != "."} == {
        name for name in stored if "job" in name or name[0] == "f"
    }
    place = f"checkpoints/{job_id}/attempt-1/step-4/model.safetensors"
    assert b"".join(open_storage(settings).read(place)) == b"weights"
