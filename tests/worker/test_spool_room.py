"""A spool that the service does not take keeps all metrics and stays within its limit."""

import threading
import time
from pathlib import Path

import orjson
import pytest

from dar.protocol.samples import ReportedSample
from worker.attempt.spool_sink import SpoolSink
from worker.folders import AttemptFolder
from worker.spool import SpooledRow, SpoolReader, SpoolRoom

LIMIT = 2 * 1024**2


@pytest.fixture(autouse=True)
def measured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.spool.MEASURE_SECONDS", 0.0)
    monkeypatch.setattr("worker.attempt.spool_sink.LOOK_SECONDS", 0.01)


def samples(length: int) -> list[ReportedSample]:
    return [
        ReportedSample(
            group=0,
            index=number,
            prompt="p",
            completion="x" * length,
            finish_reason="stop",
            completion_tokens=1,
            reward=None if number == 0 else float(number % 5),
            reward_status="reward",
            advantage=None,
            weight=None,
            logp_policy=None,
            logp_ref=None,
            logp_behavior=0.0,
        )
        for number in range(8)
    ]


def drain(folder: AttemptFolder) -> list[SpooledRow]:
    reader, found = SpoolReader(folder.spool), []
    while rows := reader.read():
        found += rows
        reader.ack(rows[-1].seq)
    return found


def test_a_spool_that_fills_thins_samples_then_stops_training_and_loses_no_metric(
    tmp_path: Path,
) -> None:
    folder = AttemptFolder(tmp_path)
    stop, hold, steps = threading.Event(), threading.Event(), 0
    sink = SpoolSink(folder, limit_bytes=LIMIT, is_stopping=stop.is_set)

    def train() -> None:
        nonlocal steps
        for step in range(1, 400):
            while hold.is_set():
                time.sleep(0.01)
            sink.phase("training", step - 1)
            sink.metrics(step, {"dar/loss": 1.0})
            steps = step
            sink.samples(step, samples(2000))
            if stop.is_set():
                return

    trainer = threading.Thread(target=train)
    trainer.start()
    room = SpoolRoom(folder.spool, LIMIT)
    until = time.monotonic() + 20
    while "training waits" not in _message(folder):
        assert time.monotonic() < until
        time.sleep(0.01)
    waiting_at = steps
    time.sleep(0.1)
    assert steps == waiting_at
    assert room.is_full()
    assert sum(path.stat().st_size for path in folder.spool.glob("*.jsonl")) < LIMIT * 1.05
    hold.set()
    read = drain(folder)  # the service is back
    while steps == waiting_at:
        time.sleep(0.01)
    read += drain(folder)
    hold.clear()
    while steps < waiting_at + 20:
        assert time.monotonic() < until
        time.sleep(0.01)
    stop.set()
    trainer.join()
    sink.close()
    read += drain(folder)
    assert [row.seq for row in read] == list(range(1, len(read) + 1))
    rows = [orjson.loads(row.payload) for row in read]
    assert [row["step"] for row in rows if row["type"] == "metrics"] == list(range(1, steps + 1))
    kept = {row["step"]: row["samples"] for row in rows if row["type"] == "samples"}
    counts = [len(kept[step]) for step in sorted(kept)]
    assert (counts[0], counts[waiting_at - 2], counts[-1]) == (8, 2, 8)
    assert [sample["reward"] for sample in kept[waiting_at - 1]] == [4.0, 0.0]
    thinned, recovered = [row for row in rows if row["type"] == "event"]
    assert (thinned["level"], thinned["data"]["kind"]) == ("warn", "spool_thinned")
    assert counts[thinned["step"] - 2 : thinned["step"]] == [8, 2]
    left_out = sum(8 - count for count in counts)
    assert f"{left_out} were not" in recovered["message"]
    assert _message(folder) == ""


def _message(folder: AttemptFolder) -> str:
    if not folder.progress.exists():
        return ""
    return orjson.loads(folder.progress.read_bytes())["message"] or ""


def test_a_trainer_that_waits_for_room_still_heeds_an_order(tmp_path: Path) -> None:
    stop = threading.Event()
    folder = AttemptFolder(tmp_path)
    sink = SpoolSink(folder, limit_bytes=1024**2, is_stopping=stop.is_set)
    for step in range(1, 100):
        sink.samples(step, samples(2000))
    while not SpoolRoom(folder.spool, 1024**2).is_full():
        sink.event("info", "x" * 4000)
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    sink.metrics(100, {"dar/loss": 1.0})
    assert stop.is_set()
    sink.close()
    assert orjson.loads(drain(folder)[-1].payload)["step"] == 100


def test_an_event_names_the_step_that_is_being_done(tmp_path: Path) -> None:
    folder = AttemptFolder(tmp_path)
    sink = SpoolSink(folder, 4)
    sink.event("info", "begin")
    sink.phase("sampling", 2)
    sink.event("info", "amid step 3")
    sink.metrics(3, {"dar/loss": 1.0})
    sink.phase("checkpointing", 3)
    sink.event("info", "after step 3")
    sink.phase("training", 4)
    sink.event("info", "after the last")
    sink.close()
    rows = [orjson.loads(row.payload) for row in drain(folder)]
    assert [row["step"] for row in rows if row["type"] == "event"] == [0, 3, 3, 4]
