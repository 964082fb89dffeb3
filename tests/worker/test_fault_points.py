"""Instants at which the chaos suite kills processes."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dar import fault_points
from dar.fault_points import INSTANTS, arm, disarm, fault_point
from dar.settings import environment

ROOT = Path(__file__).parents[2]


def test_every_instant_is_marked_once_in_the_code() -> None:
    marked = [
        name
        for folder in ("dar", "service", "worker")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r'fault_point\("([\w.]+)"\)', path.read_text())
    ]
    assert sorted(marked) == sorted(INSTANTS)


def test_an_armed_instant_strikes_once_and_an_unarmed_one_never(tmp_path: Path) -> None:
    script = (
        "from dar.fault_points import fault_point\n"
        "fault_point('worker.sent')\n"
        "print('alive', flush=True)\n"
        "fault_point('worker.claimed')\n"
        "print('alive', flush=True)\n"
    )

    def run() -> tuple[int, bytes]:
        ended = subprocess.run(
            [sys.executable, "-c", script],
            env=environment(fault_points=tmp_path),
            capture_output=True,
            check=False,
        )
        return ended.returncode, ended.stdout

    arm(tmp_path, "worker.claimed")
    assert run() == (-signal.SIGKILL, b"alive\n")
    assert run() == (0, b"alive\nalive\n")
    arm(tmp_path, "worker.claimed")
    disarm(tmp_path, "worker.claimed")
    assert run() == (0, b"alive\nalive\n")


def test_without_the_setting_a_file_of_that_name_is_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fault_points, "_FOLDER", None)
    arm(tmp_path, "worker.sent")
    fault_point("worker.sent")
    assert (tmp_path / "worker.sent").exists()
