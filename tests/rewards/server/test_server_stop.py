"""A reward server as a process: what it has begun it ends, and what it has promised it delivers,
before it leaves with 0.
"""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dar.errors import ConfigurationError
from dar.rewards.server import serve
from fakes.reward_server import RewardServer, hang

Asks = Callable[..., Any]
Content = Callable[..., dict[str, Any]]

SCRIPT = """
import time
from pathlib import Path
from dar.rewards.server import serve

folder = Path({folder!r})

def reward(prompts, completions, **columns):
    (folder / "began").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    return [1.0] * len(completions)

def started(url, endpoint):
    print(url.removesuffix("/score"), flush=True)

serve(reward, port=0, started=started, **{options!r})
"""


class Process:
    """A running reward server, whose function waits until the file ``go`` is there."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder = folder
        script = SCRIPT.format(folder=str(folder), options=options)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def go(self) -> None:
        (self.folder / "go").touch()

    def has_begun(self) -> bool:
        return (self.folder / "began").exists()

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    async def ended(self) -> str:
        """Its log, once it has left with 0."""
        _, log = await asyncio.to_thread(self.process.communicate, timeout=60)
        assert self.process.returncode == 0, log
        return log


@pytest.fixture
async def start(tmp_path: Path, asker: Asks) -> AsyncIterator[Callable[..., Any]]:
    started: list[Process] = []

    async def run(**options: Any) -> tuple[Process, Any]:
        process = await asyncio.to_thread(Process, tmp_path, options)
        started.append(process)
        server = asker(process.url, options.get("secret"))
        while True:
            with contextlib.suppress(httpx2.TransportError):
                await server.client.get("/healthz")
                return process, server

    yield run
    for process in started:
        process.process.kill()
        with process.process:  # waits, and closes its pipes
            pass


async def stopping(server: RewardServer) -> None:
    while (await server.client.get("/healthz")).status_code == 200:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_call_in_flight_is_answered_and_a_new_one_is_sent_away(
    start: Asks, content: Content, eventually: Asks, number: int
) -> None:
    process, server = await start()
    asked = asyncio.create_task(server.post(content("rwq_1")))
    await eventually(process.has_begun)
    process.stop(number)
    await stopping(server)
    refused = await server.post(content("rwq_2"))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    joined = asyncio.create_task(server.post(content("rwq_1")))
    await asyncio.sleep(0.05)
    assert not asked.done()
    process.go()
    assert [answer.status_code for answer in await asyncio.gather(asked, joined)] == [200, 200]
    await process.ended()


async def test_a_promised_result_can_still_be_fetched(start: Asks, content: Content) -> None:
    process, server = await start(asynchronous=True)
    assert (await server.post(content(is_async=True))).status_code == 202
    process.stop()
    await stopping(server)
    process.go()
    assert (await server.result()).status_code == 200
    await process.ended()


async def test_a_pending_callback_is_delivered(
    start: Asks, content: Content, hostile: Callable[..., RewardServer], token: str, secret: str
) -> None:
    receiver = hostile(
        lambda request: request.answer(b"", status="503 Later"),
        lambda request: request.answer(b"{}"),
    )
    process, server = await start(asynchronous=True, secret=secret)
    callback = {"url": receiver.url, "token": token}
    assert (await server.post(content(is_async=True, callback=callback))).status_code == 202
    process.stop()
    await stopping(server)
    process.go()
    log = await process.ended()
    assert len(receiver.requests) == 2, log
    assert receiver.requests[1].content["request_id"] == "rwq_1"


async def test_nothing_holds_a_stop_up_beyond_its_bound(
    start: Asks,
    content: Content,
    eventually: Asks,
    hostile: Callable[..., RewardServer],
    token: str,
    secret: str,
) -> None:
    process, server = await start(asynchronous=True, stop_seconds=0.3, secret=secret)
    receiver = hostile(hang)
    callback = {"url": receiver.url, "token": token}
    await server.post(content(is_async=True, callback=callback))
    process.go()
    await eventually(lambda: receiver.requests)
    process.stop()
    assert "1 promised results were not delivered" in await process.ended()


async def test_a_second_signal_ends_it_at_once(
    start: Asks, content: Content, eventually: Asks
) -> None:
    process, server = await start(asynchronous=True, stop_seconds=3600)
    await server.post(content(is_async=True))
    await eventually(process.has_begun)
    process.stop()
    await stopping(server)
    process.stop()
    await process.ended()


APPLICATION = """
import time
from pathlib import Path
from dar.rewards.server import reward_server

@reward_server(asynchronous=True, secret_file="secret")
def app(prompts, completions, **columns):
    Path("began").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    return [1.0] * len(completions)
"""


def under_uvicorn(app: str, port: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "uvicorn", app, "--port", str(port)]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE)


async def test_under_uvicorn_alone_a_pending_callback_is_delivered(
    content: Content,
    eventually: Asks,
    hostile: Callable[..., RewardServer],
    token: str,
    asker: Asks,
    tmp_path: Path,
    free_port: Callable[[], int],
    secret: str,
) -> None:
    (tmp_path / "my_app.py").write_text(APPLICATION)
    (tmp_path / "secret").write_text(secret)
    receiver = hostile(lambda request: request.answer(b"{}"))
    port = free_port()
    process = under_uvicorn("my_app:app", port, tmp_path)
    try:
        server = asker(f"http://127.0.0.1:{port}", secret)
        callback = {"url": receiver.url, "token": token}
        while True:
            with contextlib.suppress(httpx2.TransportError):
                asked = content(is_async=True, callback=callback)
                assert (await server.post(asked)).status_code == 202
                break
        await eventually((tmp_path / "began").exists)
        process.terminate()
        (tmp_path / "go").touch()
        _, log = await asyncio.to_thread(process.communicate, timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert len(receiver.requests) == 1, log


def test_a_port_that_is_taken_is_said_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"
        ):
            serve(lambda prompts, completions: [], port=port)
