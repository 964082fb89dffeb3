"""A service starts only on the files of its own installation."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog
from sqlalchemy import delete
from storage.conftest import Place, opened

from dar.errors import ConfigurationError, ServiceUnavailableError
from dar.settings import Settings
from fakes.world import FakeClock, World
from service import keys, migrate, storage_owner
from service.__main__ import main
from service.storage.storage import MARKER, Storage
from service.store.database import Database
from service.store.tables import FileRow, StorageIdRow


class Started:
    """An installation, of which services start on one storage or another."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home)
        home.mkdir()
        self.database = Database(self.settings.sqlalchemy_url)
        migrate.upgrade(self.settings, self.database)

    def start(self, url: str) -> Storage:
        storage = opened(url)
        storage_owner.claim(storage, self.database)
        keys.configure(self.settings, self.database)
        return storage

    def upload(self, storage: Storage, name: str) -> None:
        """As a request stores it."""
        storage.put(f"files/{name}", [b"rows"])
        world = World(self.database, FakeClock())
        row = {"filename": "rows", "purpose": "fine-tune", "num_rows": 1, "columns": {}}
        row |= {"created_at": world.clock.now, "project_id": world.project_id, "bytes": 4}
        sha256 = hashlib.sha256(b"rows").hexdigest()
        with self.database.write() as transaction:
            transaction.add(FileRow(id=name, sha256=sha256, **row))


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    structlog.reset_defaults()  # another test's command has given the log a file that is closed
    made = Started(tmp_path / "home")
    yield made
    made.database.close()


def test_a_restart_on_another_place_is_refused_and_touches_nothing(
    started: Started, kind: str, place: Place, tmp_path: Path
) -> None:
    url = place(kind)
    started.start(url)
    started.start(f"{url}-2")  # nothing is stored yet
    storage = started.start(url)
    started.upload(storage, "file-1")
    with pytest.raises(ConfigurationError, match="none of the files") as caught:
        started.start(f"{url}-3")
    assert "files/file-1" in caught.value.message
    assert opened(f"{url}-3").mark() is None
    storage_id = str(opened(url).mark())
    assert storage_id in caught.value.message, "so that it can be adopted by hand"
    opened(f"{url}-3").prepare()
    opened(f"{url}-3").put(MARKER, [storage_id.encode()])
    started.start(f"{url}-3")

    other = Started(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="another installation"):
        other.start(url)
    opened(url).remove(MARKER)  # as in a folder of an earlier version
    with pytest.raises(ConfigurationError, match="the database names none"):
        other.start(url)
    other.database.close()
    assert opened(url).mark() is None
    started.start(url)
    assert opened(url).mark() == storage_id, "its own files show whose it is"


def test_replicas_that_start_at_once_agree(started: Started, kind: str, place: Place) -> None:
    url = place(kind)
    with ThreadPoolExecutor(4) as pool:
        storages = [opened(url) for _ in range(4)]
        list(pool.map(lambda one: storage_owner.claim(one, started.database), storages))
    assert {one.owner for one in storages} == {storages[0].mark()}


def test_a_place_that_is_swapped_under_a_service_is_seen(
    started: Started, kind: str, place: Place
) -> None:
    storage = started.start(place(kind))
    storage.check_mounted()
    storage.put(MARKER, [b"dar-another"])
    with pytest.raises(ServiceUnavailableError, match="is not the place"):
        storage.check_mounted()
    storage.remove(MARKER)
    with pytest.raises(ServiceUnavailableError, match="is not the place"):
        storage.check_mounted()


@pytest.mark.parametrize("has_files", [True, False])
def test_an_installation_of_an_earlier_version_goes_on(
    started: Started, place: Place, has_files: bool
) -> None:
    url = place("folder")
    storage = started.start(url)
    storage.put("files/left-behind", [b"1"])
    if has_files:
        started.upload(storage, "file-1")
    storage.remove(MARKER)
    with started.database.write() as transaction:
        transaction.execute(delete(StorageIdRow))
    started.start(url).check_mounted()


def test_a_move_marks_its_target_once_it_is_whole(
    started: Started,
    kind: str,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = place(kind)
    storage = started.start(url)
    started.upload(storage, "file-1")
    monkeypatch.setenv("DAR_HOME", str(started.settings.home))
    monkeypatch.setenv("DAR_STORAGE_URL", url)
    target = f"{url}-2"
    foreign = opened(target)
    foreign.prepare()
    foreign.put(MARKER, [b"dar-another"])
    assert main(["move-storage", target]) == 1
    assert "another installation" in capsys.readouterr().err
    assert list(foreign.entries("")) == []
    storage_id = str(storage.mark())
    foreign.put(MARKER, [f"{storage_id}{storage_owner.MOVING}".encode()])
    with pytest.raises(ConfigurationError, match="has not ended"):
        started.start(target)
    assert main(["move-storage", target]) == 0, capsys.readouterr().err
    started.start(target)
