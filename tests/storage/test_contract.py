"""What every storage promises, of a folder and of a bucket alike."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dar.errors import ConflictError
from dar.protocol.checkpoints import MANIFEST_NAME, Manifest
from service.storage.folder import FolderStorage
from service.storage.storage import Storage, Upload

LONG = os.urandom(17 * 1024**2 + 3)
"""More than two of the parts in which a bucket is written."""
PLACE = "checkpoints/ftjob-1/attempt-1"


def bytes_of(storage: Storage, key: str, *part: int) -> bytes:
    return b"".join(storage.read(key, *part))


def keys(storage: Storage, prefix: str = "") -> list[str]:
    return sorted(entry.key for entry in storage.entries(prefix))


@pytest.mark.parametrize("content", [b"", b"short", LONG], ids=["empty", "short", "long"])
def test_what_is_stored_is_read_back_in_whole_and_in_part(storage: Storage, content: bytes) -> None:
    assert storage.size("files/a") is None
    storage.put("files/a", (content[at : at + 1024**2] for at in range(0, len(content), 1024**2)))
    assert storage.size("files/a") == len(content)
    assert bytes_of(storage, "files/a") == content
    with storage.open("files/a") as file:
        assert file.read() == content
    if content:
        assert bytes_of(storage, "files/a", 2) == content[2:]
        assert bytes_of(storage, "files/a", 1, 4) == content[1:4]


def test_content_that_breaks_off_is_not_stored(storage: Storage) -> None:
    def broken(size: int) -> Iterator[bytes]:
        yield LONG[:size]
        raise ConflictError("the digest is another")

    storage.put("files/kept", [b"before"])
    for key in ("files/new", "files/kept"):
        for size in (5, len(LONG)):
            with pytest.raises(ConflictError):
                storage.put(key, broken(size))
    assert keys(storage) == ["files/kept"]
    assert bytes_of(storage, "files/kept") == b"before"


def test_a_folder_whose_checkpoints_are_on_another_volume_takes_them(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other volume")
    with tempfile.TemporaryDirectory(dir=memory) as other:
        (tmp_path / "checkpoints").symlink_to(other)
        storage = FolderStorage(tmp_path)
        storage.prepare()
        storage.put(f"{PLACE}/step-1/a", [b"content"])
        assert bytes_of(storage, f"{PLACE}/step-1/a") == b"content"
        assert keys(storage, "checkpoints/") == [f"{PLACE}/step-1/a"]
        assert list((tmp_path / "files/tmp").iterdir()) == []


def test_objects_are_listed_replaced_and_removed(storage: Storage, tmp_path: Path) -> None:
    names = ["files/ä b+%20", f"{PLACE}/step-1/a", f"{PLACE}/step-1/b/c", f"{PLACE}/step-10/a"]
    for name in names:
        storage.put(name, [name.encode()])
    assert keys(storage) == sorted(names)
    assert keys(storage, f"{PLACE}/step-1/") == names[1:3]
    assert keys(storage, "none/") == []
    found = {key for key, _ in storage.folders("checkpoints/", depth=3)}
    assert found == {f"{PLACE}/step-1", f"{PLACE}/step-10"}

    own = tmp_path / "own"
    own.write_bytes(b"another")
    storage.put_file(names[0], own)
    assert bytes_of(storage, names[0]) == b"another"
    for _ in range(2):  # also what is gone already
        storage.remove(names[0])
        storage.remove_all(f"{PLACE}/step-1/")
    assert keys(storage) == [names[3]]
    with pytest.raises(FileNotFoundError):
        bytes_of(storage, names[0])
    with pytest.raises(FileNotFoundError):
        storage.open(names[0])


def test_a_scratch_file_is_no_object_and_goes(storage: Storage) -> None:
    with storage.scratch("file-1") as path:
        path.write_bytes(b"upload")
    assert not path.exists()
    assert keys(storage) == []


def upload_of(files: dict[str, bytes]) -> Upload:
    entries = [
        {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    ]
    values = {"step": 1, "kind": "full", "config_sha256": "0" * 64, "files": entries}
    manifest = Manifest.model_validate(values)
    sha256 = hashlib.sha256(manifest.model_dump_json(indent=1).encode()).hexdigest()
    return Upload(f"{PLACE}/.tmp-step-1", f"{PLACE}/step-1", manifest, sha256)


def send(storage: Storage, upload: Upload, name: str, part: bytes, offset: int = 0) -> None:
    writer = storage.open_part(upload, name, offset)
    try:
        writer.write(part)
        writer.save()
    finally:
        writer.close()


def test_an_upload_in_parts_appears_when_it_is_whole(storage: Storage) -> None:
    files = {"model.safetensors": b"0123456789", "resume/state.json": b"{}", "empty": b""}
    upload = upload_of(files)
    assert set(storage.received(upload).values()) == {0}
    send(storage, upload, "model.safetensors", b"0123")
    send(storage, upload, "resume/state.json", b"{}")
    send(storage, upload, "empty", b"")
    assert storage.received(upload)["model.safetensors"] == 4
    for offset in (3, 5):
        with pytest.raises(ConflictError, match="continue from 4"):
            storage.open_part(upload, "model.safetensors", offset).close()
    with pytest.raises(ConflictError, match="4 of 10 bytes"):
        storage.verify(upload)
    send(storage, upload, "model.safetensors", b"456789", 4)

    size = storage.verify(upload)
    assert storage.verify(upload) == size, "an answer may be lost"
    assert storage.received(upload)["model.safetensors"] == 10
    assert keys(storage) == sorted(f"{upload.final}/{name}" for name in (*files, MANIFEST_NAME))
    for name, content in files.items():
        assert bytes_of(storage, f"{upload.final}/{name}") == content
    digest = hashlib.sha256(bytes_of(storage, f"{upload.final}/{MANIFEST_NAME}")).hexdigest()
    assert digest == upload.manifest_sha256


def test_an_altered_upload_is_refused_and_sent_again(storage: Storage) -> None:
    upload = upload_of({"weights": b"0123456789"})
    send(storage, upload, "weights", b"0123456780")
    with pytest.raises(ConflictError, match="sha256"):
        storage.verify(upload)
    assert storage.received(upload)["weights"] == 0
    assert storage.size(f"{upload.final}/weights") is None
    send(storage, upload, "weights", b"01234")
    send(storage, upload, "weights", b"0123456789")  # a part at the start begins anew
    send(storage, upload, MANIFEST_NAME, b"{} ")
    with pytest.raises(ConflictError, match="MANIFEST"):
        storage.verify(upload)
    assert storage.received(upload)[MANIFEST_NAME] == 0, "or nobody could send it again"
    storage.verify(upload)
    assert bytes_of(storage, f"{upload.final}/weights") == b"0123456789"
