"""A checkpoint is published completely or not at all, also when its process is killed."""

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.protocol.checkpoints import Manifest, ManifestFile, checkpoint_folders
from dar.training.checkpoint import checkpoint
from service.artifacts import Artifacts
from service.storage.folder import FolderStorage
from service.storage.storage import Upload

CONTENTS = {"model.safetensors": b"weights", "resume/state.json": b"{}"}


def publish(root: Path, step: int) -> checkpoint.Published:
    def write(folder: Path) -> None:
        for name, body in CONTENTS.items():
            (folder / name).write_bytes(body)

    def manifest(files: list[ManifestFile]) -> Manifest:
        return Manifest(step=step, kind="full", config_sha256="0" * 64, files=files)

    return checkpoint.publish(root, step, write=write, manifest=manifest)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(change: Callable[..., Any]) -> Callable[..., None]:
    def call(*args: Any, **options: Any) -> None:
        change(*args, **options)
        die()

    return call


POINTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "before a file": (Path, "write_bytes", die),
    "after a file": (Path, "write_bytes", die_after(Path.write_bytes)),
    "before the manifest": (checkpoint, "_describe", die),
    "before the sync": (checkpoint, "sync_tree", die),
    "before the rename": (Path, "rename", die),
    "after the rename": (Path, "rename", die_after(Path.rename)),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_leaves_the_newest_whole_one_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    publish(tmp_path, 2)
    place, name, fatal = POINTS[point]
    monkeypatch.setattr(place, name, fatal)
    child = os.fork()
    if child == 0:
        publish(tmp_path, 4)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    monkeypatch.undo()
    assert os.WTERMSIG(status) == signal.SIGKILL
    checkpoint.sweep(tmp_path)
    newest = checkpoint_folders(tmp_path)[-1]
    assert checkpoint.verify(newest).step == (4 if point == "after the rename" else 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"step-2", newest.name})


@pytest.fixture
def durable(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was made durable and renamed, in this order."""
    done: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        done.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def note_rename(source: Any, target: Any) -> None:
        done.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    return done


def assert_ordered(done: list[tuple[str, str]], final: Path, staging: Path) -> None:
    """Files, then their folders, then the rename, then the parent."""
    renamed = done.index(("rename", str(final)))
    before, after = done[:renamed], done[renamed + 1 :]
    files = [("fsync", str(staging / name)) for name in (*CONTENTS, "MANIFEST.json")]
    assert set(files) <= set(before)
    for folder in (staging / "resume", staging):
        assert ("fsync", str(folder)) in before
    assert ("fsync", str(final.parent)) in after


def send(store: FolderStorage, upload: Upload) -> None:
    for name, body in CONTENTS.items():
        part = store.open_part(upload, name, 0)
        part.write(body)
        part.save()
        part.close()


def test_nothing_gets_its_name_before_it_is_durable(
    tmp_path: Path, durable: list[tuple[str, str]]
) -> None:
    root = tmp_path / "local"
    published = publish(root, 2)
    assert_ordered(durable, root / "step-2", root / f".tmp-step-2-{os.getpid()}")

    durable.clear()
    store = FolderStorage(tmp_path / "store")
    store.prepare()
    upload = Artifacts(store).upload("job", 1, published.manifest, published.manifest_sha256)
    send(store, upload)
    store.verify(upload)
    final = store.path(upload.final)
    assert_ordered(durable, final, store.path(upload.staging))
    parents = [("fsync", str(path)) for path in final.parents[:3]]
    assert durable[-3:] == parents, "each new folder is an entry of its parent"


def test_a_service_killed_between_rename_and_row_publishes_the_same_at_the_next_commit(
    tmp_path: Path,
) -> None:
    store = FolderStorage(tmp_path)
    store.prepare()
    files = [
        ManifestFile(name=name, bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
        for name, body in CONTENTS.items()
    ]
    manifest = Manifest(step=2, kind="full", config_sha256="0" * 64, files=files)
    sha256 = hashlib.sha256(manifest.model_dump_json(indent=1).encode()).hexdigest()
    upload = Artifacts(store).upload("job", 1, manifest, sha256)
    send(store, upload)
    first = store.verify(upload)
    assert store.received(upload) == {
        **{name: len(body) for name, body in CONTENTS.items()},
        "MANIFEST.json": first,
    }
    assert store.verify(upload) == first
