"""The processes that the demo starts, and how it waits for them."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from dar.cli.processes import log_tail
from dar.cli.up import answers
from dar.errors import ServiceUnavailableError
from dar.processes import die_with_parent
from dar.settings import environment

START_SECONDS = 90.0


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

    def start(self, name: str, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], Path]:
        """Start a process; returns it and its log."""
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
        return process, log

    def wait_for(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        """Wait until a GET of ``url`` is answered with 200.

        Raises:
            ServiceUnavailableError: Its process ended or took too long; the message holds the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServiceUnavailableError(f"{url} did not come up; see {log}\n{log_tail(log)}")
            time.sleep(0.1)
