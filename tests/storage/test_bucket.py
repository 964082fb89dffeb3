"""A bucket that cannot be used, and transfers that pass by the service."""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import httpx2
import pytest
from storage.conftest import opened, use
from storage.test_contract import PLACE, send, upload_of

from dar.errors import ConfigurationError, ConflictError, ServiceUnavailableError
from dar.protocol.worker import DirectPart, InputFile
from dar.settings import Settings
from fakes.scripted_installation import free_port
from fakes.seaweed import ADMIN, READER, SERVICE, Identity, SeaweedFS
from service.storage import signing
from service.storage.opening import open_storage
from service.storage.s3 import S3Storage
from service.storage.storage import DirectTransfers, PartRequest

PART = 5 * 1024**2
"""The smallest part of an upload of several that S3 knows."""
UNUSABLE: dict[str, tuple[Identity, str, str]] = {
    "a wrong secret": (Identity(SERVICE.access_key, "wrong", ()), "", "SignatureDoesNotMatch"),
    "a key that nobody has": (Identity("nobody", "wrong", ()), "", "InvalidAccessKeyId"),
    "a bucket that may only be read": (READER, "", "AccessDenied"),
    "a bucket that does not exist": (ADMIN, "s3://none/x", "no bucket 'none'"),
    "an address where nothing listens": (SERVICE, "", "does not answer"),
}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_ENDPOINT_URL", "localhost:4566", "AWS_ENDPOINT_URL.* must be a URL like https"),
        ("AWS_REGION", "EU Central", "AWS_REGION.* must be a name like eu-central-1"),
        ("DAR_S3_ACCESS_KEY_ID", "id", "DAR_S3_SECRET_ACCESS_KEY is not set"),
        ("DAR_S3_SECRET_ACCESS_KEY", "secret", "DAR_S3_ACCESS_KEY_ID is not set"),
        ("AWS_ENDPOINT_URL", "", None),
        ("AWS_REGION", "", None),
    ],
)
def test_settings_of_a_bucket_are_checked_only_where_there_is_one(
    name: str, value: str, said: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv(name, value)
    open_storage(Settings(home=tmp_path))
    of_bucket = Settings(home=tmp_path, storage_url="s3://bucket/x")
    with (
        contextlib.nullcontext() if said is None else pytest.raises(ConfigurationError, match=said)
    ):
        open_storage(of_bucket)


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_service_does_not_start_on(
    what: str, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, url, said = UNUSABLE[what]
    is_away = "nothing listens" in what
    use(monkeypatch, seaweed, identity, f"http://127.0.0.1:{free_port()}" if is_away else None)
    storage = opened(url or seaweed.url())
    with pytest.raises(ConfigurationError, match=said) as caught:
        storage.prepare()
    assert identity.secret_key not in str(caught.value)
    assert storage.check().startswith("not writable")


def test_every_call_to_a_store_that_is_away_is_to_be_tried_again(
    seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, seaweed, endpoint=f"http://127.0.0.1:{free_port()}")
    storage = opened(seaweed.url())
    calls = (
        lambda: storage.size("files/a"),
        lambda: list(storage.entries("files/")),
        lambda: list(storage.read("files/a")),
        lambda: storage.put("files/a", [b"1"]),
        lambda: storage.remove("files/a"),
        lambda: storage.remove_all("files/"),
        lambda: list(storage.folders("checkpoints/", 3)),
        lambda: missing(storage.direct, b"1"),
    )
    for call in calls:
        started = time.monotonic()
        with pytest.raises(ServiceUnavailableError) as caught:
            call()
        assert caught.value.error_code == "storage_unavailable"
        assert time.monotonic() - started < 15


def test_one_request_at_a_time_makes_objects_of_the_parts_of_a_checkpoint(
    seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, seaweed)
    url = seaweed.url()
    storage, replica = opened(url), opened(url)
    upload = upload_of({"a": b"0123456789", "b": b"0123456789"})
    for name in ("a", "b"):
        send(storage, upload, name, b"0123456789")
    read, is_reading, goes_on = storage.read, threading.Event(), threading.Event()

    def slow(key: str) -> Iterator[bytes]:
        is_reading.set()
        assert goes_on.wait(30)
        return read(key)

    monkeypatch.setattr(storage, "read", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(storage.verify, upload)
        assert is_reading.wait(30)
        with pytest.raises(ServiceUnavailableError, match="another request") as caught:
            storage.verify(upload)
        assert caught.value.error_code == "storage_unavailable", "a worker waits without limit"
        size = replica.verify(upload)
        goes_on.set()
        with pytest.raises(ConflictError, match="another replica"):
            first.result()
    assert storage.verify(upload) == size
    assert len(list(storage.entries(""))) == 3


# --- transfers that pass by the service ---


def missing(
    direct: DirectTransfers | None, content: bytes, key: str = "checkpoints/a"
) -> list[PartRequest]:
    assert direct is not None
    size = direct.part_bytes
    parts = [content[at : at + size] for at in range(0, len(content), size)] or [b""]
    digests = [hashlib.sha256(part).hexdigest() for part in parts]
    return direct.missing_parts(key, len(content), digests)


def put(request: PartRequest, content: bytes, **headers: str) -> int:
    part = content[request.offset : request.offset + request.bytes]
    given = dict(request.headers) | headers
    return httpx2.put(request.url, content=part, headers=given, trust_env=False).status_code


@pytest.fixture
def direct(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> DirectTransfers:
    use(monkeypatch, seaweed)
    monkeypatch.setattr(signing, "PART_BYTES", PART)
    monkeypatch.setattr(signing.SignedTransfers, "part_bytes", PART)
    storage = opened(seaweed.url())
    storage.prepare()
    assert storage.direct is not None
    return storage.direct


@pytest.mark.parametrize(
    "size", [0, 1000, 2 * PART + 1000], ids=["empty", "small", "several parts"]
)
def test_a_worker_sends_a_file_to_the_store_itself(direct: DirectTransfers, size: int) -> None:
    content = os.urandom(size)
    requests = missing(direct, content)
    assert len(requests) == max(1, -(-size // direct.part_bytes))
    url = requests[0].url
    file = InputFile(name="training_file", bytes=size, sha256="0" * 64, url=url)
    shown = (requests[0], DirectPart(name="a", **asdict(requests[0])), file)
    assert url not in repr(shown), "it opens the object for whoever reads a log"
    assert put(requests[0], content) == 200
    left = missing(direct, content)
    assert [one.offset for one in left] == [one.offset for one in requests[1:]], "parts are kept"
    for request in left:
        assert put(request, content) == 200
    assert missing(direct, content) == []
    assert missing(direct, content) == [], "an answer may be lost"
    answer = httpx2.get(direct.download_url("checkpoints/a", "ä.bin"), trust_env=False)
    assert answer.content == content


def test_an_upload_that_lost_a_race_leaves_no_parts(
    seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, seaweed)
    storage = opened(seaweed.url())
    assert isinstance(storage, S3Storage)
    upload = upload_of({"a": b"0123456789"})
    lost = f"{upload.final}/a"
    storage.transfers._begin(lost)
    storage.transfers._begin(f"{PLACE}/step-10/a")  # of another checkpoint
    send(storage, upload, "a", b"0123456789")
    storage.verify(upload)
    assert [key for key, _ in storage.transfers.unfinished("")] == [f"{PLACE}/step-10/a"]


@pytest.mark.parametrize("size", [1000, 2 * PART + 1000], ids=["small", "several parts"])
def test_the_store_takes_no_other_content_than_was_announced(
    direct: DirectTransfers, size: int
) -> None:
    content = os.urandom(size)
    first = missing(direct, content)[0]
    other = b"X" + content[1:]
    digest = hashlib.sha256(other[: first.bytes]).hexdigest()
    assert put(first, other) == 400, "another content"
    assert put(first, other, **{"x-amz-checksum-sha256": digest}) == 403, "and its digest"
    assert put(first, content[:-1] if size == first.bytes else other) in {400, 403}
    elsewhere = first.url.replace("checkpoints/a", "checkpoints/b")
    answer = httpx2.put(elsewhere, content=content, headers=dict(first.headers), trust_env=False)
    assert answer.status_code == 403, "another place"
    assert httpx2.get(first.url, trust_env=False).status_code == 403, "another verb"
    assert missing(direct, content)[0].offset == 0, "nothing of it counts"


def test_a_signed_url_reads_one_object_and_ranges_of_it(direct: DirectTransfers) -> None:
    content = os.urandom(2000)
    for key in ("checkpoints/a", "checkpoints/b"):
        put(missing(direct, content, key)[0], content)
    url = direct.download_url("checkpoints/a", "model.safetensors")
    part = httpx2.get(url, headers={"range": "bytes=1000-"}, trust_env=False)
    assert (part.status_code, part.content) == (206, content[1000:])
    assert "model.safetensors" in part.headers["content-disposition"]
    forged = url.replace("checkpoints/a", "checkpoints/b")
    assert httpx2.get(forged, trust_env=False).status_code == 403
    assert httpx2.delete(url, trust_env=False).status_code == 403
