"""Child processes: started with a log, restarted, waited for, and ended with their parent."""

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Self

import httpx2

from dar.errors import ConfigurationError, ServiceUnavailableError
from dar.settings import environment

EXTRAS = {
    "service": "service",
    "worker": "worker",
    "merge command": "worker",
    "reward server": "rewards",
}
"""Process -> the extra of the distribution that installs its libraries."""
RESTART_PAUSE_SECONDS = (0.2, 1.0, 2.0, 5.0)
"""Wait before the n-th restart in a row; the last one repeats."""
SETTLED_SECONDS = 30.0
"""After running this long, a child's count of restarts begins again at 0."""
LOG_BYTES = 16 * 1024**2
"""Size from which a new log is begun."""
LOGS_KEPT = 4
"""Earlier logs that are kept of each child: ``.1``, the newest, to ``.4``."""
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends; Linux only.

    For ``preexec_fn``. In a parent with several threads, the thread that starts a child must live
    as long as the child.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def how_to_install(extra: str) -> str:
    """The command that installs an extra of this package, which is on no package index."""
    return f"pip install -c constraints.txt '.[{extra}]' in a clone of dar-service"


def require(process: str, module: str) -> None:
    """Raise an error that names the missing extra when a process's libraries are not installed.

    Raises:
        ConfigurationError: ``module`` cannot be found.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigurationError(
            f"the {process} needs libraries that are not installed: "
            f"{how_to_install(EXTRAS[process])}"
        )


def become(process: str, library: str, *command: str, **settings: object) -> NoReturn:
    """Replace this process by ``python -m command``, with ``settings`` in its environment.

    This library never imports the service and the worker. They are started by their module names.

    Args:
        process: The process for which `require` demands ``library``.
        library: A module of its extra.
        *command: Name and arguments of the module that is run.
        **settings: See `environment`.
    """
    require(process, library)
    arguments = [sys.executable, "-m", *command]
    os.execve(sys.executable, arguments, environment(**settings))  # noqa: S606 - a module of this product, no shell


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Whether a GET of ``url`` returns status 200."""
    try:
        # Loading certificates takes longer than the rest of this call, and plain HTTP needs none.
        is_encrypted = url.startswith("https:")
        response = httpx2.get(url, timeout=2, trust_env=False, verify=is_encrypted)
    except httpx2.HTTPError:
        return False
    return response.status_code == 200


@dataclass(frozen=True, slots=True)
class Child:
    """How to start one process."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    stdin: str | None = None
    """Text that the process reads at its start: configuration that its arguments must not show."""
    stop_seconds: float = 10.0
    """Time to end after SIGTERM; then it is killed."""


@dataclass
class Running:
    """A started child."""

    child: Child
    process: subprocess.Popen[bytes]
    started_at: float = field(default_factory=time.monotonic)
    restarts: int = 0
    not_before: float | None = None
    """When to start a dead child again."""


def launch(child: Child) -> subprocess.Popen[bytes]:
    """Start ``child`` in its own session, so that a Ctrl-C reaches only the parent."""
    child.log.parent.mkdir(parents=True, exist_ok=True)
    with child.log.open("ab") as log:
        process = subprocess.Popen(
            child.command,
            env=dict(child.environment),
            stdin=subprocess.PIPE if child.stdin is not None else subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - the parent has one thread, and the call is a single prctl
        )
    if child.stdin is not None and process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # it died at once, which `watch` reports
            process.stdin.write(child.stdin.encode())
            process.stdin.close()
    return process


def rotate(log: Path, most_bytes: int) -> None:
    """Move the content of a large log to ``.1``, and that of earlier ones to ``.2`` and so on.

    The child has the log open and continues at its new end, so the content is copied and the file
    emptied. A line that is written between the two may be lost.
    """
    try:
        if log.stat().st_size <= most_bytes:
            return
    except FileNotFoundError:
        return
    for number in range(LOGS_KEPT, 1, -1):
        with contextlib.suppress(FileNotFoundError):
            log.with_name(f"{log.name}.{number - 1}").replace(log.with_name(f"{log.name}.{number}"))
    with log.open("rb") as source, log.with_name(f"{log.name}.1").open("wb") as target:
        shutil.copyfileobj(source, target)
        os.truncate(log, 0)


def log_tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, for an error message."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


class Processes:
    """A set of children; all of them end with the context, the last started first.

    Args:
        report: Called with a line of text when a child is restarted or killed, or when its log
            cannot be rotated.
        log_bytes: Size from which `watch` begins a new log.
    """

    def __init__(self, report: Callable[[str], None], log_bytes: int = LOG_BYTES) -> None:
        self._report = report
        self._log_bytes = log_bytes
        self._unrotated: set[Path] = set()
        self._running: list[Running] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, child: Child) -> None:
        """Start a child; `watch` restarts it when it dies."""
        self._running.append(Running(child, launch(child)))

    def wait_until(
        self,
        is_ready: Callable[[], bool],
        name: str,
        seconds: float,
        should_stop: Callable[[float], bool],
    ) -> None:
        """Wait until child ``name`` is ready or ``should_stop(seconds to wait)`` returns True.

        Raises:
            ServiceUnavailableError: It ended, or was not ready in time; the message holds the end
                of its log.
        """
        running = next(item for item in self._running if item.child.name == name)
        deadline = time.monotonic() + seconds
        while not is_ready():
            code = running.process.poll()
            if code is not None or time.monotonic() > deadline:
                what = f"was not ready in {seconds:.0f} s"
                if code is not None:
                    what = f"ended with code {code}"
                raise ServiceUnavailableError(
                    f"the {name} {what}; see {running.child.log}\n{log_tail(running.child.log)}"
                )
            if should_stop(0.05):
                return

    def watch(self, should_stop: Callable[[float], bool]) -> None:
        """Restart dead children until ``should_stop(seconds to wait)`` returns True."""
        while not should_stop(0.25):
            for item in self._running:
                self._rotate(item.child.log)
                self._revive(item)

    def _rotate(self, log: Path) -> None:
        try:
            rotate(log, self._log_bytes)
        except OSError as error:  # as on a full disk: the processes go on
            if log not in self._unrotated:
                self._report(f"{log} cannot be rotated: {error.strerror}")
            self._unrotated.add(log)
        else:
            self._unrotated.discard(log)

    def _revive(self, item: Running) -> None:
        now = time.monotonic()
        code = item.process.poll()
        if code is None:
            if now - item.started_at > SETTLED_SECONDS:
                item.restarts = 0
            return
        if item.not_before is None:
            pause = RESTART_PAUSE_SECONDS[min(item.restarts, len(RESTART_PAUSE_SECONDS) - 1)]
            item.not_before = now + pause
            item.restarts += 1
            self._report(
                f"{item.child.name} ended with code {code}; starting it again (log: {item.child.log})"
            )
        if now >= item.not_before:
            item.process, item.started_at, item.not_before = launch(item.child), now, None

    def stop(self) -> None:
        """End all children, the last started first.

        Children whose names differ only in a number end at the same time. One that does not end
        within its ``stop_seconds`` is killed.
        """
        while self._running:
            last_name = self._running[-1].child.name.rstrip("0123456789-")
            batch = [
                item for item in self._running if item.child.name.rstrip("0123456789-") == last_name
            ]
            self._running = [item for item in self._running if item not in batch]
            for item in batch:
                if item.process.poll() is None:
                    item.process.terminate()
            for item in batch:
                self._await_end(item)

    def _await_end(self, item: Running) -> None:
        seconds = item.child.stop_seconds
        try:
            item.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._report(f"{item.child.name} did not stop in {seconds:.0f} s and is killed")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(item.process.pid, signal.SIGKILL)
            item.process.wait()
