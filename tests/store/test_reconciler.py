"""The reconciler: patient when nobody could have renewed, thorough otherwise."""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from fakes.world import TTL, World
from service.artifacts import Artifacts
from service.background.notifier import Notifier
from service.background.reconciler import Reconciler
from service.background.waker import Waker
from service.storage.folder import FolderStorage
from service.store import checkpoints, fence, jobs, leases
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
        self.root = folder
        self.artifacts = Artifacts(FolderStorage(folder))
        self.artifacts.storage.prepare()
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
        """Passes of the reconciler while time goes by; as in its thread, one that fails is over."""
        while seconds > 0:
            self.elapsed += min(step, seconds)
            self.world.clock.advance(min(step, seconds))
            seconds -= step
            with contextlib.suppress(OperationalError):
                self.reconciler.run_once()

    def renew(self, held: fence.Held) -> None:
        with self.world.database.write() as transaction:
            now = fence.hold(transaction, held.attempt.lease_id, held.attempt.number)
            leases.renew(transaction, now, TTL, None)

    @contextlib.contextmanager
    def outage(self, *statements: str) -> Iterator[None]:
        """Let statements that begin with one of these words fail, as those of a lost database."""

        def fail(*arguments: Any) -> None:
            if arguments[2].startswith(statements):
                raise OperationalError(arguments[2], None, Exception("the database is away"))

        engine = self.world.database.engine
        event.listen(engine, "before_cursor_execute", fail)
        yield
        event.remove(engine, "before_cursor_execute", fail)


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


def away(setup: Setup, seconds: float) -> None:
    with setup.outage("SELECT", "UPDATE", "INSERT"):
        setup.pass_time(seconds)


def full(setup: Setup, seconds: float) -> None:
    with setup.outage("UPDATE", "INSERT"):
        setup.pass_time(seconds)


def flapping(setup: Setup, seconds: float) -> None:
    for _ in range(int(seconds / 20)):
        away(setup, 20)
        setup.pass_time(1)


def stopped(setup: Setup, seconds: float) -> None:
    setup.elapsed += seconds
    setup.world.clock.advance(seconds)


def forward(setup: Setup, _: float) -> None:
    setup.world.clock.advance(3600)


def back(setup: Setup, _: float) -> None:
    setup.world.clock.advance(-3600)


@pytest.mark.parametrize("trouble", [away, full, flapping, stopped, forward, back])
def test_after_any_trouble_a_lease_ends_one_ttl_later_unless_its_holder_renews_it(
    setup: Setup, ttl_seconds: float, trouble: Callable[[Setup, float], None]
) -> None:
    setup.pass_time(20)
    alive, gone = setup.world.running(), setup.world.running()
    setup.pass_time(10)
    trouble(setup, 3 * ttl_seconds)
    setup.pass_time(ttl_seconds - 30)
    assert setup.world.attempt(gone).status == "running", "its worker had no time to renew it"
    setup.renew(alive)
    setup.pass_time(50)
    assert setup.world.attempt(gone).status == "lost", "nothing waits until a clock catches up"
    assert setup.world.attempt(alive).status == "running"
    assert setup.world.job(alive.job.id).attempt == 1


def test_a_pass_that_finds_nothing_to_do_writes_nothing(setup: Setup) -> None:
    held = setup.world.running(keep_last=2, spec=setup.world.limited(max_seconds=1000))
    setup.world.publish(held, 2)
    setup.reconciler.run_once()  # the first one sweeps
    ends: list[str] = []
    for name in ("commit", "begin"):
        event.listen(setup.world.database.engine, name, lambda *_, name=name: ends.append(name))
    for _ in range(3):
        setup.renew(held)
        del ends[:]
        setup.pass_time(10)
        assert ends == ["begin"], "one transaction, which reads"


def test_a_job_whose_time_is_up_is_stopped_by_a_pass(setup: Setup) -> None:
    held = setup.world.running(spec=setup.world.limited(max_seconds=25))
    setup.pass_time(20)
    assert setup.world.job(held.job.id).stop_requested_at is None
    setup.renew(held)
    setup.pass_time(10)
    assert setup.world.job(held.job.id).status_detail == "stopping"


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
        folders.append(setup.root / setup.artifacts.checkpoint(held.job.id, 1, step))
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
        path = setup.root / setup.artifacts.file(name)
        path.write_bytes(b"{}")
        os.utime(path, (now - age, now - age))
    setup.reconciler.run_once()
    left = {path.name for path in setup.root.glob("files/file-*")}
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


class Claimers:
    """Eight threads that claim every job until `stop`, each time for another slot."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_over = threading.Event()
        self.claimed: list[tuple[str, int]] = []
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(8)]
        for thread in self._threads:
            thread.start()

    def _run(self, claimer: int) -> None:
        for number in itertools.count():
            held = self._world.claim(slot=f"{claimer}-{number}")
            if held is not None:
                self.claimed.append((held.job.id, held.attempt.number))
            elif self._is_over.wait(0.01):
                return

    def wait_for(self, count: int) -> None:
        """Wait until ``count`` attempts were claimed."""
        deadline = time.monotonic() + 90
        while len(self.claimed) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def steps_of(attempts: int) -> list[tuple[str, int]]:
    """Status and attempt in the events of a job whose attempts were all lost but the last."""
    steps = [("queued", 0), ("running", 1)]
    for attempt in range(2, attempts + 1):
        steps += [("queued", attempt - 1), ("running", attempt)]
    return steps


def test_reconcilers_and_claimers_at_once_claim_no_job_twice_and_end_each_lease_once(
    world: World, tmp_path: Path
) -> None:
    contend(world, tmp_path, 20)


@pytest.mark.slow  # 200 jobs, each of them twice
def test_the_same_with_200_jobs(world: World, tmp_path: Path) -> None:
    contend(world, tmp_path, 200)


def contend(world: World, folder: Path, count: int) -> None:
    """Let three reconcilers end the leases of jobs that eight threads claim."""
    setups = [Setup(world, folder / str(number), TTL.total_seconds()) for number in range(3)]
    ids = [f"ftjob-{number:04d}" for number in range(count)]
    with world.database.write() as transaction:
        for job_id in ids:
            world.store(transaction, id=job_id)

    def reconcile(setup: Setup) -> None:
        for _ in range(5):
            setup.elapsed += TTL.total_seconds() / 4
            setup.reconciler.run_once()

    claimers = Claimers(world)
    claimers.wait_for(count)
    for setup in setups:
        setup.reconciler.run_once()  # each has seen the leases now
    threads = [threading.Thread(target=reconcile, args=(setup,)) for setup in setups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    claimers.wait_for(2 * count)
    claimers.stop()
    assert len(claimers.claimed) == len(set(claimers.claimed))
    for job_id in ids:
        moves = [row.data or {} for row in world.events(job_id)]
        attempts = world.job(job_id).attempt
        assert attempts >= 2
        assert [(move["status"], move["attempt"]) for move in moves] == steps_of(attempts)


class Crash(BaseException):
    """The service is killed."""


FILES = ("model.safetensors", "resume/optimizer.safetensors", "resume/state.json")


def publish_with_files(setup: Setup, held: Held, step: int) -> Path:
    setup.world.publish(held, step)
    folder = setup.root / setup.artifacts.checkpoint(held.job.id, 1, step)
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
