"""A worker does not claim what its machine cannot run, and says why; its name is its own."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from dar.settings import Settings
from fakes.scripted_installation import ScriptedInstallation
from worker import __main__, self_check
from worker.folders import SlotFolder
from worker.identity import machine_of


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    SlotFolder.of(tmp_path / "worker", "0")
    return Settings(home=tmp_path)


def test_a_machine_that_is_well_reports_what_it_has(settings: Settings) -> None:
    assert self_check.look(settings) is None
    assert self_check.examine(settings) is None
    report = self_check.report_of(settings, "machine-1", None)
    assert 0 < report.disk_free <= report.disk_total
    assert report.memory_free is None or report.memory_free > 0
    assert list(settings.work_path.iterdir()) == [settings.work_path / "slot-0"], "no trial is left"


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        ({"min_disk_bytes": 10**17}, "disk_full", "DAR_MIN_DISK_BYTES"),
        ({"min_memory_bytes": 10**17}, "out_of_memory", "DAR_MIN_MEMORY_BYTES"),
        ({"work_dir": Path("/nowhere/at/all")}, "machine_failed", "No such file"),
    ],
)
def test_what_a_machine_lacks_is_named(
    settings: Settings, values: dict[str, Any], code: str, words: str
) -> None:
    poor = settings.model_copy(update=values)
    fault = self_check.look(poor)
    assert fault is not None
    assert fault.code == code
    assert words in fault.message
    report = self_check.report_of(poor, "machine-1", fault)
    assert report.fault == fault


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, "disk_full"), (errno.EROFS, "machine_failed")]
)
def test_a_folder_that_takes_no_file_is_a_fault(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert self_check.look(settings) is None
    fault = self_check.examine(settings)
    assert fault is not None
    assert (fault.code, os.strerror(number) in fault.message) == (code, True)


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two GPUs; returns the tool of its driver."""
    nodes, tool = tmp_path / "dev", tmp_path / "nvidia-smi"
    nodes.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (nodes / name).touch()
    monkeypatch.setattr(self_check, "DEVICE_FOLDER", nodes)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    tool.write_text("#!/bin/sh\necho '0, GPU-aaaa'\necho '1, GPU-bbbb'\n")
    tool.chmod(0o755)
    return tool


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("devices", "found", "is_fit"),
    [
        (None, ["0", "1"], True),
        ("1", ["1"], True),
        ("0, GPU-bbb", ["0", "GPU-bbb"], True),
        ("MIG-1f", ["MIG-1f"], True),
        ("-1", [], True),
        ("2", ["2"], False),
        ("GPU-cccc", ["GPU-cccc"], False),
    ],
)
def test_every_gpu_of_a_slot_must_be_known_to_the_driver(
    settings: Settings, devices: str | None, found: list[str], is_fit: bool
) -> None:
    mine = settings.model_copy(update={"devices": devices})
    assert self_check.report_of(mine, "machine-1", None).devices == found
    fault = self_check.examine(mine)
    assert (fault is None) is is_fit
    if fault is not None:
        assert (fault.code, found[0] in fault.message) == ("device_failed", True)


def test_without_a_choice_the_driver_must_know_as_many_gpus_as_there_are(
    settings: Settings, gpus: Path, tmp_path: Path
) -> None:
    gpus.write_text("#!/bin/sh\necho '0, GPU-bbbb'\n")
    fault = self_check.examine(settings)
    assert fault is not None
    assert (fault.code, "1 of the 2 GPUs" in fault.message) == ("device_failed", True)
    (tmp_path / "dev" / "nvidia0").unlink()  # a container that has the second GPU alone
    assert self_check.examine(settings) is None


def test_a_driver_that_fails_or_hangs_is_a_fault(
    settings: Settings, gpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "TOOL_SECONDS", 0.2)
    for script, words in (
        ("echo 'No devices were found'; exit 9", "No devices were found"),
        ("exec sleep 5", "did not end"),
    ):
        gpus.write_text(f"#!/bin/sh\n{script}\n")
        fault = self_check.examine(settings)
        assert fault is not None
        assert (fault.code, words in fault.message) == ("device_failed", True)


def test_without_gpus_a_slot_uses_the_cpu_whatever_its_devices(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "DEVICE_FOLDER", tmp_path)
    assert self_check.devices_of("0,1") == []


def test_the_memory_of_a_cgroup_is_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text("0::/a/b\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   1000 kB\n")
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    monkeypatch.setattr(self_check, "CGROUP_FILE", tmp_path / "own")
    monkeypatch.setattr(self_check, "CGROUPS", tmp_path)
    monkeypatch.setattr(self_check, "MEMORY_FILE", tmp_path / "meminfo")
    (group / "memory.current").write_text("700000\n")
    for limit, free in (("max", 1000 * 1024), ("900000", 250_000), ("600000", 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
        assert self_check.free_memory() == free


def test_workers_of_one_folder_have_one_machine(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert machine_of(tmp_path) == machine_of(tmp_path)
    assert machine_of(tmp_path) != machine_of(tmp_path / "other")


@pytest.fixture
def same_name(
    installation: ScriptedInstallation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The environment of a worker on another machine, with the name of the usual worker."""
    installation.need_worker()
    installation.wait(installation.submit(steps=1), "succeeded")
    changed = installation.environment(work_dir=tmp_path / "elsewhere")
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("same_name")
def test_a_second_worker_of_a_name_is_refused_at_its_start(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert __main__.main() == 78
    said = capsys.readouterr().err
    assert "another worker with the name node" in said
    assert "DAR_NODE" in said
