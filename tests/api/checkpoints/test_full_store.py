"""A full artifact store: uploads wait, everything else goes on, and the room is shown."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import httpx2
import pytest
from sqlalchemy import event

from fakes.live_service import Lease, Live
from fakes.seaweed import SERVICE, SeaweedFS

FILES = {"model.safetensors": b"weights", "resume/state.json": b"{}"}


@pytest.fixture
def lease(live: Live) -> Iterator[Lease]:
    _, lease = live.running()
    yield lease
    live.runtime.artifacts.min_free_bytes = 0


def checked(answer: httpx2.Response, error_of: Callable[..., Any]) -> str:
    """The message of a refusal for lack of room."""
    assert (answer.status_code, error_of(answer)["code"]) == (503, "storage_full")
    assert int(answer.headers["retry-after"]) >= 1
    return str(error_of(answer)["message"])


def test_what_needs_room_gets_a_503_until_there_is_some(
    live: Live, lease: Lease, error_of: Callable[..., Any]
) -> None:
    announced = lease.announce(2, FILES).json()["checkpoint_id"]
    live.runtime.artifacts.min_free_bytes = 2**60
    part = lease.put(announced, "model.safetensors", b"weights")
    for refused in (lease.announce(2, FILES), part, live.upload()):
        message = checked(refused, error_of)
        assert message.startswith("the artifact store is full: ")
        assert "made room" in message
    blocked = {"phase": "blocked: disk", "step": 2, "message": message}
    assert lease.post("/heartbeat", progress=blocked).status_code == 200
    job = live.job(lease.body["job_id"])
    assert (job["status_detail"], job["status_message"]) == ("blocked: disk", message)
    live.runtime.artifacts.min_free_bytes = 0
    assert lease.checkpoint(2) == announced


def test_a_disk_that_fills_in_the_middle_of_a_part_gets_a_503(
    live: Live, lease: Lease, error_of: Callable[..., Any]
) -> None:
    announced = lease.announce(2, FILES).json()["checkpoint_id"]
    folder = live.runtime.artifacts.checkpoint(lease.body["job_id"], 1, 2)
    staging = live.settings.artifacts_path / folder.replace("step-", ".tmp-step-")
    staging.mkdir(parents=True)
    (staging / "model.safetensors").symlink_to("/dev/full")
    checked(lease.put(announced, "model.safetensors", b"weights"), error_of)
    (staging / "model.safetensors").unlink()
    assert lease.checkpoint(2) == announced


def test_a_full_folder_for_temporary_files_is_named(
    serve: Callable[..., Live],
    seaweed: SeaweedFS,
    error_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live = serve(
        storage_url=seaweed.url(),
        s3_endpoint=seaweed.endpoint,
        s3_access_key_id=SERVICE.access_key,
        s3_secret_access_key=SERVICE.secret_key,
    )
    storage = live.runtime.artifacts.storage
    with monkeypatch.context() as patch:
        patch.setattr(storage, "scratch", lambda _: contextlib.nullcontext(Path("/dev/full")))
        message = checked(live.upload(), error_of)
        assert message.startswith(f"the service has no room for temporary files in {gettempdir()}")
        patch.setattr(storage, "scratch_folder", Path("/proc"))  # has no free byte
        assert "in /proc: the file has" in checked(live.upload(), error_of)
    assert live.upload().status_code == 200


def test_a_database_that_cannot_grow_gets_a_503(
    live: Live, lease: Lease, error_of: Callable[..., Any]
) -> None:
    engine = live.runtime.database.engine

    def limit(connection: Any, _: object) -> None:
        connection.execute("PRAGMA max_page_count=1")  # no less than it has now

    event.listen(engine, "connect", limit)
    engine.dispose()
    row = {"type": "event", "level": "info", "message": "x" * 4000}
    answer = lease.say(*[row] * 300)
    checked(answer, error_of)
    event.remove(engine, "connect", limit)
    engine.dispose()


def test_readiness_and_metrics_tell_the_room(live: Live) -> None:
    ready = live.http.get("/readyz").json()
    assert ready["checks"]["storage_room"].startswith("ok: ")
    live.runtime.artifacts.min_free_bytes = 2**60
    answer = live.http.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert answer.json()["checks"]["storage_room"].startswith("full: ")
    lines = live.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("dar_storage"))
    assert float(values["dar_storage_reserved_bytes"]) == 2**60
    assert 0 < float(values["dar_storage_free_bytes"]) <= float(values["dar_storage_total_bytes"])
