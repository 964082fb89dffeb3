"""Files that arrive in parts, on both databases."""

from datetime import timedelta

import pytest

from dar.errors import ConflictError, InvalidRequestError, NotFoundError, PayloadTooLargeError
from fakes.world import World
from service.store import file_uploads
from service.store.tables import FileUploadPartRow, FileUploadRow


def begin(world: World, name: str = "upload_1", size: int = 30) -> FileUploadRow:
    upload = FileUploadRow(
        id=name,
        project_id=world.project_id,
        filename="a.jsonl",
        purpose="fine-tune",
        mime_type="text/plain",
        bytes=size,
        status="pending",
    )
    with world.database.write() as transaction:
        file_uploads.add(transaction, upload)
    return upload


def send(world: World, part_id: str, size: int, upload_id: str = "upload_1") -> None:
    world.clock.advance(1)
    part = FileUploadPartRow(id=part_id, upload_id=upload_id, bytes=size, sha256="0" * 64)
    with world.database.write() as transaction:
        file_uploads.add_part(transaction, world.project_id, part)


def test_parts_are_ordered_as_they_are_named(world: World) -> None:
    upload = begin(world)
    for part_id, size in (("part_b", 20), ("part_a", 10)):
        send(world, part_id, size)
    with world.database.read() as transaction:
        assert [part.id for part in file_uploads.parts_of(transaction, upload.id)] == [
            "part_b",
            "part_a",
        ]
        found = file_uploads.ordered(transaction, upload, ["part_a", "part_b"])
        assert [part.id for part in found] == ["part_a", "part_b"]
        with pytest.raises(InvalidRequestError, match="have 10 bytes together"):
            file_uploads.ordered(transaction, upload, ["part_a"])
        assert file_uploads.known_parts(transaction, ["part_a", "part_x"]) == {"part_a"}
        with pytest.raises(NotFoundError):
            file_uploads.get(transaction, "proj-other", upload.id)


def test_an_upload_ends_once(world: World) -> None:
    upload = begin(world)
    send(world, "part_a", 30)
    with world.database.write() as transaction:
        assert file_uploads.end(transaction, upload.id, "completed", "file-1")
        assert not file_uploads.end(transaction, upload.id, "cancelled")
        found = file_uploads.get(transaction, world.project_id, upload.id)
        assert (found.status, found.file_id) == ("completed", "file-1")
        assert file_uploads.ended_with_parts(transaction) == [upload.id]
    with pytest.raises(ConflictError, match="is completed"):
        send(world, "part_b", 1)


def test_uploads_expire_and_are_forgotten_once_their_parts_are_gone(world: World) -> None:
    old, new = begin(world), begin(world, "upload_2")
    send(world, "part_a", 30)
    world.clock.advance(file_uploads.LIFE.total_seconds() - 2)
    with world.database.write() as transaction:
        file_uploads.expire(transaction)
        assert file_uploads.ended_with_parts(transaction) == []
    world.clock.advance(1)
    with world.database.read() as transaction:
        found = file_uploads.get(transaction, world.project_id, old.id)
        assert file_uploads.status_of(transaction, found) == "expired"
    for is_forgotten in (False, True):
        world.clock.advance((file_uploads.SHOWN + timedelta(days=1)).total_seconds())
        with world.database.write() as transaction:
            file_uploads.expire(transaction)
            if is_forgotten:
                with pytest.raises(NotFoundError):
                    file_uploads.get(transaction, world.project_id, new.id)
            assert file_uploads.ended_with_parts(transaction) == [old.id]
    with world.database.write() as transaction:
        file_uploads.forget_parts(transaction, old.id)
        file_uploads.expire(transaction)
        with pytest.raises(NotFoundError):
            file_uploads.get(transaction, world.project_id, old.id)


def test_an_upload_takes_no_more_than_twice_its_size_and_some_parts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_uploads, "SPARE_BYTES", 5)
    monkeypatch.setattr(file_uploads, "MOST_PARTS", 3)
    begin(world)
    for part_id in ("part_a", "part_b"):
        send(world, part_id, 30)
    with pytest.raises(PayloadTooLargeError, match="60 bytes in 2 parts"):
        send(world, "part_c", 6)
    send(world, "part_c", 5)
    with pytest.raises(PayloadTooLargeError, match="in 3 parts"):
        send(world, "part_d", 0)
