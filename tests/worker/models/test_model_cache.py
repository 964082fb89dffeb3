"""The cache of models: bounded, shared by the slots of a host, and whole after any kill."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dar.settings import Settings
from worker.models.cache import HeldModel, ModelCache, ModelRecord, inventory

LIMIT = 100


def record(name: str, size: int = 40) -> ModelRecord:
    return ModelRecord(name=name, version="1", files={"config.json": 2, "a/b": size - 2})


def fill(held: HeldModel) -> None:
    for name, size in held.record.files.items():
        (held.folder / name).parent.mkdir(exist_ok=True)
        (held.folder / name).write_bytes(b"x" * size)


def never() -> None:
    raise AssertionError("nobody else downloads this model")


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    return ModelCache(tmp_path / "models", LIMIT)


@pytest.fixture
def hold(cache: ModelCache) -> Callable[..., HeldModel]:
    """Holds a model, downloaded if need be, as if it were used some seconds from now."""

    def run(name: str, size: int = 40, *, at: float = 0) -> HeldModel:
        held = cache.hold(record(name, size), never)
        assert held is not None
        if not held.is_whole:
            fill(held)
            cache.complete(held)
        moment = datetime.now(UTC).timestamp() + at
        os.utime(held.place / "model.json", (moment, moment))
        return held

    return run


def test_what_was_unused_for_longest_goes_first_and_what_is_in_use_never(
    cache: ModelCache, hold: Callable[..., HeldModel]
) -> None:
    used = hold("used", at=-30)
    for name, at in (("old", -20), ("new", -10)):
        held = hold(name, 20, at=at)
        held.lock.close()
    assert cache.names() == ["new", "old", "used"]
    hold("next", 30).release()
    assert cache.names() == ["next", "new", "used"], "old was unused for longest"
    assert cache.bytes() == 90
    assert cache.hold(record("large", LIMIT - 39), never) is None, "no room beside the one in use"
    assert cache.hold(record("huge", LIMIT + 1), never) is None
    assert (used.folder / "a" / "b").is_file()
    used.release()
    assert cache.names() == ["used", "next", "new"], "nothing was removed in vain"
    again = cache.take("used", "1")
    assert again is not None, "it is not downloaded again"
    again.release()


def test_a_lower_limit_and_a_full_disk_take_models_away(
    cache: ModelCache, hold: Callable[..., HeldModel], tmp_path: Path
) -> None:
    for name, at in (("a", -20), ("b", -10)):
        hold(name, at=at).lock.close()
    (cache.path / ".going-x").mkdir()
    (cache.path / "half-made").mkdir()
    (cache.path / "notes.txt").touch()
    in_use = hold("c", 20, at=-30)
    ModelCache(cache.path, 10).tidy()
    assert cache.names() == ["c"], "only what is in use may be over the limit"
    in_use.release()
    assert [path.name[:2] for path in sorted(cache.path.iterdir())] == [".l", "c-", "no"]
    full = shutil.disk_usage(tmp_path).total
    assert ModelCache(cache.path, LIMIT, full).hold(record("d"), never) is None
    assert cache.names() == []


def test_a_file_that_was_damaged_is_downloaded_again(
    cache: ModelCache, hold: Callable[..., HeldModel]
) -> None:
    held = hold("a")
    held.release()
    (held.folder / "a" / "b").write_bytes(b"")
    assert cache.take("a", None) is None
    again = cache.hold(record("a"), never)
    assert again is not None
    assert not again.is_whole
    again.release()


def test_models_that_cannot_be_listed_stop_no_worker(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, models_dir=tmp_path / "own", work_dir=tmp_path / "work")
    strange = tmp_path / "own" / os.fsdecode(b"\xff")
    strange.mkdir(parents=True)
    (strange / "config.json").touch()
    assert inventory(settings) is None, "a name that is no text"
    (strange / "config.json").unlink()
    damaged = tmp_path / "work" / "models" / "a" / "model.json"
    damaged.mkdir(parents=True)
    assert inventory(settings) is None, "a file that cannot be read"
    damaged.rmdir()
    assert inventory(settings) is not None


SLOT = """
import sys, time
from pathlib import Path
from worker.models.cache import ModelCache, ModelRecord
record = ModelRecord(name="a", version="1", files={"config.json": 2, "a/b": 38})
held = ModelCache(Path(sys.argv[1]), 100).hold(record, lambda: None)
(held.folder / "config.json").write_bytes(b"xx")
print("downloading", flush=True)
time.sleep(60)
"""


def test_a_slot_that_is_killed_in_a_download_leaves_it_to_the_next_and_both_share_it(
    cache: ModelCache,
) -> None:
    slot = subprocess.Popen(
        [sys.executable, "-c", SLOT, str(cache.path)], stdout=subprocess.PIPE, text=True
    )
    assert slot.stdout is not None
    assert slot.stdout.readline() == "downloading\n"
    assert cache.hold(record("b", 70), never) is None, "the room for it is reserved"
    waits = threading.Event()
    found: list[HeldModel | None] = []

    def pause() -> None:
        waits.set()
        time.sleep(0.02)

    others = [
        threading.Thread(target=lambda: found.append(cache.hold(record("a"), pause)))
        for _ in range(2)
    ]
    for other in others:
        other.start()
    assert waits.wait(10)
    assert found == []
    slot.kill()
    slot.wait()
    slot.stdout.close()
    deadline = time.monotonic() + 10
    while not found and time.monotonic() < deadline:
        time.sleep(0.02)
    [first] = found
    assert first is not None
    assert not first.is_whole
    assert (first.folder / "config.json").read_bytes() == b"xx", "it goes on where the other was"
    fill(first)
    cache.complete(first)
    for other in others:
        other.join(10)
    second = found[1]
    assert second is not None
    assert second.is_whole
    assert cache.hold(record("c", 70), never) is None, "both use it"
    first.release()
    second.release()
