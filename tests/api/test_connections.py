"""Connections that keep the service waiting are closed; there may be only so many."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx2
import psutil
import pytest

from dar.settings import environment
from fakes.live_service import Live
from fakes.scripted_installation import wait_until
from service.http import connections

SOFT, HARD = 160, 320
"""Limits on open files of the service under test."""
CALLBACK = b"POST /v1/reward_callbacks/rwr_x HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n"


def opened(url: str, content: bytes = b"") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=20)
    made.sendall(content)
    return made


def seconds_until_closed(one: socket.socket, drip: bytes = b"") -> float:
    """How long the service keeps a connection on which the client sends ``drip`` all the time."""
    started = time.monotonic()
    one.settimeout(0.05)
    while time.monotonic() - started < 20:
        try:
            if drip:
                one.sendall(drip)
            if not one.recv(65536):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - started


@pytest.fixture
def hurried(serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> Live:
    """A service that waits only a moment."""
    for name, seconds in (("HEADER", 0.6), ("IDLE", 0.3), ("BODY", 0.5), ("STALL", 0.6)):
        monkeypatch.setattr(connections, f"{name}_SECONDS", seconds)
    return serve()


@pytest.mark.parametrize(
    ("content", "drip"),
    [
        pytest.param(b"", b"", id="sends nothing"),
        pytest.param(b"GET /healthz HT", b"", id="stops in the request line"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nhost: x\r\n", b"", id="stops in the header"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nx: ", b"y", id="sends its header byte by byte"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", b"", id="is idle after it"),
        pytest.param(
            b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", b"G", id="begins a second one slowly"
        ),
        pytest.param(CALLBACK + b"\r\n{", b"", id="stops in a body"),
        pytest.param(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 99999\r\n\r\n",
            b"-",
            id="sends on after a refusal",
        ),
    ],
)
def test_a_client_without_a_key_cannot_keep_a_connection(
    hurried: Live, content: bytes, drip: bytes
) -> None:
    with closing(opened(hurried.url, content)) as one:
        assert seconds_until_closed(one, drip) < 5


@pytest.mark.parametrize(
    "drip", [pytest.param(b"", id="no more"), pytest.param(b" ", id="too slow")]
)
def test_a_body_that_does_not_arrive_in_time_is_refused_with_a_reason(
    hurried: Live, drip: bytes
) -> None:
    key = hurried.key("api_key")
    head = (
        "POST /v1/fine_tuning/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: 5000\r\n\r\n"
    )
    with closing(opened(hurried.url, head.encode() + b"{")) as one:
        one.settimeout(0.05)
        answer, started = b"", time.monotonic()
        while b"request_timeout" not in answer and time.monotonic() - started < 10:
            try:
                if drip:
                    one.sendall(drip)
                answer += one.recv(65536)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert "the body arrived too slowly" in error["message"]
        assert seconds_until_closed(one) < 5


def test_a_client_that_takes_no_answer_is_left(hurried: Live) -> None:
    key = hurried.key("api_key")
    ask = f"GET /openapi.json HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n"
    with closing(socket.socket()) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = hurried.url.removeprefix("http://").split(":")
        one.connect((host, int(port)))
        local = one.getsockname()
        one.sendall(ask.encode() * 200)

        def is_gone() -> bool:
            held = psutil.net_connections("tcp")
            return not any(found.raddr == local and found.pid == os.getpid() for found in held)

        wait_until(is_gone, what="the service to close the connection")


def test_a_body_in_many_parts_and_a_long_poll_take_their_time(
    hurried: Live, serve: Callable[..., Live]
) -> None:
    def parts() -> Iterator[bytes]:
        body = json.dumps(hurried.spec()).encode() + b" " * 4000
        for start in range(0, len(body), 500):
            time.sleep(0.1)
            yield body[start : start + 500]

    headers = {"content-type": "application/json"}
    answer = hurried.http.post("/v1/fine_tuning/jobs", content=parts(), headers=headers)
    assert answer.status_code == 200, answer.text
    lease = hurried.claim()
    assert lease is not None
    started = time.monotonic()
    assert lease.http.get("/directives", params={"wait": 1.5}).status_code == 200
    assert time.monotonic() - started > 1.4


@pytest.fixture
def small(home: Path, free_port: Callable[[], int]) -> Iterator[tuple[str, Path, int]]:
    """A real service that may open few files: its URL, its log and its process id."""
    port, log = free_port(), home.parent / "log"
    serving = [sys.executable, "-m", "service", "serve", "--port", str(port)]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            ["sh", "-c", f'ulimit -Sn {SOFT}; ulimit -Hn {HARD}; exec "$@"', "sh", *serving],
            env=environment() | {"DAR_HOME": str(home)},
            stderr=stderr,
        )
    try:
        wait_until(lambda: b'"ready"' in log.read_bytes(), what="the service", seconds=30)
        yield f"http://127.0.0.1:{port}", log, process.pid
    finally:
        process.kill()
        process.wait(10)


def test_idle_connections_beyond_the_file_limit_do_not_stop_the_service(
    small: tuple[str, Path, int],
) -> None:
    url, log, pid = small
    most = connections.max_connections(HARD)
    assert f'"max_connections": {most}' in log.read_text()
    assert psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE) == (HARD, HARD)
    idle = [opened(url, b"GET /healthz HT" if n % 2 else b"") for n in range(2 * HARD)]
    try:
        for _ in range(3):
            with httpx2.Client(base_url=url, timeout=5, trust_env=False) as client:
                assert client.get("/healthz").status_code == 200
        assert psutil.Process(pid).num_fds() < HARD
        assert not re.search("Too many open files", log.read_text())
    finally:
        for one in idle:
            one.close()


def test_where_every_connection_serves_a_request_a_new_one_is_refused_politely(
    serve: Callable[..., Live],
) -> None:
    live = serve(max_connections=1)
    _, lease = live.running()
    with ThreadPoolExecutor(1) as pool:
        polled = pool.submit(lease.http.get, "/directives", params={"wait": 2})
        time.sleep(0.5)
        answer = httpx2.get(f"{live.url}/healthz", trust_env=False)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "service_unavailable"
        assert polled.result().status_code == 200


def test_a_request_for_a_websocket_is_answered_and_not_logged(
    serve: Callable[..., Live], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = serve()
    logger = logging.getLogger("uvicorn.error")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.WARNING, logger.name)
    headers = {"connection": "upgrade", "upgrade": "websocket"}
    assert live.http.get("/v1/files", headers=headers).status_code == 200
    assert "WebSocket" not in caplog.text
    assert "upgrade" not in caplog.text
