"""Child processes that are kept alive: started in order, started again when they die, stopped in reverse order."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dar.errors import ServiceUnavailableError
from dar.processes import die_with_parent

RESTART_PAUSE_SECONDS = (0.2, 1.0, 2.0, 5.0)
"""Wait before the n-th restart in a row; the last one repeats."""
SETTLED_SECONDS = 30.0
"""A child that ran this long has earned a fresh count of restarts."""
LOG_LIMIT_BYTES = 16 * 1024**2
"""A log larger than this is moved aside (``.1``) before its child starts."""


@dataclass(frozen=True, slots=True)
class Child:
    """How to start one process."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    stdin: str | None = None
    """Text the process reads at its start: configuration that must not show in its arguments."""
    stop_seconds: float = 10.0
    """How long it may take to end after SIGTERM."""


@dataclass
class Running:
    """A started child."""

    child: Child
    process: subprocess.Popen[bytes]
    started_at: float = field(default_factory=time.monotonic)
    restarts: int = 0
    not_before: float | None = None
    """When a dead child is due again."""


def launch(child: Child) -> subprocess.Popen[bytes]:
    """Start ``child`` in a session of its own, so that a Ctrl-C in the terminal reaches only us."""
    child.log.parent.mkdir(parents=True, exist_ok=True)
    if child.log.exists() and child.log.stat().st_size > LOG_LIMIT_BYTES:
        child.log.rename(child.log.with_suffix(".log.1"))
    with child.log.open("ab") as log:
        process = subprocess.Popen(
            child.command,
            env=dict(child.environment),
            stdin=subprocess.PIPE if child.stdin is not None else subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - we are one thread, and the call is a single prctl
        )
    if child.stdin is not None and process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # it died at once; the watch reports it
            process.stdin.write(child.stdin.encode())
            process.stdin.close()
    return process


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
    """A set of children that live and die together with this process."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._running: list[Running] = []

    def start(self, child: Child) -> None:
        """Start a child and keep it alive from now on."""
        self._running.append(Running(child, launch(child)))

    def wait_until(
        self,
        is_ready: Callable[[], bool],
        name: str,
        seconds: float,
        should_stop: Callable[[float], bool],
    ) -> None:
        """Wait for child ``name`` to be ready, or for ``should_stop(seconds to wait)``.

        Raises:
            ServiceUnavailableError: It ended, or was not ready in time; the message holds the end of its log.
        """
        running = next(item for item in self._running if item.child.name == name)
        deadline = time.monotonic() + seconds
        while not is_ready():
            code = running.process.poll()
            if code is not None or time.monotonic() > deadline:
                what = (
                    f"ended with code {code}"
                    if code is not None
                    else f"was not ready in {seconds:.0f} s"
                )
                raise ServiceUnavailableError(
                    f"the {name} {what}; see {running.child.log}\n{log_tail(running.child.log)}"
                )
            if should_stop(0.05):
                return

    def watch(self, should_stop: Callable[[float], bool]) -> None:
        """Start dead children again until ``should_stop(seconds to wait)`` is true."""
        while not should_stop(0.25):
            for item in self._running:
                self._revive(item)

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
            self._say(
                f"{item.child.name} ended with code {code}; starting it again (log: {item.child.log})"
            )
        if now >= item.not_before:
            item.process, item.started_at, item.not_before = launch(item.child), now, None

    def stop(self) -> None:
        """End all children, the last started first; each has ``stop_seconds`` before it is killed."""
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
        try:
            item.process.wait(item.child.stop_seconds)
        except subprocess.TimeoutExpired:
            self._say(
                f"{item.child.name} did not stop in {item.child.stop_seconds:.0f} s and is killed"
            )
            with contextlib.suppress(ProcessLookupError):
                os.killpg(item.process.pid, signal.SIGKILL)
            item.process.wait()
