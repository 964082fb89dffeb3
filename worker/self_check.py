"""Whether this machine can run jobs: free disk and memory, a folder to write to, GPUs that answer.

`look` takes no time, and is made before each claim. `examine` is complete, and is made at the start
of a worker and after each failure that the machine may have caused.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from dar.protocol.worker import MOST_DEVICES, WorkerFault, WorkerReport
from dar.settings import Settings
from dar.version import __version__
from worker.failures import DEVICE, DISK, DISK_FULL, MACHINE, MEMORY

DEVICE_FOLDER = Path("/dev")
MEMORY_FILE = Path("/proc/meminfo")
CGROUP_FILE = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
DEVICE_TOOL = "nvidia-smi"
TOOL_SECONDS = 30.0
TRIAL_BYTES = 1024**2
"""Size of the file that is written for a trial."""
LONGEST_QUOTE = 300


def look(settings: Settings) -> WorkerFault | None:
    """What stands against a claim: too little free disk or memory; None: nothing."""
    try:
        free = shutil.disk_usage(settings.work_path).free
    except OSError as error:
        return _machine_fault("the worker's folder cannot be read", error)
    if free < settings.min_disk_bytes:
        return WorkerFault(
            code=DISK.code,
            message=f"the worker's disk has {free:,} bytes free, but {settings.min_disk_bytes:,} "
            "must be free (DAR_MIN_DISK_BYTES); make room on that worker",
        )
    memory = free_memory()
    if memory is not None and memory < settings.min_memory_bytes:
        return WorkerFault(
            code=MEMORY.code,
            message=f"the worker's machine has {memory:,} bytes of memory free, but "
            f"{settings.min_memory_bytes:,} must be free (DAR_MIN_MEMORY_BYTES)",
        )
    return None


def examine(settings: Settings) -> WorkerFault | None:
    """Like `look`, and a trial: write and read a file, and ask the driver for the GPUs."""
    return look(settings) or _try_disk(settings.work_path) or _try_devices(settings.devices)


def report_of(settings: Settings, machine: str, fault: WorkerFault | None) -> WorkerReport:
    """What a worker reports about itself and its machine."""
    try:
        disk = shutil.disk_usage(settings.work_path)
        free, total = disk.free, disk.total
    except OSError:  # `fault` says why
        free = total = 0
    return WorkerReport(
        version=__version__,
        machine=machine,
        devices=devices_of(settings.devices)[:MOST_DEVICES],
        disk_free=free,
        disk_total=total,
        memory_free=free_memory(),
        interval_seconds=max(settings.poll_seconds, settings.heartbeat_seconds),
        fault=fault,
    )


def devices_of(setting: str | None) -> list[str]:
    """The GPUs of a slot; none on a machine without GPUs, where processes share the CPU.

    Args:
        setting: `Settings.devices`.
    """
    installed = _installed()
    if setting is None or not installed:
        return installed
    named = [name.strip() for name in setting.split(",")]
    return [name for name in named if name and name != "-1"]


def _installed() -> list[str]:
    """Numbers of the NVIDIA GPUs of this machine."""
    names = (path.name.removeprefix("nvidia") for path in DEVICE_FOLDER.glob("nvidia[0-9]*"))
    return sorted((name for name in names if name.isdecimal()), key=int)


def free_memory() -> int | None:
    """Bytes that a new process can use, of the machine or of its cgroup; None: not known."""
    found = re.search(rb"^MemAvailable: +([0-9]+) kB", _read(MEMORY_FILE) or b"", re.MULTILINE)
    of_machine = None if found is None else int(found[1]) * 1024
    of_group = _free_in_cgroup()
    known = [one for one in (of_machine, of_group) if one is not None]
    return min(known, default=None)


def _read(path: Path) -> bytes | None:
    """Content of a file of the kernel; None: this machine shows none."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _free_in_cgroup() -> int | None:
    """What is left of the memory limit of this process's cgroup; None: there is no limit."""
    found = re.search(r"^0::(/.*)", (_read(CGROUP_FILE) or b"").decode(), re.MULTILINE)
    if found is None:
        return None
    group = CGROUPS / found[1].strip().lstrip("/")
    limit = (_read(group / "memory.max") or b"max").strip()
    used = (_read(group / "memory.current") or b"").strip()
    if not limit.isdigit() or not used.isdigit():
        return None
    stat = _read(group / "memory.stat") or b""
    cached = re.search(rb"^inactive_file ([0-9]+)", stat, re.MULTILINE)
    reclaimable = 0 if cached is None else int(cached[1])
    return max(0, int(limit) - int(used) + reclaimable)


def _try_disk(folder: Path) -> WorkerFault | None:
    content = os.urandom(TRIAL_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".self-check-") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            is_whole = file.read() == content
    except OSError as error:
        return _machine_fault("the worker's folder cannot be written to", error)
    if not is_whole:
        return WorkerFault(
            code=MACHINE.code, message="a file that the worker wrote was altered by its disk"
        )
    return None


def _machine_fault(what: str, error: OSError) -> WorkerFault:
    code = DISK.code if error.errno in DISK_FULL else MACHINE.code
    return WorkerFault(code=code, message=f"{what}: {error.strerror or error}")


def _try_devices(setting: str | None) -> WorkerFault | None:
    """Whether the driver knows every GPU of the slot."""
    wanted, tool = devices_of(setting), shutil.which(DEVICE_TOOL)
    if not wanted or tool is None:
        return None
    command = [tool, "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return WorkerFault(
            code=DEVICE.code, message=f"{DEVICE_TOOL} did not end within {TOOL_SECONDS:.0f} s"
        )
    except OSError as error:
        return WorkerFault(code=DEVICE.code, message=f"{DEVICE_TOOL} cannot be run: {error}")
    if asked.returncode != 0:
        said = " ".join((asked.stdout + asked.stderr).split())[:LONGEST_QUOTE]
        return WorkerFault(code=DEVICE.code, message=f"{DEVICE_TOOL} fails: {said}")
    lines = asked.stdout.splitlines()
    if setting is None:  # inside a container, the files of devices have the numbers of the host
        return None if len(lines) >= len(wanted) else _lost_devices(len(lines), len(wanted))
    known = [part.strip() for line in lines for part in line.split(",")]
    missing = [name for name in wanted if not _is_known(name, known)]
    if missing:
        return WorkerFault(
            code=DEVICE.code,
            message=f"the driver does not know the GPU {', '.join(missing)} (DAR_DEVICES)",
        )
    return None


def _lost_devices(known: int, installed: int) -> WorkerFault:
    return WorkerFault(
        code=DEVICE.code,
        message=f"the driver knows {known} of the {installed} GPUs of this machine",
    )


def _is_known(name: str, known: list[str]) -> bool:
    """Whether the driver knows a GPU by its number or by the start of its UUID."""
    if name.isdecimal():
        return name in known
    # A part of a GPU is not listed under its own name.
    return name.startswith("MIG-") or any(one.startswith(name) for one in known)
