"""A database with a project, and short names for what tests do in it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from dar.protocol.checkpoints import Manifest
from dar.protocol.worker import Claim, WorkerReport
from service.store import checkpoints, fence, jobs, keys, leases, tables
from service.store.best_checkpoint import Standing
from service.store.database import Database, Transaction

TTL = timedelta(seconds=60)


class FakeClock:
    """A database clock that a test moves."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def _spec(steps: int) -> dict[str, Any]:
    component = {"name": "letters", "url": "http://127.0.0.1:9/score"}
    return {
        "model": "base",
        "training_file": "file-1",
        "method": {
            "type": "dar",
            "dar": {
                "hyperparameters": {"max_steps": steps},
                "rewards": {"components": [component]},
            },
        },
    }


@dataclass
class World:
    """A database with a project, and short names for what tests do in it."""

    database: Database
    clock: FakeClock
    project_id: str = ""
    _count: int = field(default=0)

    def __post_init__(self) -> None:
        with self.database.write() as transaction:
            self.project_id = keys.default_project(transaction)

    def submit(self, **values: Any) -> str:
        """A queued job; each is a second younger than the one before."""
        self._count += 1
        self.clock.advance(1)
        job_id: str = values.pop("id", f"ftjob-{self._count:04d}")
        with self.database.write() as transaction:
            self.store(transaction, id=job_id, **values)
        return job_id

    def limited(self, **limits: object) -> dict[str, Any]:
        """The spec of a job with limits."""
        spec = _spec(10)
        spec["method"]["dar"]["limits"] = limits
        return spec

    def store(self, transaction: Transaction, **values: Any) -> None:
        """Store a queued job in a transaction."""
        job_id = values.pop("id")
        steps = values.pop("total_steps", 10)
        row = {
            "id": job_id,
            "project_id": self.project_id,
            "api_key_id": "key-1",
            "created_at": self.clock.now,
            "status": "queued",
            "model": "base",
            "model_source": {},
            "model_name": f"ft-base-{job_id}",
            "training_file": "file-1",
            "spec": _spec(steps),
            "seed": 1,
            "total_steps": steps,
            "keep_last": 2,
            "not_before": self.clock.now,
            "body_sha256": "0" * 64,
            "retry_count": 0,
            **values,
        }
        jobs.submit(transaction, tables.JobRow(**row), [])

    def claim(self, slot: str = "0", **values: Any) -> fence.Held | None:
        self._count += 1
        asks = {"node": "node-1", "incarnation": "life-1", "boot_id": "boot-1"} | values
        credential = leases.Credential(f"lease-{self._count:04d}-{slot}", "0" * 64)
        with self.database.write() as transaction:
            return leases.claim(transaction, Claim(slot=slot, **asks), credential, TTL)

    def report(self, machine: str = "machine-1", **values: Any) -> WorkerReport:
        """What a worker reports that is well."""
        usual = {
            "version": "1",
            "devices": [],
            "disk_free": 10**12,
            "disk_total": 10**12,
            "memory_free": None,
            "interval_seconds": 10.0,
        }
        return WorkerReport.model_validate({"machine": machine, **usual, **values})

    def running(self, **values: Any) -> fence.Held:
        """A job that was submitted and claimed."""
        job_id = self.submit(**values)
        held = self.claim(slot=f"slot-of-{job_id}")
        assert held is not None
        assert held.job.id == job_id
        return held

    def job(self, job_id: str) -> tables.JobRow:
        with self.database.read() as transaction:
            return jobs.get(transaction, self.project_id, job_id)

    def attempt(self, held: fence.Held) -> tables.AttemptRow:
        with self.database.read() as transaction:
            return fence.find(transaction, held.attempt.lease_id)

    def events(self, job_id: str) -> list[tables.JobEventRow]:
        with self.database.read() as transaction:
            query = transaction.query(tables.JobEventRow).filter_by(job_id=job_id)
            return query.order_by(tables.JobEventRow.seq).all()

    def manifest(self, step: int, **values: Any) -> Manifest:
        file = {"name": "model.safetensors", "bytes": 3, "sha256": "1" * 64}
        body = {"step": step, "kind": "full", "config_sha256": "2" * 64, "files": [file]}
        return Manifest.model_validate(body | values)

    def publish(
        self, held: fence.Held, step: int, standing: Standing = checkpoints.UNMEASURED
    ) -> tables.CheckpointRow:
        """An available checkpoint of the attempt."""
        with self.database.write() as transaction:
            now = fence.hold(transaction, held.attempt.lease_id, held.attempt.number)
            made = checkpoints.register(
                transaction, now.job, now.attempt, self.manifest(step), f"{step:064x}"
            )
            checkpoints.publish(transaction, now.job, made, 1, standing)
        return made
