"""All files of an installation in another place, and none lost on the way: moved, or backed up."""

import hashlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from storage.conftest import Place, opened, use

from dar.settings import Settings, environment, load_settings
from fakes.scripted_installation import free_port
from fakes.seaweed import SeaweedFS
from fakes.world import FakeClock, World
from service import keys, migrate
from service.__main__ import main
from service.storage.storage import Storage
from service.store import checkpoints, fence
from service.store.database import Database
from service.store.tables import FileRow

LONG = os.urandom(9 * 1024**2)
OTHER = {"folder": "bucket", "bucket": "folder"}


class Installed:
    """A stopped installation with an uploaded file and a checkpoint, on SQLite."""

    def __init__(self, home: Path, url: str) -> None:
        self.url, self.storage = url, opened(url)
        self.storage.prepare()
        settings = Settings(home=home)
        self.database = Database(settings.sqlalchemy_url)
        migrate.upgrade(settings, self.database)
        keys.configure(settings, self.database)
        self.world = World(self.database, FakeClock())
        self.files: dict[str, bytes] = {}
        self.upload("file-1", b"rows")
        held = self.world.running()
        weights = {"name": "model.safetensors", "bytes": len(LONG)}
        weights["sha256"] = hashlib.sha256(LONG).hexdigest()
        manifest = self.world.manifest(2, files=[weights])
        whole = manifest.model_dump_json(indent=1).encode()
        folder = f"checkpoints/{held.job.id}/attempt-1/step-2"
        self.store(f"{folder}/model.safetensors", LONG)
        self.store(f"{folder}/MANIFEST.json", whole)
        with self.database.write() as transaction:
            now = fence.hold(transaction, held.attempt.lease_id, 1)
            digest = hashlib.sha256(whole).hexdigest()
            made = checkpoints.register(transaction, now.job, now.attempt, manifest, digest)
            checkpoints.publish(transaction, now.job, made, len(whole))

    def store(self, key: str, content: bytes) -> None:
        self.storage.put(key, [content])
        self.files[key] = content

    def upload(self, name: str, content: bytes) -> None:
        self.store(f"files/{name}", content)
        row = {"filename": "rows", "purpose": "fine-tune", "num_rows": 1, "columns": {}}
        row |= {"created_at": self.world.clock.now, "project_id": self.world.project_id}
        sha256 = hashlib.sha256(content).hexdigest()
        with self.database.write() as transaction:
            transaction.add(FileRow(id=name, bytes=len(content), sha256=sha256, **row))


def content_of(storage: Storage) -> dict[str, bytes]:
    return {entry.key: b"".join(storage.read(entry.key)) for entry in storage.entries("")}


@pytest.fixture
def installed(
    kind: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Installed:
    """An installation on one kind of storage; the environment names it."""
    made = Installed(tmp_path / "home", place(kind))
    monkeypatch.setenv("DAR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAR_STORAGE_URL", made.url)
    return made


def test_all_files_are_in_the_new_place_and_the_next_run_finds_them_there(
    installed: Installed,
    kind: str,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = place(OTHER[kind])
    installed.storage.put("files/of-nobody", [b"a leftover"])
    assert main(["move-storage", target]) == 0
    said = capsys.readouterr()
    assert "3 files were copied now, all verified" in said.out
    assert said.err == ""
    assert content_of(opened(target)) == installed.files

    installed.upload("file-2", b"more")  # the service had not been stopped
    assert main(["move-storage", target, "--quick"]) == 0
    assert "1 files were copied now" in capsys.readouterr().out
    assert main(["move-storage", target]) == 0
    assert f"DAR_STORAGE_URL={target}" in capsys.readouterr().out
    assert content_of(opened(target)) == installed.files

    monkeypatch.setenv("DAR_STORAGE_URL", target)
    assert main(["audit"]) == 0, capsys.readouterr().out


def test_a_file_that_is_altered_on_either_side_is_seen(
    installed: Installed, kind: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    target = place(OTHER[kind])
    assert main(["move-storage", target]) == 0
    opened(target).put("files/file-1", [b"r0ws"])  # in the new place: copied again
    assert main(["move-storage", target]) == 0
    assert content_of(opened(target)) == installed.files

    installed.upload("file-2", b"more")
    installed.upload("file-3", b"gone")
    installed.storage.put("files/file-2", [b"m0re"])  # in the old one: not copied
    installed.storage.remove("files/file-3")
    capsys.readouterr()
    assert main(["move-storage", target]) == 1
    said = capsys.readouterr().err
    assert "files/file-2 is altered" in said
    assert "files/file-3 is missing" in said
    assert opened(target).size("files/file-2") is None


@pytest.mark.parametrize("kind", ["folder"], indirect=True)
def test_an_error_of_a_disk_is_a_sentence(
    installed: Installed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(installed.url) / "files/file-1"
    source.unlink()
    source.mkdir()  # cannot be read, also not by root
    target = str(tmp_path / "target")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(LONG) // 2, before[1]))
    try:
        assert main(["move-storage", target]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr()
    assert f"dar: {target} cannot take checkpoints/" in said.err
    assert "File too large; mend that, then run the command again" in said.err
    assert main(["move-storage", target]) == 1
    assert "files/file-1 is unreadable (Is a directory)" in capsys.readouterr().err
    assert len(list(opened(target).entries("checkpoints/"))) == 2, "the others were copied"


@pytest.mark.parametrize("kind", ["folder"], indirect=True)
def test_a_place_that_cannot_be_the_target_is_named(
    installed: Installed,
    seaweed: SeaweedFS,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(monkeypatch, seaweed)
    foreign = seaweed.url()
    opened(foreign).put("files/file-of-others", [b"1"])
    folder = tmp_path / "foreign"
    (folder / "files/tmp").mkdir(parents=True)
    for name in ("files/file-of-others", "files/tmp/upload-of-others"):
        (folder / name).write_bytes(b"1")
        os.utime(folder / name, (0, 0))
    for target, said in {
        installed.url: "already",
        f"{installed.url}/inside": "inside each other",
        foreign: "none of them of this installation",
        str(folder): "none of them of this installation",
        "s3://none/x": "AccessDenied",
        "s3:bucket": "s3://bucket/prefix",
    }.items():
        assert main(["move-storage", target]) == 1
        assert said in capsys.readouterr().err
    assert (folder / "files/tmp/upload-of-others").exists(), "others' files are left alone"
    assert not (folder / "checkpoints").exists()
    assert opened(foreign).mark() is None
    use(monkeypatch, seaweed, endpoint=f"http://127.0.0.1:{free_port()}")
    assert main(["move-storage", seaweed.url()]) == 1
    assert "does not answer" in capsys.readouterr().err
    assert content_of(installed.storage) == installed.files


def test_a_backup_is_restored_into_either_kind_of_storage(
    installed: Installed,
    kind: str,
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["backup", str(tmp_path / "backup")]) == 0
    target = place(OTHER[kind])
    monkeypatch.setenv("DAR_HOME", str(tmp_path / "new"))
    monkeypatch.setenv("DAR_STORAGE_URL", target)
    assert main(["restore", str(tmp_path / "backup")]) == 0, capsys.readouterr().err
    assert content_of(opened(target)) == installed.files
    assert main(["audit"]) == 0, capsys.readouterr().out
    monkeypatch.setenv("DAR_HOME", str(tmp_path / "third"))
    assert main(["restore", str(tmp_path / "backup")]) == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.slow  # processes that are killed
def test_a_move_that_was_killed_goes_on_where_it_was(
    installed: Installed, kind: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    target = place(OTHER[kind])
    for number in range(60):
        installed.upload(f"many-{number:02}", os.urandom(400_000))
    command = [sys.executable, "-m", "service", "move-storage", target]
    for share in (10, 30):
        mover = subprocess.Popen(command, env=environment())
        while len(list(opened(target).entries("files/"))) < share:
            assert mover.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        mover.send_signal(signal.SIGKILL)
        mover.wait()
    there = {entry.key for entry in opened(target).entries("")} & installed.files.keys()
    assert main(["move-storage", target]) == 0
    copied = re.search(r"(\d+) files were copied now", capsys.readouterr().out)
    assert copied is not None
    assert 0 < int(copied[1]) <= len(installed.files) - len(there)
    found = content_of(opened(target))
    assert {key: found[key] for key in installed.files} == installed.files
    assert load_settings().storage_url == installed.url, "nothing else was changed"
