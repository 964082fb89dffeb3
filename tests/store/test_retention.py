"""Old rows go in small steps, which a crash only delays; the database stays bounded."""

import contextlib
import hashlib
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, update

from dar.errors import ConflictError
from dar.protocol.checkpoints import MANIFEST_NAME
from dar.protocol.worker import Batch
from dar.settings import Settings
from fakes.world import World
from service.artifacts import Artifacts
from service.audit import audit
from service.background.notifier import Notifier
from service.background.reconciler import Reconciler
from service.background.retention import Retention
from service.background.waker import Waker
from service.storage.folder import FolderStorage
from service.store import checkpoints, deletion, fence, retention, rows
from service.store.tables import (
    AttemptRow,
    CheckpointRow,
    JobEventRow,
    JobRow,
    MetricRow,
    SampleRow,
    SpoolRow,
)

SAMPLE_BYTES = len('{"a":"é"}'.encode())


class Setup:
    """A retention with settings of a test."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.root = world, folder / "artifacts"
        self.artifacts = Artifacts(FolderStorage(self.root))
        self.artifacts.storage.prepare()
        self._home = folder

    def retention(self, **settings: Any) -> Retention:
        chosen = Settings(home=self._home, **settings)
        return Retention(self.world.database, self.artifacts, chosen, breath_seconds=0)

    def counts(self) -> dict[str, int]:
        with self.world.database.read() as transaction:
            return dict(retention.row_counts(transaction))

    def end(self, job_id: str, *, days_ago: float = 0) -> None:
        at = self.world.clock.now - timedelta(days=days_ago)
        with self.world.database.write() as transaction:
            values = {"status": "succeeded", "finished_at": at, "created_at": at}
            transaction.execute(update(JobRow).where(JobRow.id == job_id).values(values))
            transaction.execute(
                update(AttemptRow)
                .where(AttemptRow.job_id == job_id)
                .values(status="succeeded", ended_at=at)
            )

    def fill(
        self, *job_ids: str, rows: int = 3, rewards: tuple[float | None, ...] = (0.5,)
    ) -> None:
        """Rows of all kinds, and a sample for each reward and step."""
        now = self.world.clock.now
        tables: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for job_id, number in itertools.product(job_ids, range(1, rows + 1)):
            same = {"job_id": job_id, "seq": 100 + number}
            event = {"id": f"event-{job_id}-{number}", "created_at": now, "level": "info"}
            event |= {"type": "message", "message": "m", "data": None}
            tables[JobEventRow].append(same | event)
            tables[SpoolRow].append(same | {"attempt": 1, "digest": b"0" * 16})
            metrics = {"attempt": 1, "step": number, "at": 1.0, "values_json": "{}"}
            tables[MetricRow].append(same | metrics)
            sample = {"job_id": job_id, "attempt": 1, "step": number, "created_at": now}
            sample |= {"advantage": None, "body": {"a": "é"}}
            tables[SampleRow] += [sample | {"reward": reward} for reward in rewards]
        with self.world.database.write() as transaction:
            for table, values in tables.items():
                transaction.execute(insert(table), values)
            size = rows * len(rewards) * SAMPLE_BYTES
            changed = {"samples_bytes": JobRow.samples_bytes + size}
            transaction.execute(update(JobRow).where(JobRow.id.in_(job_ids)).values(changed))


@pytest.fixture
def setup(world: World, tmp_path: Path) -> Setup:
    return Setup(world, tmp_path)


def test_rows_go_by_the_age_of_their_job_alone(setup: Setup) -> None:
    old, young = (setup.world.running().job.id for _ in range(2))
    running = setup.world.running().job.id
    setup.fill(old, young, running)
    setup.end(old, days_ago=91)
    setup.end(young, days_ago=89)
    before = setup.counts()
    setup.retention().run_once()
    gone = {name: before[name] - count for name, count in setup.counts().items()}
    # The old job has three events of its own: it was submitted and claimed.
    expected = {"job_events": 5, "samples": 3, "spool_rows": 6}
    assert {name: count for name, count in gone.items() if count} == expected
    with setup.world.database.read() as transaction:
        jobs = {job.id: job for job in transaction.query(JobRow)}
    assert jobs[old].samples_bytes == 0
    assert jobs[young].samples_bytes == jobs[running].samples_bytes > 0
    setup.retention(metrics_kept_days=90, events_kept_days=0).run_once()
    assert setup.counts()["metric_rows"] == before["metric_rows"] - 3


def test_jobs_and_keys_go_by_age_if_the_settings_say_so(setup: Setup) -> None:
    old = setup.world.running(idempotency_key="k").job.id
    setup.fill(old)
    setup.end(old, days_ago=31)
    setup.retention().run_once()
    assert setup.world.job(old).idempotency_key is None
    setup.world.submit()
    setup.retention(jobs_kept_days=30).run_once()
    left = {name: count for name, count in setup.counts().items() if count}
    assert left == {"jobs": 1, "job_events": 1}


def test_a_job_with_a_pinned_checkpoint_stays_until_that_is_unpinned(setup: Setup) -> None:
    held = setup.world.running()
    made, job_id = setup.world.publish(held, 2), held.job.id
    setup.end(job_id, days_ago=31)
    settings = Settings(jobs_kept_days=30)
    for is_pinned, count in ((True, 0), (False, 1)):
        with setup.world.database.write() as transaction:
            checkpoints.pin(transaction, made, is_pinned=is_pinned)
            goes = {one.what: one.rows for one in retention.surpluses(transaction, settings)}
            assert len(retention.old_jobs(transaction, settings)) == goes["jobs"] == count
            if is_pinned:
                with pytest.raises(ConflictError, match="is pinned; unpin it first"):
                    deletion.mark_job(transaction, setup.world.project_id, job_id)
        setup.retention(jobs_kept_days=30).run_once()
        assert setup.counts()["jobs"] == 1 - count


def test_the_oldest_samples_go_first_and_the_best_and_worst_of_a_step_last(setup: Setup) -> None:
    first, second = (setup.world.running().job.id for _ in range(2))
    setup.fill(first, rows=2, rewards=(0.1, None, 0.5, 0.9, 0.9))
    setup.fill(second, rows=1, rewards=(0.2, 0.3, 0.4))

    def kept(most: int) -> list[tuple[str, int, float | None]]:
        setup.retention(samples_bytes=most).run_once()
        with setup.world.database.read() as transaction:
            rows = transaction.query(SampleRow).order_by(SampleRow.id)
            return [(row.job_id, row.step, row.reward) for row in rows]

    size = SAMPLE_BYTES
    whole = kept(13 * size)
    assert len(whole) == 13
    assert kept(13 * size - 1) == [one for one in whole if one != (first, 1, None)]
    extremes = [(first, 1, 0.1), (first, 1, 0.9), (first, 2, 0.1), (first, 2, 0.9)]
    extremes += [(second, 1, 0.2), (second, 1, 0.4)]
    assert kept(6 * size) == extremes
    assert kept(2 * size) == extremes[-2:]
    assert sum(setup.world.job(job_id).samples_bytes for job_id in (first, second)) == 2 * size


def test_the_samples_of_one_large_job_are_thinned_and_an_event_says_so(setup: Setup) -> None:
    large, small = (setup.world.running().job.id for _ in range(2))
    setup.fill(large, rows=2, rewards=(0.1, None, 0.5, 0.9))
    setup.fill(small, rows=1, rewards=(0.2, 0.3, 0.4))

    def kept(most: int) -> list[tuple[str, int, float | None]]:
        setup.retention(job_samples_bytes=most).run_once()
        with setup.world.database.read() as transaction:
            rows = transaction.query(SampleRow).order_by(SampleRow.id)
            return [(row.job_id, row.step, row.reward) for row in rows]

    def told() -> list[Any]:
        found = [event.data for event in setup.world.events(large) if event.data is not None]
        return [data["count"] for data in found if data.get("kind") == "samples_thinned"]

    size = SAMPLE_BYTES
    whole = kept(8 * size)
    assert (len(whole), told()) == (11, [])
    others = [(small, 1, 0.2), (small, 1, 0.3), (small, 1, 0.4)]
    extremes = [(large, 1, 0.1), (large, 1, 0.9), (large, 2, 0.1), (large, 2, 0.9)]
    assert kept(4 * size) == extremes + others
    assert kept(3 * size) == extremes[1:] + others
    assert kept(3 * size) == extremes[1:] + others
    assert told() == [4, 1]
    assert setup.world.job(large).samples_bytes == 3 * size


@pytest.mark.parametrize("at", range(1, 7))
def test_a_crash_amid_a_deletion_leaves_nothing_behind(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    held = setup.world.running()
    job_id = held.job.id
    made = [setup.world.publish(held, step) for step in (2, 4)]
    folders = [setup.root / setup.artifacts.checkpoint(job_id, 1, one.step) for one in made]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"abc")
    setup.fill(job_id)
    setup.end(job_id)
    with setup.world.database.write() as transaction:
        deletion.mark_job(transaction, setup.world.project_id, job_id)
    calls = 0

    def crash_before(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError("the power failed")
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(retention, "CHUNK", 2)
        artifacts, remove = setup.artifacts, setup.artifacts.remove_checkpoint
        patch.setattr(artifacts, "remove_checkpoint", crash_before(remove))
        patch.setattr(retention, "purge", crash_before(retention.purge))
        with pytest.raises(OSError, match="power"):
            setup.retention().run_once()
        with setup.world.database.read() as transaction:
            for row in transaction.query(CheckpointRow):
                assert row.status in {"deleting", "deleted"}
    setup.retention().run_once()
    assert not any(setup.counts().values())
    assert not (setup.root / "checkpoints" / job_id).exists()


class PowerFailureError(BaseException):
    """Nothing catches it, so a pass ends there."""


class Trainer:
    """Publishes a checkpoint for each step of a job, with rows and files, without any pause."""

    def __init__(self, setup: Setup, *, steps: int, keep_last: int) -> None:
        self.setup, self.steps = setup, steps
        self.held = setup.world.running(total_steps=steps, keep_last=keep_last)
        self.job_id = self.held.job.id

    def run(self) -> None:
        for step in range(1, self.steps + 1):
            content = f"{self.job_id} step {step}".encode()
            sha256 = hashlib.sha256(content).hexdigest()
            file = {"name": "model.safetensors", "bytes": len(content), "sha256": sha256}
            manifest = self.setup.world.manifest(step, files=[file], last_seq=step)
            text = manifest.model_dump_json().encode()
            said = {"type": "metrics", "seq": step, "at": 1.0, "step": step, "values": {}}
            batch = Batch.model_validate({"attempt": 1, "rows": [said]})
            lease_id = self.held.attempt.lease_id
            with self.setup.world.database.write() as transaction:
                held = fence.hold(transaction, lease_id, 1)
                rows.add(transaction, held, batch.rows)
                digest = hashlib.sha256(text).hexdigest()
                made = checkpoints.register(transaction, held.job, held.attempt, manifest, digest)
            folder = self.setup.root / self.setup.artifacts.checkpoint(self.job_id, 1, step)
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(content)
            (folder / MANIFEST_NAME).write_bytes(text)
            with self.setup.world.database.write() as transaction:
                held = fence.hold(transaction, lease_id, 1)
                checkpoints.publish(transaction, held.job, made, manifest_bytes=len(text))
            self.check_newest()

    def check_newest(self) -> None:
        """What the next attempt would resume from is whole."""
        with self.setup.world.database.read() as transaction:
            newest = checkpoints.newest(transaction, self.job_id)
        assert newest is not None
        folder = self.setup.artifacts.checkpoint(self.job_id, 1, newest.step)
        found = self.setup.artifacts.damage_of(
            folder, checkpoints.files_of(newest), take=lambda _: None
        )
        assert found is None, found


def test_checkpoints_go_under_load_and_amid_crashes_and_never_the_newest(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, ttl_seconds: float
) -> None:
    trainers = [Trainer(setup, steps=8, keep_last=keep) for keep in (1, 1, 2)]
    crashes, instants = itertools.count(), itertools.cycle(range(4))
    remove = setup.artifacts.remove_checkpoint

    def remove_or_crash(job_id: str, attempt: int, step: int) -> None:
        """Crash before, amid and after the removal of the files, or not at all."""
        instant = next(instants)
        if instant == 1:
            folder = setup.root / setup.artifacts.checkpoint(job_id, attempt, step)
            (folder / "model.safetensors").unlink(missing_ok=True)
        elif instant != 0:
            remove(job_id, attempt, step)
        if instant != 3:
            next(crashes)
            raise PowerFailureError

    monkeypatch.setattr(setup.artifacts, "remove_checkpoint", remove_or_crash)

    def service() -> Reconciler:
        database, artifacts = setup.world.database, setup.artifacts
        made = Waker(None), Notifier(database)
        return Reconciler(database, artifacts, *made, ttl_seconds=ttl_seconds, pause_seconds=1)

    with ThreadPoolExecutor(len(trainers)) as pool:
        running = [pool.submit(trainer.run) for trainer in trainers]
        is_quiet = False
        while not is_quiet:
            is_last = all(one.done() for one in running)
            with contextlib.suppress(PowerFailureError):
                service().run_once()
                is_quiet = is_last
        for one in running:
            one.result()
    assert next(crashes) > 10
    assert audit(setup.world.database, setup.artifacts).findings == []
    for trainer, keep in zip(trainers, (1, 1, 2), strict=True):
        trainer.check_newest()
        folders = (setup.root / "checkpoints" / trainer.job_id / "attempt-1").iterdir()
        expected = {f"step-{step}" for step in range(9 - keep, 9)}
        assert {folder.name for folder in folders} == expected


@pytest.mark.slow  # 10,000 jobs
@pytest.mark.timeout(900)  # PostgreSQL takes three minutes on two busy cores
def test_ten_thousand_jobs_leave_a_bounded_database(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    old = setup.world.clock.now - timedelta(days=100)
    jobs = [f"ftjob-{number:05}" for number in range(10_000)]
    template = setup.world.job(setup.world.submit(id="ftjob-template"))
    columns = [column.name for column in JobRow.__table__.columns]
    with setup.world.database.write() as transaction:
        values = {name: getattr(template, name) for name in columns if name != "metadata"}
        ended = {"status": "succeeded", "finished_at": old, "created_at": old}
        rows = [
            values | ended | {"id": name, "model_name": name, "idempotency_key": name}
            for name in jobs
        ]
        transaction.execute(insert(JobRow), rows)
    setup.fill(*jobs, rows=5, rewards=(0.1, 0.5))
    before, start = setup.counts(), time.monotonic()
    setup.retention(metrics_kept_days=90).run_once()
    after, seconds = setup.counts(), time.monotonic() - start
    start = time.monotonic()
    setup.retention(jobs_kept_days=90).run_once()
    seconds_of_jobs = time.monotonic() - start
    with capsys.disabled():
        for name, count in before.items():
            left = setup.counts()[name]
            sys.stdout.write(f"\n{name:20} {count:8,} -> {after[name]:8,} -> {left:8,}")
        sys.stdout.write(f"\nby age in {seconds:.1f} s, whole jobs in {seconds_of_jobs:.1f} s\n")
    assert after["job_events"] == 1
    assert not any(after[name] for name in ("samples", "metric_rows"))
    assert setup.counts()["jobs"] == 1
