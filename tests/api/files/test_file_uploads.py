"""Training files that arrive in parts, through the SDK, the openai client and plain HTTP."""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import update

from dar import Client
from dar.errors import ConflictError, InvalidRequestError
from dar.settings import Settings
from fakes.live_service import Live
from fakes.seaweed import SERVICE, SeaweedFS
from service.background.reconciler import Reconciler
from service.storage.opening import open_storage
from service.store.tables import FileUploadRow

ROWS = b"".join(json.dumps({"prompt": f"prompt {n}"}).encode() + b"\n" for n in range(40))
HALF = len(ROWS) // 2 + 3
"""In the middle of a row."""


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live.key("api_key"), live.url) as client:
        yield client


def begin(live: Live, **values: Any) -> Any:
    body = {"bytes": len(ROWS), "filename": "rows.jsonl", "mime_type": "text/plain"}
    return live.http.post("/v1/uploads", json={**body, "purpose": "fine-tune", **values})


def send(live: Live, upload_id: str, data: bytes) -> Any:
    return live.http.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("part", data)})


def complete(live: Live, upload_id: str, *parts: str, **values: Any) -> Any:
    body = {"part_ids": list(parts), **values}
    return live.http.post(f"/v1/uploads/{upload_id}/complete", json=body)


def stored(live: Live) -> list[str]:
    storage = live.runtime.artifacts.storage
    return sorted(entry.key.split("/")[0] for entry in storage.entries(""))


@pytest.fixture(params=["folder", "bucket"])
def kept(request: pytest.FixtureRequest, serve: Callable[..., Live], seaweed: SeaweedFS) -> Live:
    """A service that keeps files in a folder, and one with a bucket."""
    if request.param == "folder":
        return serve()
    return serve(
        storage_url=seaweed.url(),
        s3_endpoint=seaweed.endpoint,
        s3_access_key_id=SERVICE.access_key,
        s3_secret_access_key=SERVICE.secret_key,
    )


def test_the_openai_client_sends_a_file_in_parts_that_a_job_trains_on(
    kept: Live, tmp_path: Path
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(ROWS)
    options = {"mime_type": "application/jsonl", "purpose": "fine-tune", "part_size": 300}
    key, url = kept.key("api_key"), f"{kept.url}/v1"
    md5 = hashlib.md5(ROWS, usedforsecurity=False).hexdigest()
    with openai.OpenAI(api_key=key, base_url=url, max_retries=0) as client:
        upload = client.uploads.upload_file_chunked(file=path, md5=md5, **options)  # type: ignore[call-overload] # the options are in a dict
        assert (upload.status, upload.bytes, upload.object) == ("completed", len(ROWS), "upload")
        assert upload.file is not None
        assert client.files.content(upload.file.id).read() == ROWS
        assert client.files.retrieve(upload.file.id) == upload.file

    async def again() -> str:
        async with openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0) as client:
            named = {**options, "filename": "mine.jsonl", "bytes": len(ROWS)}
            made = await client.uploads.upload_file_chunked(file=ROWS, **named)  # type: ignore[call-overload] # the options are in a dict
            assert made.file is not None
            return str(made.file.filename)

    assert asyncio.run(again()) == "mine.jsonl"
    assert kept.submit(training_file=upload.file.id)["training_file"] == upload.file.id
    assert stored(kept) == ["files", "files"]  # and no part


def test_a_file_is_sent_in_parts_and_an_interrupted_upload_goes_on(
    live: Live, client: Client
) -> None:
    told: list[tuple[int, int]] = []
    file = client.uploads.upload_file(
        ROWS, filename="a.jsonl", part_bytes=HALF, on_bytes=lambda *now: told.append(now)
    )
    assert (file.filename, file.num_rows) == ("a.jsonl", 40)
    assert file.sha256 == hashlib.sha256(ROWS).hexdigest()
    assert told == [(HALF, len(ROWS)), (len(ROWS), len(ROWS))]

    upload = client.uploads.create(bytes=len(ROWS), filename="b.jsonl")
    arrived = client.uploads.create_part(upload, ROWS[:HALF])
    assert (arrived.object, arrived.upload_id, arrived.bytes) == ("upload.part", upload.id, HALF)
    assert client.uploads.retrieve(upload).parts == [arrived]
    again = client.uploads.upload_file(ROWS, part_bytes=HALF, upload_id=upload)
    assert client.files.content(again) == ROWS
    done = client.uploads.retrieve(upload)
    assert (done.status, done.file, done.parts) == ("completed", again, [])
    # A retry of the last request gets the same file.
    assert client.uploads.complete(upload, ["part_x"]).file == again
    with pytest.raises(ConflictError, match="is completed"):
        client.uploads.cancel(upload)
    client.files.delete(again)
    assert client.uploads.retrieve(upload).file is None


def test_a_cancelled_upload_takes_no_more_parts_and_leaves_none(live: Live, client: Client) -> None:
    upload = client.uploads.create(bytes=len(ROWS), filename="a.jsonl")
    part = client.uploads.create_part(upload, ROWS)
    assert stored(live) == ["uploads"]
    for _ in range(2):
        assert client.uploads.cancel(upload).status == "cancelled"
    assert stored(live) == []
    for call in (
        lambda: client.uploads.create_part(upload, ROWS),
        lambda: client.uploads.complete(upload, [part]),
    ):
        with pytest.raises(ConflictError) as caught:
            call()
        assert caught.value.error_code == "upload_ended"


def test_an_upload_past_its_time_has_expired_and_its_parts_are_removed(
    live: Live, client: Client, error_of: Callable[..., Any]
) -> None:
    upload_id = begin(live).json()["id"]
    send(live, upload_id, ROWS)
    database = live.runtime.database
    with database.write() as transaction:
        transaction.execute(
            update(FileUploadRow).values(expires_at=transaction.now - timedelta(seconds=1))
        )
    answer = send(live, upload_id, b"more")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "upload_ended")
    runtime = live.runtime
    Reconciler(
        database,
        runtime.artifacts,
        runtime.waker,
        runtime.notifier,
        ttl_seconds=60,
        pause_seconds=60,
    ).run_once()
    assert stored(live) == []
    assert client.uploads.retrieve(upload_id).status == "expired"


def test_what_does_not_make_the_announced_file_is_refused(
    live: Live, error_of: Callable[..., Any]
) -> None:
    upload_id = begin(live).json()["id"]
    first, second = (
        send(live, upload_id, part).json()["id"] for part in (ROWS[:HALF], ROWS[HALF:])
    )
    for parts, code in (
        ([first], "bytes_mismatch"),
        ([first, first], "duplicate_part"),
        ([first, "part_x"], "unknown_part"),
    ):
        answer = complete(live, upload_id, *parts)
        assert (answer.status_code, error_of(answer)["code"]) == (400, code)
    wrong = complete(live, upload_id, first, second, md5="0" * 32)
    assert (wrong.status_code, error_of(wrong)["code"]) == (409, "checksum_mismatch")
    mixed = complete(live, upload_id, second, first)
    assert (mixed.status_code, error_of(mixed)["code"]) == (400, "invalid_training_file")
    live.runtime.artifacts.remove_part(upload_id, second)
    lost = complete(live, upload_id, first, second)
    assert (lost.status_code, error_of(lost)["code"]) == (409, "part_damaged")
    assert live.http.get("/v1/files").json()["data"] == []
    again = send(live, upload_id, ROWS[HALF:]).json()["id"]
    assert complete(live, upload_id, first, again).json()["status"] == "completed"
    assert stored(live) == ["files"]


@pytest.mark.parametrize(
    ("values", "status", "param"),
    [
        ({"purpose": "batch"}, 400, "purpose"),
        ({"bytes": 0}, 400, "bytes"),
        ({"bytes": "12"}, 400, "bytes"),
        ({"bytes": 2**40}, 413, "bytes"),
        ({"filename": ""}, 400, "filename"),
        ({"mime_type": None}, 400, "mime_type"),
        ({"expires_after": {"anchor": "created_at", "seconds": 3600}}, 400, "expires_after"),
    ],
)
def test_a_wrong_announcement_is_refused(
    live: Live, error_of: Callable[..., Any], values: dict[str, Any], status: int, param: str
) -> None:
    answer = begin(live, **values)
    assert (answer.status_code, error_of(answer)["param"]) == (status, param)


def test_parts_are_refused_that_are_none_or_of_no_upload(
    live: Live, error_of: Callable[..., Any]
) -> None:
    path = f"/v1/uploads/{begin(live, bytes=10).json()['id']}/parts"
    answer = live.http.post(path, json={"data": "x"})
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_media_type")
    answer = live.http.post(path, files={"data": (None, "x")})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "data")
    answer = live.http.post(path, files={"data": ("x", b"x")}, data={"more": "1"})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "more")
    answer = send(live, "upload_x", b"x")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")
    assert stored(live) == []


def test_a_file_in_one_request_passes_through_no_other_folder(
    live: Live, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form was copied into the folder for temporary files first."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a temporary file was written")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", refuse)
    rows = ROWS * 1000
    assert client.files.create(rows).sha256 == hashlib.sha256(rows).hexdigest()
    with pytest.raises(InvalidRequestError):
        client.files.create(rows + b"{}\n")
    assert stored(live) == ["files"]


def test_what_a_killed_service_left_on_the_way_to_a_bucket_is_removed_at_the_next_start(
    tmp_path: Path, seaweed: SeaweedFS
) -> None:
    storage = open_storage(
        Settings(
            home=tmp_path,
            storage_url=seaweed.url(),
            s3_endpoint=seaweed.endpoint,
            s3_access_key_id=SERVICE.access_key,
            s3_secret_access_key=SERVICE.secret_key,
        )
    )
    storage.scratch_folder = tmp_path
    old, new, other = (tmp_path / name for name in ("dar-upload-a", "dar-upload-b", "mine"))
    for folder in (old, new, other):
        folder.mkdir()
        (folder / "file-1").write_bytes(ROWS)
    for folder in (old, other):
        os.utime(folder, (0, 0))
    storage.prepare()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dar-upload-b", "mine"]
