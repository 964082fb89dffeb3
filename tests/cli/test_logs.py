"""Logs of ``dar up`` are rotated while their processes write."""

import sys
import time
from pathlib import Path

from dar.processes import Child, Processes
from dar.settings import environment

WRITER = """
import sys, time
for number in range(3000):
    print(f"line {number:06}", flush=True)
    if number % 100 == 0:
        time.sleep(0.02)
time.sleep(60)
"""


def test_a_log_that_grows_is_rotated_and_its_process_goes_on_writing(tmp_path: Path) -> None:
    log, reports = tmp_path / "logs" / "writer.log", list[str]()
    child = Child("writer", [sys.executable, "-c", WRITER], environment(), log)
    deadline = time.monotonic() + 20
    with Processes(reports.append, log_bytes=6000) as processes:
        processes.start(child)

        def is_done(seconds: float) -> bool:
            time.sleep(min(seconds, 0.02))
            return b"line 002999" in log.read_bytes() or time.monotonic() > deadline

        processes.watch(is_done)
    names = sorted(path.name for path in log.parent.iterdir())
    assert names == ["writer.log", *(f"writer.log.{number}" for number in range(1, 5))]
    assert log.read_bytes()[:5] in {b"line ", b""}  # no hole at its start
    kept = [log.with_name(name).read_text() for name in reversed(names)]
    numbers: list[int] = []
    for text in kept:
        lines = text.splitlines(keepends=True)
        if not lines[-1].endswith("\n"):
            lines.pop()  # it was being written when its file was rotated
        assert all(len(line) == len("line 000000\n") for line in lines)
        numbers += [int(line.split()[1]) for line in lines]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 2999
    assert all(len(text) < 40_000 for text in kept)
    assert reports == []


def test_a_log_that_cannot_be_rotated_is_reported_once(tmp_path: Path) -> None:
    log, reports, looks = tmp_path / "a.log", list[str](), iter(range(5))
    (tmp_path / "a.log.3").write_text("earlier")
    (tmp_path / "a.log.4").mkdir()  # in the way
    child = Child("a", [sys.executable, "-c", "import time; time.sleep(60)"], environment(), log)
    log.write_bytes(b"x" * 100)
    with Processes(reports.append, log_bytes=10) as processes:
        processes.start(child)
        processes.watch(lambda seconds: next(looks, None) is None)
    assert len(reports) == 1
    assert "a.log cannot be rotated" in reports[0]
    assert log.stat().st_size == 100
