"""Logs of trainers are kept for every attempt, and bounded; rows of dead slots are sent."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dar.errors import ServiceConnectionError
from dar.protocol.worker import EventRow, TrainerLog
from dar.rewards.http.redaction import Redactor
from worker.cleanup import Leftovers
from worker.folders import AttemptFolder, AttemptRecord, SlotFolder, earlier_part
from worker.spool import SpoolWriter, encode
from worker.supervisor.log_sender import LogSender, read_end
from worker.supervisor.supervisor import Supervisor

MANY = """
import os, sys
from pathlib import Path
from worker.attempt.log_file import LogFile
log = LogFile(Path(sys.argv[1]), 1000)
for number in range(200):
    print(f"line {number}", flush=True)
    os.write(2, b"e" * 10 + b"\\n")
    log.begin_anew_if_due()
"""


class Service:
    """Stands for the client of the service: takes all rows."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def until_answered(self, call: Any, what: str, **_: Any) -> Any:
        return call()

    def batch(self, lease_id: str, attempt: int, rows: Any, job_id: str) -> Any:
        self.sent.append(lease_id)
        count = len(list(rows))
        return type("Ack", (), {"acked_seq": count, "is_fenced": True})


def ended(slot: SlotFolder, lease: str) -> AttemptFolder:
    """An attempt of a dead worker, with a row that was not sent."""
    attempt = slot.attempt(lease)
    attempt.create(AttemptRecord(lease_id=lease, job_id=f"job-{lease}", attempt=2))
    writer = SpoolWriter(attempt.spool)
    writer.append(
        lambda seq, at: EventRow(type="event", seq=seq, at=at, level="info", message="said")
    )
    writer.close()
    attempt.log.write_text("said\n")
    attempt.log_of(1).write_text("said by process 1\n")
    return attempt


def test_a_log_that_grows_is_begun_anew_and_keeps_the_part_before(tmp_path: Path) -> None:
    log = AttemptFolder(tmp_path).log
    with log.open("ab") as output:
        subprocess.run(
            [sys.executable, "-c", MANY, str(log)], stdout=output, stderr=output, check=True
        )
    [(_, earlier), (_, newest)] = sorted(AttemptFolder(tmp_path).logs(), reverse=True)
    assert earlier.name == "trainer.earlier.log"
    lines = [
        int(line.split()[1])
        for line in (earlier.read_text() + newest.read_text()).splitlines()
        if line.startswith("line")
    ]
    assert lines == list(range(lines[0], 200))
    assert 1000 <= earlier.stat().st_size < 1100
    assert newest.stat().st_size < 1100
    assert newest.stat().st_mode & 0o077 == 0


def test_what_is_shown_of_a_log_is_its_end_without_secrets(tmp_path: Path) -> None:
    folder = AttemptFolder(tmp_path)
    assert read_end(folder, 100) == (b"", 0)
    earlier_part(folder.log).write_bytes(b"first\nsecond\n")
    folder.log.write_bytes(b"third whsec_abcdefgh\n\xff\0\n")
    assert read_end(folder, 32)[0].startswith(b"second\nthird")
    assert read_end(folder, 5)[0] == b"\xff\0\n"
    sent: list[TrainerLog] = []

    class Client:
        def put_log(self, lease_id: str, log: TrainerLog) -> None:
            sent.append(TrainerLog.model_validate_json(encode(log)))
            if len(sent) == 1:
                raise ServiceConnectionError("the service is away")

    client: Any = Client()
    record = AttemptRecord(lease_id="lease", job_id="job", attempt=1)
    sender = LogSender(folder, client, record, Redactor(["whsec_abcdefgh"]))
    for _ in range(3):
        sender.finish()
        sender.run()
    assert len(sent) == 2, "that failed once, and is the same then"
    assert sent[1].text == "first\nsecond\nthird [redacted]\n\ufffd\ufffd\n"
    assert sent[1].bytes == 13 + 24


def test_kept_logs_are_bounded_by_size_and_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = SlotFolder.of(tmp_path, "0")

    def keep(number: int, size: int, most_bytes: int) -> list[str]:
        attempt = slot.attempt(f"lease-{number}")
        attempt.create(AttemptRecord(lease_id=f"lease-{number}", job_id="job", attempt=number))
        attempt.log.write_bytes(b"x" * size)
        os.utime(attempt.log, (number, number))
        record = attempt.read_record()
        assert record is not None
        slot.keep_logs(attempt, record, most_bytes)
        return sorted(path.name for path in slot.logs.iterdir())

    assert keep(1, 600, 1000) == ["job-1.log"]
    assert keep(2, 500, 1000) == ["job-2.log"]
    assert keep(3, 400, 1000) == ["job-2.log", "job-3.log"]
    assert keep(4, 5000, 1000) == ["job-4.log"]
    monkeypatch.setattr("worker.folders.LOGS_KEPT", 2)
    keep(5, 1, 10_000)
    assert keep(6, 1, 10_000) == ["job-5.log", "job-6.log"]


def test_a_log_that_vanishes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = SlotFolder.of(tmp_path, "0")
    attempt, record = slot.attempt("lease"), AttemptRecord(lease_id="l", job_id="job", attempt=1)
    attempt.create(record)
    attempt.log.write_text("said\n")
    logs = [("-1", attempt.log_of(1)), ("", attempt.log)]
    monkeypatch.setattr(AttemptFolder, "logs", lambda _: logs)
    (slot.logs / "gone.log").symlink_to(tmp_path / "nowhere")
    slot.keep_logs(attempt, record, 1000)
    assert (slot.logs / "job-1.log").read_text() == "said\n"


def test_an_attempt_frees_its_folder_even_if_that_cannot_be_tidied(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(SlotFolder, "keep_logs", fail)
    supervisor._state.lost.set()  # it ends at once, without a report
    with pytest.raises(OSError, match="Input/output error"):
        supervisor.run()
    with supervisor._folder.held() as is_free:
        assert is_free


def test_rows_and_logs_of_dead_workers_of_the_host_are_taken_care_of(tmp_path: Path) -> None:
    mine, other = SlotFolder.of(tmp_path, "0"), SlotFolder.of(tmp_path, "gone")
    own, dead, alive = ended(mine, "own"), ended(other, "dead"), ended(other, "alive")
    of_an_earlier_version = ended(other, "old")
    for attempt in (dead, alive):
        attempt.lock.touch()
    service: Any = Service()
    leftovers = Leftovers(mine, service, lambda: None, 0.01, 2**20)
    with alive.held() as is_held:
        assert is_held
        leftovers.sweep()
    assert service.sent == ["own", "dead"]
    assert not own.path.exists()
    assert other.all_attempts() == [alive, of_an_earlier_version]
    names = sorted(path.name for path in mine.logs.iterdir())
    assert names == ["job-dead-2-1.log", "job-dead-2.log", "job-own-2-1.log", "job-own-2.log"]
    leftovers.sweep()
    assert service.sent == ["own", "dead", "alive"]
