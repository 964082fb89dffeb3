"""The file of remembered rewards: bounded, shared, and never worse than not knowing."""

import asyncio
import logging
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dar.rewards.cache.store import DAMAGED, FILE, ROW_BYTES, CacheStore

LONG = 1e9
WRITER = """
import asyncio, sys
from pathlib import Path
from dar.rewards.cache.store import CacheStore

async def main(folder: Path, name: str) -> None:
    store = CacheStore(folder)
    for number in range(200):
        store.put({f"{name}{number}".encode(): name.encode() * 50})
        if number % 20 == 0:
            await store.get([b"shared"], 1e9)
    store.put({b"shared": name.encode()})
    await store.aclose()

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


class Clock:
    """A clock that moves only when the test says so."""

    now = 1e9

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
async def open_store(tmp_path: Path) -> AsyncIterator[Callable[..., CacheStore]]:
    opened: list[CacheStore] = []

    def start(**given: Any) -> CacheStore:
        opened.append(CacheStore(**{"folder": tmp_path / "cache", **given}))
        return opened[-1]

    yield start
    for store in opened:
        await store.aclose()


def keys(*numbers: int) -> list[bytes]:
    return [b"%032d" % number for number in numbers]


def values(*numbers: int, size: int = 100) -> Mapping[bytes, bytes]:
    return {key: key[-4:] * (size // 4) for key in keys(*numbers)}


@pytest.mark.parametrize("is_file", [True, False])
async def test_what_was_put_is_found(open_store: Callable[..., CacheStore], is_file: bool) -> None:
    store = open_store() if is_file else open_store(folder=None)
    assert await store.get(keys(1, 2), LONG) == {}
    store.put(values(1, 2))
    store.put({keys(2)[0]: b"newer"})
    assert await store.get(keys(1, 2, 3), LONG) == {**values(1), keys(2)[0]: b"newer"}
    many = values(*range(2000))
    store.put(many)
    assert await store.get(list(many), LONG) == many


async def test_it_outlives_its_process_and_its_closing(
    open_store: Callable[..., CacheStore],
) -> None:
    store = open_store()
    store.put(values(1))
    await store.aclose()
    assert await store.get(keys(1), LONG) == values(1)
    assert await open_store().get(keys(1), LONG) == values(1)


async def test_what_is_older_than_asked_for_is_unknown(
    open_store: Callable[..., CacheStore],
) -> None:
    clock = Clock()
    store = open_store(clock=clock)
    store.put(values(1))
    clock.now += 60
    store.put(values(2))
    assert await store.get(keys(1, 2), 30) == values(2)
    assert await store.get(keys(1, 2), 90) == values(1, 2), "its reader says how old it may be"
    store.put(values(1))
    assert await store.get(keys(1, 2), 30) == values(1, 2), "put again it is new"
    clock.now -= 3600
    assert await store.get(keys(1, 2), 90) == {}, "the clock was set back"


async def test_the_least_recently_used_make_room(open_store: Callable[..., CacheStore]) -> None:
    row = 32 + 100 + ROW_BYTES
    store = open_store(max_bytes=10 * row, clock=Clock())
    for number in range(10):
        store.put(values(number))
    assert len(await store.get(keys(*range(10)), LONG)) == 10
    assert await store.get(keys(0, 1), LONG) == values(0, 1)
    store.put(values(10, 11, 12))
    found = await store.get(keys(*range(13)), LONG)
    assert found == values(0, 1, *range(5, 13)), "2, 3 and 4 were used before all others"
    store.put(values(99, size=400))
    assert sum(32 + len(v) + ROW_BYTES for v in await _all(store)) <= 10 * row
    store.put(values(100, size=100_000))
    assert await store.get(keys(100), LONG) == {}, "what is larger than all room does not stay"
    store.put(values(1))
    assert await store.get(keys(1), LONG) == values(1)


async def _all(store: CacheStore) -> list[bytes]:
    return list((await store.get(keys(*range(101)), LONG)).values())


async def test_the_file_keeps_to_its_bound(
    open_store: Callable[..., CacheStore], tmp_path: Path
) -> None:
    bound = 512 * 1024
    store = open_store(max_bytes=bound)
    for start in range(0, 20_000, 500):
        store.put(values(*range(start, start + 500)))
    assert len(await store.get(keys(*range(19_500, 20_000)), LONG)) == 500
    await store.aclose()
    assert bound / 2 < (tmp_path / "cache" / FILE).stat().st_size < 1.5 * bound


def test_processes_share_a_file(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "cache"), name], stderr=subprocess.PIPE
        )
        for name in ("a", "b", "c")
    ]
    said = [writer.communicate(timeout=60)[1] for writer in writers]
    assert said == [b"", b"", b""]
    assert [writer.returncode for writer in writers] == [0, 0, 0]

    async def read() -> dict[bytes, bytes]:
        store = CacheStore(tmp_path / "cache")
        names = [f"{name}{number}".encode() for name in "abc" for number in range(200)]
        found = await store.get([*names, b"shared"], LONG)
        await store.aclose()
        return found

    found = asyncio.run(read())
    assert len(found) == 601
    assert all(value == key[:1] * 50 for key, value in found.items() if key != b"shared")
    assert found[b"shared"] in {b"a", b"b", b"c"}


def _scribble(path: Path) -> None:
    path.write_bytes(b"this is no database, whatever its name says" * 100)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: 4096 + 100])


def _other_tables(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE rewards (key BLOB, number REAL)")
    connection.close()


@pytest.mark.parametrize("damage", [_scribble, _cut, _other_tables])
async def test_a_damaged_file_is_set_aside(
    open_store: Callable[..., CacheStore],
    tmp_path: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = open_store()
    store.put(values(*range(500)))
    await store.aclose()
    damage(tmp_path / "cache" / FILE)
    found = await store.get(keys(*range(500)), LONG)
    assert all(value == values(*range(500))[key] for key, value in found.items())
    store.put(values(7))
    assert await store.get(keys(7), LONG) == values(7)
    assert (tmp_path / f"cache{DAMAGED}" / FILE).exists()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "are damaged" in caplog.text


async def test_a_changed_byte_makes_a_value_unknown_and_no_other(
    open_store: Callable[..., CacheStore], tmp_path: Path
) -> None:
    store = open_store()
    store.put({keys(1)[0]: b"[0.25]", keys(2)[0]: b"[0.75]"})
    await store.aclose()
    path = tmp_path / "cache" / FILE
    content = path.read_bytes()
    assert content.count(b"[0.25]") == 1
    path.write_bytes(content.replace(b"[0.25]", b"[9.25]"))
    assert await store.get(keys(1, 2), LONG) == {keys(2)[0]: b"[0.75]"}
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE rewards SET value = 'text' WHERE key = ?", (keys(2)[0],))
    connection.close()
    assert await store.get(keys(1, 2), LONG) == {}


async def test_a_place_that_cannot_be_written_is_as_good_as_none(
    open_store: Callable[..., CacheStore], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store = open_store(folder=tmp_path / "file" / "cache")
    store.put(values(1))
    store.put(values(2))
    assert await store.get(keys(1), LONG) == {}
    assert len(caplog.records) == 1
    assert "cannot be cached" in caplog.text


async def test_a_writer_that_holds_the_file_stops_no_reader(
    open_store: Callable[..., CacheStore], tmp_path: Path
) -> None:
    store = open_store()
    store.put(values(1))
    assert await store.get(keys(1), LONG) == values(1)
    other = sqlite3.connect(tmp_path / "cache" / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert await store.get(keys(1), LONG) == values(1)
    other.execute("ROLLBACK")
    other.close()


async def test_nobody_else_may_read_the_folder(
    open_store: Callable[..., CacheStore], tmp_path: Path
) -> None:
    store = open_store()
    await store.get(keys(1), LONG)
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0
