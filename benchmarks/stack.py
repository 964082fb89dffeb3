"""A whole installation on this machine for a benchmark, started by ``dar up``."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dar.client import Client
from dar.processes import answers, free_port
from dar.settings import environment


@dataclass(frozen=True, slots=True)
class Stack:
    """A running installation."""

    home: Path
    url: str
    client: Client


def wait_until_up(url: str, seconds: float = 60.0, path: str = "/readyz") -> None:
    """Wait for a service.

    Raises:
        TimeoutError: It did not answer in time.
    """
    deadline = time.monotonic() + seconds
    while not answers(f"{url}{path}"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url} did not come up")
        time.sleep(0.1)


@contextlib.contextmanager
def stack(workers: int) -> Iterator[Stack]:
    """Start service, Valkey and ``workers`` workers in a fresh folder.

    Stop and remove them at the end.
    """
    home = Path(tempfile.mkdtemp(prefix="dar-bench-"))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "dar.cli", "up", "--home", str(home), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--workers", str(workers)],
        env=environment(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until_up(url)
        with Client(api_key=(home / "api_key").read_text().strip(), base_url=url) as client:
            yield Stack(home, url, client)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        shutil.rmtree(home)


def report(name: str, **figures: object) -> None:
    """The benchmark's one JSON line."""
    print(json.dumps({"benchmark": name, **figures}))
