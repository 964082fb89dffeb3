"""The reconciler: patient when nobody could have renewed, thorough otherwise."""

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fakes.world import World
from service.artifacts import Artifacts
from service.background.notifier import Notifier
from service.background.reconciler import Reconciler
from service.background.waker import Waker
from service.store import checkpoints, jobs
from service.store.fence import Held
from service.store.tables import FileRow


class Counter(Waker):
    """A waker that only counts."""

    def __init__(self) -> None:
        super().__init__(None)
        self.count = 0

    def wake(self, count: int = 1) -> None:
        self.count += count


class Setup:
    """A reconciler whose clocks a test moves."""

    def __init__(self, world: World, folder: Path, ttl_seconds: float) -> None:
        self.world, self.waker, self.elapsed = world, Counter(), 0.0
        self.artifacts = Artifacts(folder)
        self.artifacts.prepare()
        self.reconciler = Reconciler(
            world.database,
            self.artifacts,
            self.waker,
            Notifier(world.database),
            ttl_seconds=ttl_seconds,
            pause_seconds=1,
            monotonic=lambda: self.elapsed,
        )

    def pass_time(self, seconds: float, step: float = 10) -> None:
        """Passes of the reconciler while time goes by."""
        while seconds > 0:
            self.elapsed += min(step, seconds)
            self.world.clock.advance(min(step, seconds))
            seconds -= step
            self.reconciler.run_once()


@pytest.fixture
def setup(world: World, tmp_path: Path, ttl_seconds: float) -> Iterator[Setup]:
    return Setup(world, tmp_path / "artifacts", ttl_seconds)


def test_no_lease_ends_within_one_ttl_of_the_start(setup: Setup, ttl_seconds: float) -> None:
    held = setup.world.running()
    setup.world.clock.advance(10 * ttl_seconds)
    setup.pass_time(ttl_seconds - 1)
    assert setup.world.attempt(held).status == "running"
    setup.pass_time(20)
    assert setup.world.attempt(held).status == "lost"
    assert setup.waker.count > 0


def test_no_lease_ends_within_one_ttl_of_a_gap(setup: Setup, ttl_seconds: float) -> None:
    setup.pass_time(2 * ttl_seconds)
    held = setup.world.running()
    setup.pass_time(2 * ttl_seconds, step=2 * ttl_seconds)
    setup.pass_time(ttl_seconds - 20)
    assert setup.world.attempt(held).status == "running"
    setup.pass_time(40)
    assert setup.world.attempt(held).status == "lost"


def test_a_job_that_nobody_claims_is_called_out_again(setup: Setup) -> None:
    setup.world.submit()
    setup.reconciler.run_once()
    assert setup.waker.count == 0
    setup.pass_time(10)
    assert setup.waker.count == 1


def test_a_job_that_is_not_due_wakes_nobody(setup: Setup) -> None:
    setup.world.submit(not_before=setup.world.clock.now.replace(year=2030))
    setup.pass_time(20)
    assert setup.waker.count == 0


def test_files_of_superseded_checkpoints_go(setup: Setup) -> None:
    held = setup.world.running(keep_last=1)
    folders = []
    for step in (2, 4):
        setup.world.publish(held, step)
        folders.append(setup.artifacts.checkpoint(held.job.id, 1, step))
        folders[-1].mkdir(parents=True)
        (folders[-1] / "model.safetensors").write_bytes(b"abc")
    setup.reconciler.run_once()
    assert [folder.exists() for folder in folders] == [False, True]


def test_a_cancelled_job_whose_worker_is_gone_ends(setup: Setup, ttl_seconds: float) -> None:
    held = setup.world.running()
    with setup.world.database.write() as transaction:
        jobs.cancel(transaction, setup.world.project_id, held.job.id)
    setup.pass_time(3 * ttl_seconds)
    assert setup.world.job(held.job.id).status == "cancelled"


def test_a_lease_shorter_than_a_pass_still_ends(world: World, tmp_path: Path) -> None:
    setup = Setup(world, tmp_path / "artifacts", ttl_seconds=1.0)
    held = setup.world.running()
    setup.pass_time(80, step=1)
    assert setup.world.attempt(held).status == "lost"


def test_a_mistake_in_one_pass_does_not_end_the_passes(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    passes = []

    def fail() -> None:
        passes.append("pass")
        raise LookupError

    monkeypatch.setattr(setup.reconciler, "run_once", fail)
    monkeypatch.setattr(setup.reconciler, "_pause_seconds", 0.01)
    setup.reconciler.start()
    eventually(lambda: len(passes) > 1)
    setup.reconciler.close()


def test_files_without_a_row_go_after_a_day(setup: Setup) -> None:
    now = datetime.now(UTC).timestamp()
    with setup.world.database.write() as transaction:
        transaction.add(uploaded(setup, "file-known"))
    for name, age in (("file-known", 90_000), ("file-orphan", 90_000), ("file-young", 80_000)):
        path = setup.artifacts.file(name)
        path.write_bytes(b"{}")
        os.utime(path, (now - age, now - age))
    setup.reconciler.run_once()
    left = {path.name for path in setup.artifacts.root.glob("files/file-*")}
    assert left == {"file-known", "file-young"}


def uploaded(setup: Setup, file_id: str) -> FileRow:
    return FileRow(
        id=file_id,
        project_id=setup.world.project_id,
        filename="rows.jsonl",
        purpose="fine-tune",
        bytes=2,
        sha256="0" * 64,
        num_rows=1,
        columns={},
        created_at=setup.world.clock.now,
    )


class Crash(BaseException):
    """The service is killed."""


FILES = ("model.safetensors", "resume/optimizer.safetensors", "resume/state.json")


def publish_with_files(setup: Setup, held: Held, step: int) -> Path:
    setup.world.publish(held, step)
    folder = setup.artifacts.checkpoint(held.job.id, 1, step)
    (folder / "resume").mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(b"abc")
    return folder


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Kill the service before its n-th change of a file or of a removed row; returns the count."""
    count = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise Crash
            return change(*args, **options)

        return call

    for module, name in ((os, "unlink"), (os, "rmdir"), (checkpoints, "mark_removed")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return lambda: count


def test_a_removal_may_be_killed_anywhere(setup: Setup) -> None:
    held = setup.world.running(keep_last=1, total_steps=1000)
    folders = [publish_with_files(setup, held, 1)]
    crashes = 0
    while True:
        folders.append(publish_with_files(setup, held, len(folders) + 1))
        with pytest.MonkeyPatch.context() as patched:
            changes = crash_at(patched, crashes + 1)
            try:
                setup.reconciler.run_once()
            except Crash:
                crashes += 1
            else:
                assert changes() == crashes == len(FILES) + 3, "each change was the last one once"
                break
        newest = folders[-1]
        assert all((newest / name).is_file() for name in FILES), "the newest one is never touched"
        setup.reconciler.run_once()
        assert [folder for folder in folders if folder.exists()] == [newest]
    with setup.world.database.read() as transaction:
        assert checkpoints.to_remove(transaction) == []
        assert len(checkpoints.list_page(transaction, held.job.id, checkpoints.Cursor()).rows) == 1


def test_files_that_cannot_be_removed_are_tried_again(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = setup.world.running(keep_last=1)
    folders = [publish_with_files(setup, held, step) for step in (2, 4)]

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "unlink", refuse)
    setup.reconciler.run_once()
    assert [folder.exists() for folder in folders] == [True, True]
    monkeypatch.undo()
    setup.reconciler.run_once()
    assert [folder.exists() for folder in folders] == [False, True]


def test_folders_of_checkpoints_without_a_row_go_after_a_day(setup: Setup) -> None:
    held = setup.world.running()
    known = publish_with_files(setup, held, 2)
    old, young, strange = (known.with_name(name) for name in (".tmp-step-4", "step-6", "notes"))
    for folder in (old, young, strange):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"a")
    yesterday = datetime.now(UTC).timestamp() - 90_000
    for folder in (known, old, strange):
        os.utime(folder, (yesterday, yesterday))
    setup.reconciler.run_once()
    assert [folder.exists() for folder in (known, old, young, strange)] == [
        True, False, True, True
    ]  # fmt: skip
