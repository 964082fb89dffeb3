"""The processes that the demo starts, and how it waits for them."""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dar.cli.processes import log_tail
from dar.cli.up import answers
from dar.errors import ServiceUnavailableError
from dar.processes import die_with_parent
from dar.settings import environment

START_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class StartedProcess:
    """A process and where it writes."""

    process: subprocess.Popen[bytes]
    log: Path


class Stopwatch:
    """Wall time of the whole and of named parts."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        started = time.monotonic()
        yield
        self._parts[name] = time.monotonic() - started

    def seconds(self) -> dict[str, float]:
        """Seconds of each part and in ``total``, to a tenth."""
        parts = {**self._parts, "total": time.monotonic() - self._started}
        return {name: round(value, 1) for name, value in parts.items()}


class Session:
    """The processes that the demo starts; all end with the context."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._started):
            process.terminate()
            process.wait()

    def start(self, name: str, command: Sequence[str]) -> StartedProcess:
        """Start a process."""
        log = self.home / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                env=environment(home=self.home),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - we are one thread here, and the call is a single prctl
            )
        self._started.append(process)
        return StartedProcess(process, log)

    def wait_for(self, url: str, started: StartedProcess) -> None:
        """Wait until a GET of ``url`` is answered with 200.

        Raises:
            ServiceUnavailableError: Its process ended or took too long; the message holds the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while not answers(url):
            if started.process.poll() is not None or time.monotonic() > deadline:
                raise ServiceUnavailableError(
                    f"{url} did not come up; see {started.log}\n{log_tail(started.log)}"
                )
            time.sleep(0.1)
