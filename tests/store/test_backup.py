"""A backup fits together though the installation goes on, and only a whole one is restored."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from dar.errors import ConfigurationError
from dar.settings import Settings
from fakes.postgres import BINARIES, Postgres
from fakes.world import World
from service import keys, migrate
from service.__main__ import main
from service.artifacts import Artifacts
from service.backup import backup, databases
from service.backup import restore as restoring
from service.storage.folder import FolderStorage
from service.store import checkpoints, fence
from service.store.database import Database
from service.store.tables import AttemptRow, CheckpointRow, FileRow, JobRow

KEYS = ("api_key", "worker_key", "reward_secret")


class Installed:
    """An installation with a running job, and the means to restore it elsewhere."""

    def __init__(self, world: World, url: str, new_url: Callable[[], str], folder: Path) -> None:
        self.world, self.folder, self.new_url = world, folder, new_url
        self.settings = self.settings_of("home", url)
        self.artifacts = Artifacts(FolderStorage(self.settings.artifacts_path))
        keys.configure(self.settings, world.database)
        keys.secret_keys(self.settings, world.database)
        self.artifacts.storage.prepare()
        self.upload("file-1")
        self.held = world.running(keep_last=1)
        self.publish(2)

    def settings_of(self, name: str, url: str) -> Settings:
        return Settings(home=self.folder / name, database_url=url, postgres_bin=BINARIES)

    def upload(self, name: str) -> None:
        content = name.encode()
        (self.settings.artifacts_path / "files" / name).write_bytes(content)
        row = {"filename": "rows", "purpose": "fine-tune", "num_rows": 1, "columns": {}}
        row |= {"created_at": self.world.clock.now, "project_id": self.world.project_id}
        sha256 = hashlib.sha256(content).hexdigest()
        with self.world.database.write() as transaction:
            transaction.add(FileRow(id=name, bytes=len(content), sha256=sha256, **row))

    def publish(self, step: int) -> CheckpointRow:
        content = f"weights of step {step}".encode()
        entry = {"name": "model.safetensors", "bytes": len(content)}
        entry["sha256"] = hashlib.sha256(content).hexdigest()
        manifest = self.world.manifest(step, files=[entry])
        whole = manifest.model_dump_json(indent=1).encode()
        folder = self.checkpoint(step)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(content)
        (folder / "MANIFEST.json").write_bytes(whole)
        with self.world.database.write() as transaction:
            held = fence.hold(transaction, self.held.attempt.lease_id, 1)
            sha256 = hashlib.sha256(whole).hexdigest()
            made = checkpoints.register(transaction, held.job, held.attempt, manifest, sha256)
            checkpoints.publish(transaction, held.job, made, len(whole))
        return made

    def checkpoint(self, step: int) -> Path:
        return self.settings.artifacts_path / self.artifacts.checkpoint(self.held.job.id, 1, step)

    def supersede(self, step: int) -> None:
        """A newer checkpoint, because of which the older one goes."""
        self.publish(step)
        with self.world.database.write() as transaction:
            checkpoints.mark_superseded(transaction)
            doomed = checkpoints.to_remove(transaction)
        for item in doomed:
            self.artifacts.remove_checkpoint(item.job_id, item.attempt, item.step)
            with self.world.database.write() as transaction:
                checkpoints.mark_removed(transaction, item.id)

    def take(self, name: str = "backup", **options: bool) -> Path:
        chosen = {"is_copying": False, "has_secret_keys": False} | options
        backup.take(self.settings, self.folder / name, **chosen)
        return self.folder / name

    def restore(self, taken: Path, name: str = "new") -> Settings:
        settings = self.settings_of(name, self.new_url())
        restoring.restore(settings, taken)
        return settings


@pytest.fixture
def new_url(dialect: str, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Gives URLs of databases that are empty or do not exist."""
    names = iter(range(100))

    def make() -> str:
        if dialect == "sqlite":
            return f"sqlite:///{tmp_path / f'new-{next(names)}' / 'dar.db'}"
        postgres: Postgres = request.getfixturevalue("postgres")
        return postgres.url(postgres.create())

    return make


@pytest.fixture
def installed(world: World, url: str, new_url: Callable[[], str], tmp_path: Path) -> Installed:
    return Installed(world, url, new_url, tmp_path)


@pytest.mark.parametrize("is_copying", [False, True])
def test_a_restored_backup_is_the_installation_as_it_was(
    installed: Installed, is_copying: bool
) -> None:
    taken = installed.take(is_copying=is_copying)
    weights = installed.checkpoint(2) / "model.safetensors"
    place = taken / "artifacts" / weights.relative_to(installed.settings.artifacts_path)
    assert place.samefile(weights) is not is_copying
    later = installed.world.submit()
    installed.supersede(4)
    settings = installed.restore(taken)
    for name in KEYS:
        path = settings.home / name
        assert path.read_text() == (installed.settings.home / name).read_text()
        assert path.stat().st_mode & 0o077 == 0
    assert not (settings.home / "secret_keys").exists()
    kept = sorted(path.relative_to(settings.home) for path in settings.home.rglob("*"))
    assert Path("artifacts/files/file-1") in kept
    assert not [path for path in kept if "unfinished" in str(path)]
    database = Database(settings.sqlalchemy_url)
    with database.read() as transaction:
        job = transaction.get_one(JobRow, installed.held.job.id)
        newest = checkpoints.newest(transaction, job.id)
        attempt = transaction.get_one(AttemptRow, (job.id, 1))
        assert (job.status, attempt.status) == ("running", "running")
        assert newest is not None
        assert newest.step == 2
        assert transaction.get(JobRow, later) is None
    storage = FolderStorage(settings.artifacts_path)
    folder = storage.path(Artifacts(storage).checkpoint(job.id, 1, 2))
    assert (folder / "model.safetensors").read_bytes() == b"weights of step 2"
    migrate.upgrade(settings, database)
    keys.configure(settings, database)  # PostgreSQL refuses a host without its keys
    database.close()


def test_a_checkpoint_that_goes_during_the_backup_is_replaced_by_its_successor(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, later = databases.copy, iter([4, 6])

    def copy_then_change(*arguments: Any) -> databases.Contents:
        contents = copy(*arguments)
        if (step := next(later, None)) is not None:
            installed.supersede(step)
        return contents

    monkeypatch.setattr(databases, "copy", copy_then_change)
    settings = installed.restore(installed.take())
    found = settings.artifacts_path.glob("checkpoints/*/*/*/model.safetensors")
    assert [path.read_text() for path in found] == ["weights of step 6"]


def test_what_is_damaged_already_is_named_and_left_out(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed.publish(4)
    (installed.checkpoint(2) / "model.safetensors").write_bytes(b"weights of step 3")
    (installed.checkpoint(4) / "model.safetensors").unlink()
    # A process has these for itself alone.
    monkeypatch.setattr("service.http.log.configure", lambda level: None)
    monkeypatch.setattr("os.umask", lambda mask: mask)
    for name, value in (("HOME", installed.settings.home), ("POSTGRES_BIN", BINARIES)):
        monkeypatch.setenv(f"DAR_{name}", str(value))
    monkeypatch.setenv("DAR_DATABASE_URL", installed.settings.sqlalchemy_url)
    assert main(["backup", str(installed.folder / "backup"), "--with-secret-keys"]) == 0
    out, err = capsys.readouterr()
    assert "step-2/model.safetensors is altered" in err
    assert "step-4/model.safetensors is missing" in err
    assert "1 jobs" in out
    assert (installed.folder / "backup" / "secret_keys").is_file()
    assert main(["backup", str(installed.folder / "backup")]) == 1
    assert "is not empty" in capsys.readouterr().err
    monkeypatch.setenv("DAR_HOME", str(installed.folder / "new"))
    monkeypatch.setenv("DAR_DATABASE_URL", installed.new_url())
    assert main(["restore", str(installed.folder / "backup")]) == 0
    assert f"{installed.held.job.id} had not ended and goes on" in capsys.readouterr().out


def test_the_database_is_copied_once_though_files_of_a_damaged_checkpoint_are_missing(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, copies = databases.copy, []

    def counted(*arguments: Any) -> databases.Contents:
        copies.append(copy(*arguments))
        return copies[-1]

    monkeypatch.setattr(databases, "copy", counted)
    made = installed.publish(4)
    (installed.checkpoint(4) / "model.safetensors").unlink()
    with installed.world.database.write() as transaction:
        assert checkpoints.set_aside(transaction, made, "model.safetensors is missing")
    manifest = json.loads((installed.take() / "backup.json").read_text())
    assert "step-4/model.safetensors is missing" in manifest["damaged"][0]
    assert len(copies) == 1


def changed_manifest(taken: Path, **values: Any) -> None:
    path = taken / "backup.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def damage(taken: Path, what: str) -> str:
    """Damage a backup; returns what is to be said about it."""
    if what == "unfinished":
        (taken / "backup.json").unlink()
        return "not a finished backup"
    if what == "manifest":
        (taken / "backup.json").write_bytes((taken / "backup.json").read_bytes()[:-9])
        return "backup.json cannot be read"
    if what == "schema":
        changed_manifest(taken, revision="9999_of_the_future")
        return "newer than this code"
    if what == "format":
        changed_manifest(taken, format=99)
        return "made by the newer version"
    if what == "escape":
        entry = {"path": "../home/api_key", "bytes": 1, "sha256": "0"}
        changed_manifest(taken, files=[entry])
        return "leads out of the folder"
    if what == "database":
        path = next(path for path in taken.iterdir() if path.suffix in {".db", ".dump"})
        path.write_bytes(path.read_bytes()[:-1])
        return "damaged at da"
    path = next(taken.rglob("model.safetensors"))
    content = path.read_bytes()
    path.unlink()
    if what == "missing":
        return "it is missing"
    path.write_bytes(content[:-1] + b"!")
    return "content was altered"


KINDS = ("unfinished", "manifest", "schema", "format", "escape", "database", "missing", "altered")


def test_a_backup_that_is_not_whole_or_too_new_is_refused(installed: Installed) -> None:
    for what in KINDS:
        taken = installed.take(f"backup-{what}")
        said = damage(taken, what)
        with pytest.raises(ConfigurationError, match=said):
            installed.restore(taken, f"new-home-{what}")
        assert not (installed.folder / f"new-home-{what}").exists(), what


def test_nothing_that_exists_is_overwritten(installed: Installed, dialect: str) -> None:
    taken = installed.take()
    with pytest.raises(ConfigurationError, match=r"home .* is not empty"):
        installed.restore(taken, "home")
    (installed.folder / "fresh").mkdir()
    settings = installed.settings_of("fresh", installed.settings.sqlalchemy_url)
    with pytest.raises(ConfigurationError, match=r"exists|has .* tables"):
        restoring.restore(settings, taken)
    assert list(settings.home.iterdir()) == []
    other = "sqlite:////nowhere/dar.db" if dialect == "postgresql" else "postgresql+psycopg://h/d"
    with pytest.raises(ConfigurationError, match="so DAR_DATABASE_URL must name"):
        restoring.restore(installed.settings_of("fresh", other), taken)
    if dialect == "postgresql":
        bare = installed.settings.model_copy(update={"postgres_bin": settings.home})
        with pytest.raises(ConfigurationError, match=r"no pg_dump in .*DAR_POSTGRES_BIN"):
            backup.take(bare, installed.folder / "b", is_copying=False, has_secret_keys=False)


def test_a_restore_that_was_interrupted_is_repeated(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = installed.take()
    settings = installed.settings_of("new", installed.new_url())

    def fail(*_: object) -> None:
        raise OSError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr(databases, "restore_postgresql", fail)
        patch.setattr(shutil, "move", fail)
        with pytest.raises(OSError, match="power"):
            restoring.restore(settings, taken)
    restoring.restore(settings, taken)
    assert not (settings.home / restoring.UNFINISHED).exists()
    database = Database(settings.sqlalchemy_url)
    with database.read() as transaction:
        assert transaction.execute(text("SELECT count(*) FROM jobs")).scalar_one() == 1
    database.close()


def test_a_home_without_a_database_is_named(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    with pytest.raises(ConfigurationError, match=r"home has no database dar.db; .*--home"):
        backup.take(settings, tmp_path / "b", is_copying=False, has_secret_keys=False)


def test_another_process_that_leaves_the_database_takes_no_writes_along(world: World) -> None:
    database, path = world.database, world.database.engine.url.database
    if database.is_postgresql:
        pytest.skip("only SQLite keeps its newest writes in a file beside the database")
    visit = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1])\n"
    visit += "print(c.execute('SELECT count(*) FROM jobs').fetchone()[0]); c.close()"

    def seen_by_another() -> int:
        command = [sys.executable, "-I", "-c", visit, str(path)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    with database.read() as one, database.read() as two:  # two connections of this process
        one.execute(text("SELECT 1"))
        two.execute(text("SELECT 1"))
    counts = []
    for _ in range(2):
        world.submit()
        counts.append(seen_by_another())
    assert counts == [1, 2]
