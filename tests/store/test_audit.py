"""The auditor: it finds nothing in a sound installation, and names whatever is broken in one."""

import hashlib
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import delete, update

from dar.errors import ConfigurationError
from dar.protocol.checkpoints import MANIFEST_NAME
from dar.protocol.worker import Complete, MetricsRow
from fakes.world import World
from service.artifacts import Artifacts
from service.audit import RULES, Acknowledged, Report, audit, lines, read_acknowledged
from service.storage.folder import FolderStorage
from service.store import checkpoints, deletion, fence, outcomes, rows
from service.store.database import Transaction
from service.store.fence import Held
from service.store.tables import (
    AttemptRow,
    CheckpointRow,
    JobEventRow,
    JobRow,
    MetricRow,
    SpoolRow,
)

STEPS = 2


class Sound:
    """An installation with a job that was lost once, and succeeded."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.root = world, folder
        self.artifacts = Artifacts(FolderStorage(folder))
        self.artifacts.storage.prepare()
        first = world.running(total_steps=STEPS)
        self.job_id = first.job.id
        with world.database.write() as transaction:
            held = fence.lock(transaction, first.attempt.lease_id)
            outcomes.lose(transaction, held, "the worker is gone")
        world.clock.advance(1)
        second = world.claim()
        assert second is not None
        self.send(second)
        self.checkpoint = self.publish(second)
        with world.database.write() as transaction:
            said = Complete(attempt=2, checkpoint_id=self.checkpoint.id, last_seq=STEPS)
            outcomes.end(transaction, second.attempt.lease_id, said)

    def send(self, held: Held) -> None:
        with self.world.database.write() as transaction:
            now = fence.hold(transaction, held.attempt.lease_id, held.attempt.number)
            sent = [
                MetricsRow(type="metrics", seq=step, step=step, at=0.0, values={"dar/loss": 1.0})
                for step in range(1, STEPS + 1)
            ]
            assert rows.add(transaction, now, sent) == STEPS

    def publish(self, held: Held) -> CheckpointRow:
        content = b"abc"
        file = {
            "name": "model.safetensors",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        manifest = self.world.manifest(STEPS, files=[file])
        text = manifest.model_dump_json().encode()
        self.folder = self.root / self.artifacts.checkpoint(self.job_id, held.attempt.number, STEPS)
        self.folder.mkdir(parents=True)
        (self.folder / "model.safetensors").write_bytes(content)
        (self.folder / MANIFEST_NAME).write_bytes(text)
        with self.world.database.write() as transaction:
            now = fence.hold(transaction, held.attempt.lease_id, held.attempt.number)
            digest = hashlib.sha256(text).hexdigest()
            made = checkpoints.register(transaction, now.job, now.attempt, manifest, digest)
            checkpoints.publish(transaction, now.job, made, manifest_bytes=len(text))
        return made

    def audit(self, *acknowledged: Acknowledged) -> Report:
        return audit(self.world.database, self.artifacts, acknowledged, is_quiet=True)


@pytest.fixture
def sound(world: World, tmp_path: Path) -> Sound:
    return Sound(world, tmp_path / "artifacts")


def _change_status(transaction: Transaction, seq: int, status: str) -> None:
    event = transaction.query(JobEventRow).filter_by(seq=seq).one()
    event.data = {**(event.data or {}), "status": status}


def _lose_rows(transaction: Transaction) -> None:
    transaction.execute(delete(SpoolRow).where(SpoolRow.seq == 1))
    transaction.execute(update(AttemptRow).values(acked_seq=9))


DAMAGES: dict[str, tuple[str, Callable[[Transaction], object]]] = {
    "the checkpoint of its result is not available": (
        "ended",
        lambda it: it.execute(update(CheckpointRow).values(status="pending")),
    ),
    "succeeded with attempt 2, not [1, 2]": (
        "ended",
        lambda it: it.execute(update(AttemptRow).values(status="succeeded")),
    ),
    "its running attempts are []": (
        "ended",
        lambda it: it.execute(update(JobRow).values(status="running", finished_at=None)),
    ),
    "attempt 2 runs": (
        "ended",
        lambda it: it.execute(
            update(AttemptRow).where(AttemptRow.number == 2).values(status="running")
        ),
    ),
    "attempt 2 began before attempt 1 had ended": (
        "attempts",
        lambda it: it.execute(
            update(AttemptRow).where(AttemptRow.number == 1).values(ended_at=None)
        ),
    ),
    "the last one is 3": ("attempts", lambda it: it.execute(update(JobRow).values(attempt=3))),
    "attempt 2 has 1 rows from 2 to 2, and acknowledged 9": ("rows", _lose_rows),
    "1 steps have no metrics; the first is 1": (
        "rows",
        lambda it: it.execute(delete(MetricRow).where(MetricRow.step == 1)),
    ),
    "metrics of step 4000": (
        "rows",
        lambda it: it.execute(update(MetricRow).where(MetricRow.step == 2).values(step=4000)),
    ),
    "have gaps": (
        "events",
        lambda it: it.execute(delete(JobEventRow).where(JobEventRow.seq == 3)),
    ),
    "from paused to running, which no move allows": (
        "events",
        lambda it: _change_status(it, 1, "paused"),
    ),
    "its events end with failed": ("events", lambda it: _change_status(it, 8, "failed")),
}
"""What the auditor says -> its rule, and the damage."""


def test_a_sound_installation_has_no_finding(sound: Sound) -> None:
    report = sound.audit(Acknowledged(sound.job_id, "a"), Acknowledged(sound.job_id, "a"))
    assert report.findings == []
    assert (report.jobs, report.attempts, report.checkpoints) == (1, 2, 1)
    assert [line.split(":")[0] for line in lines(report)[1:]] == [
        f"ok     {rule}" for rule in RULES
    ]


SOUND: dict[str, dict[str, object]] = {
    "set aside": {"damage": "it is gone", "damaged_at": datetime.now(UTC)},
    "being deleted": {"status": "deleting"},
    "deleted": {"status": "deleted"},
}
"""What may become of the result of a job -> the columns of its checkpoint."""


@pytest.mark.parametrize("dialect", ["sqlite"])
@pytest.mark.parametrize("what", [*SOUND, "of an earlier version", "of a deleted job"])
def test_what_users_and_the_service_do_to_a_result_is_no_finding(sound: Sound, what: str) -> None:
    with sound.world.database.write() as transaction:
        if what == "of an earlier version":
            transaction.execute(update(JobRow).values(result_checkpoint_id=None))
        elif what == "of a deleted job":
            deletion.mark_job(transaction, sound.world.project_id, sound.job_id)
            transaction.execute(delete(MetricRow).where(MetricRow.step == 1))
        else:
            transaction.execute(update(CheckpointRow).values(SOUND[what]))
    assert sound.audit(Acknowledged(sound.job_id, "a")).findings == []


@pytest.mark.parametrize("dialect", ["sqlite"])
@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_database_is_a_finding_of_its_rule_and_job(sound: Sound, said: str) -> None:
    rule, damage = DAMAGES[said]
    with sound.world.database.write() as transaction:
        damage(transaction)
        transaction.flush()
    found = sound.audit().findings
    assert any(one.rule == rule and said in one.message for one in found), found
    assert {one.job_id for one in found} == {sound.job_id}


@pytest.mark.parametrize("dialect", ["sqlite"])
def test_files_that_differ_from_their_manifest_are_findings(sound: Sound) -> None:
    weights = sound.folder / "model.safetensors"

    def found() -> list[str]:
        findings = sound.audit().findings
        assert {(one.rule, one.job_id) for one in findings} <= {("checkpoints", sound.job_id)}
        return [one.message.partition(": ")[2] for one in findings]

    weights.write_bytes(b"abd")
    assert found() == ["model.safetensors was altered"]
    quick = audit(sound.world.database, sound.artifacts, is_hashing=False)
    assert quick.findings == [], "without hashes only sizes count"
    weights.write_bytes(b"ab")
    assert found() == ["model.safetensors has 2 of 3 bytes"]
    weights.unlink()
    assert found() == ["model.safetensors is missing"]
    weights.write_bytes(b"abc")
    (sound.folder / "extra").touch()
    assert found() == ["extra does not belong to it"]
    (sound.folder / "extra").unlink()
    orphan = sound.root / sound.artifacts.checkpoint(sound.job_id, 7, 1)
    orphan.mkdir(parents=True)
    assert found() == [], "an upload may be in progress"
    os.utime(orphan, (0, 0))
    assert sound.audit().findings[0].message == f"{orphan} belongs to no checkpoint"


@pytest.mark.parametrize("dialect", ["sqlite"])
def test_acknowledged_submissions_that_are_gone_or_double_are_findings(
    sound: Sound, tmp_path: Path
) -> None:
    file = tmp_path / "acknowledged.jsonl"
    pairs = [(sound.job_id, "a"), ("ftjob-gone", "b"), ("ftjob-gone", "a")]
    file.write_text("".join(json.dumps({"job_id": job, "key": key}) + "\n" for job, key in pairs))
    said = [one.message for one in sound.audit(*read_acknowledged(file)).findings]
    assert said == [
        f"the submission 'a' made several jobs: {', '.join(sorted(['ftjob-gone', sound.job_id]))}",
        "it was acknowledged and is gone",
    ]
    for wrong in ("[]", "{", '{"job": 1}', '"x"'):
        file.write_text(f"\n{wrong}\n")
        with pytest.raises(ConfigurationError, match="line 2 of"):
            read_acknowledged(file)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_acknowledged(tmp_path)
