"""Reward services of both kinds: real ones made by the decorator, and hostile ones on bare sockets."""

import asyncio
import contextlib
import logging
import socket
import socketserver
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import orjson
import psutil
import pytest
import uvicorn
from starlette.applications import Starlette

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_spec import RewardBatching, RewardLimits, RewardRetry, RewardTimeouts
from dar.rewards.base import RequestRecord, RewardContext, RewardResult, RewardSample
from dar.rewards.http import async_results
from dar.rewards.http_reward import HttpOptions, HttpReward
from fakes import hostile_server, later_judges

SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
TOKEN = "tok-5f0a91c2/7be4+d1"
KEY = "key-93bd77aa01"
GROWTH_BYTES = 64 * 1024**2
"""What no misbehaviour may make this process grow by."""


@pytest.fixture
def secret() -> str:
    return SECRET


@pytest.fixture
def context() -> RewardContext:
    return RewardContext(step=3, job_id="ftjob-1")


@pytest.fixture
def make_samples() -> Callable[..., list[RewardSample]]:
    """``make_samples(n)``: n samples in groups of K, whose completions are ``c0``, ``c1``, …"""

    def make(count: int, k: int = 4, **fields: Any) -> list[RewardSample]:
        base: dict[str, Any] = {
            "prompt": "p",
            "messages": None,
            "finish_reason": "stop",
            "completion_tokens": 2,
            **fields,
        }
        return [
            RewardSample(
                id=f"s{n}",
                group_id=f"g{n // k}",
                index=n % k,
                **{"completion": f"c{n}", **base},
            )
            for n in range(count)
        ]

    return make


@pytest.fixture
def fast() -> HttpOptions:
    """Short waits between attempts, and time limits that no busy machine reaches."""
    return HttpOptions(
        batch=RewardBatching(max_samples=16),
        limits=RewardLimits(concurrency=4),
        timeouts=RewardTimeouts(connect=10, read=20, attempt=20, deadline=60),
        retry=RewardRetry(attempts=3, base=0.005, cap=0.01, retry_after_cap=0.2),
    )


@pytest.fixture
def impatient(fast: HttpOptions) -> HttpOptions:
    """Time limits that are meant to be reached."""
    timeouts = RewardTimeouts(connect=10, read=0.3, attempt=0.4, deadline=60)
    return replace(fast, timeouts=timeouts)


@pytest.fixture
def serve_app() -> Iterator[Callable[[Starlette], str]]:
    """Serves an application on a free port in a thread; gives its address."""
    with contextlib.ExitStack() as stack:

        def start(app: Starlette) -> str:
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
            thread = threading.Thread(target=server.run, daemon=True)
            thread.start()
            while not server.started:
                threading.Event().wait(0.005)
                assert thread.is_alive()

            def stop() -> None:
                server.should_exit = True
                thread.join()

            stack.callback(stop)
            port = server.servers[0].sockets[0].getsockname()[1]
            return f"http://127.0.0.1:{port}"

        yield start


@dataclass
class Received:
    """One request as it came in, with its connection."""

    line: str
    headers: dict[str, str]
    body: bytes
    connection: socket.socket
    stopping: threading.Event

    @property
    def content(self) -> dict[str, Any]:
        return dict(orjson.loads(self.body))

    @property
    def ids(self) -> list[str]:
        return [sample["id"] for sample in self.content["samples"]]

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def answer(
        self,
        body: bytes,
        *,
        status: str = "200 OK",
        content_type: str = "application/json",
        **headers: str,
    ) -> None:
        lines = [f"HTTP/1.1 {status}", f"content-type: {content_type}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if "content_length" not in headers:
            lines.append(f"content-length: {len(body)}")
        self.send("\r\n".join([*lines, "connection: close", "", ""]).encode() + body)

    def rewards(self, rewards: list[Any]) -> None:
        """A conforming answer in the short form."""
        content = {"request_id": self.content["request_id"], "rewards": rewards}
        self.answer(orjson.dumps(content))

    def fine(self) -> None:
        """0.5 for every sample."""
        self.rewards([0.5] * len(self.ids))

    def hang(self) -> None:
        self.stopping.wait(20)


Behaviour = Callable[[Received], None]


@dataclass
class Hostile:
    """A server that behaves as it is told, in turn, the last behaviour for ever."""

    url: str
    behaviours: list[Behaviour]
    requests: list[Received] = field(default_factory=list)


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server: Any = self.server
        line = self.rfile.readline().decode().strip()
        if not line:
            return
        headers = {}
        while text := self.rfile.readline().decode().strip():
            name, _, value = text.partition(":")
            headers[name.lower()] = value.strip()
        body = self.rfile.read(int(headers.get("content-length", 0)))
        request = Received(line, headers, body, self.connection, server.stopping)
        hostile: Hostile = server.hostile
        with server.lock:
            hostile.requests.append(request)
            turns = hostile.behaviours
            behave = turns.pop(0) if len(turns) > 1 else turns[0]
        with contextlib.suppress(OSError):
            behave(request)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behaviours: list[Behaviour]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.hostile = Hostile(f"http://127.0.0.1:{self.server_address[1]}/score", behaviours)


@pytest.fixture
def hostile() -> Iterator[Callable[..., Hostile]]:
    with contextlib.ExitStack() as stack:

        def start(*behaviours: Behaviour) -> Hostile:
            server = stack.enter_context(_Server(list(behaviours)))
            thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
            thread.start()

            def stop() -> None:
                server.stopping.set()
                server.shutdown()
                thread.join()

            stack.callback(stop)
            return server.hostile

        yield start


@pytest.fixture
async def ask(
    fast: HttpOptions, make_samples: Callable[..., list[RewardSample]], context: RewardContext
) -> AsyncIterator[Callable[..., Any]]:
    """Score four samples, or ``count``, with the service at ``url``."""
    opened: list[HttpReward] = []

    async def score(
        url: str, count: int = 4, options: HttpOptions = fast, **more: Any
    ) -> list[RewardResult]:
        source = HttpReward("r", url, options=options, **more)
        opened.append(source)
        return await source.score(make_samples(count), context)

    yield score
    for source in opened:
        await source.aclose()


@pytest.fixture
def hostile_servers() -> ModuleType:
    return hostile_server


@pytest.fixture
def server() -> Iterator[Any]:
    """The hostile server, in a thread, so that what is left in the test's own loop is the client's."""
    with hostile_server.hostile_server_in_thread() as running:
        yield running


@dataclass
class Seen:
    """An observer that keeps everything."""

    records: list[RequestRecord] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    spared_samples: list[tuple[int, int]] = field(default_factory=list)

    def spared(self, component: str, hits: int, copies: int) -> None:
        self.spared_samples.append((hits, copies))

    def request_done(self, record: RequestRecord) -> None:
        self.records.append(record)

    def breaker_changed(self, component: str, state: str, reason: str) -> None:
        self.states.append(state)
        self.messages.append(reason)

    def waiting(self, component: str, message: str) -> None:
        self.messages.append(message)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def credentials(fast: HttpOptions) -> HttpOptions:
    """``fast``, with secret headers."""
    return replace(fast, headers={"Authorization": f"Bearer {TOKEN}", "X-Key": KEY})


@pytest.fixture
async def score(
    credentials: HttpOptions,
    make_samples: Callable[..., list[RewardSample]],
    context: RewardContext,
    seen: Seen,
    caplog: pytest.LogCaptureFixture,
) -> AsyncIterator[Callable[..., Any]]:
    """Score samples with the service at a URL, with all credentials.

    Afterwards nothing may be left running, no secret may have been said anywhere, and the process may not have grown.
    """
    caplog.set_level(logging.DEBUG)
    opened: list[HttpReward] = []
    said: list[str] = []
    memory = psutil.Process().memory_info
    before = memory().rss

    async def ask(
        url: str, count: int = 4, options: HttpOptions = credentials, **more: Any
    ) -> list[RewardResult]:
        given = {"secret": SECRET, "observer": seen, "on_wait": said.append, **more}
        source = HttpReward("r", url, options=options, **given)
        opened.append(source)
        try:
            results = await source.score(make_samples(count), context)
        except RewardMisconfiguredError as error:
            said.append(f"{error!r} {error.message}")
            raise
        said.append(repr(results))
        return results

    yield ask
    for source in opened:
        await source.aclose()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert memory().rss - before < GROWTH_BYTES
    logged = [
        record.getMessage()
        for phase in ("call", "teardown")
        for record in caplog.get_records(phase)
    ]
    everything = "\n".join([*logged, *said, *seen.messages, *map(repr, seen.records)])
    for hidden in (SECRET, SECRET.removeprefix("whsec_"), TOKEN, KEY):
        assert hidden[:12] not in everything


# --- results that come later -----------------------------------------------------------------------------------------------


@pytest.fixture
def later(fast: HttpOptions) -> HttpOptions:
    return replace(fast, allow_async=True)


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_results, "FIRST_POLL_SECONDS", 0.02)
    monkeypatch.setattr(async_results, "SHORTEST_POLL_SECONDS", 0.01)


@pytest.fixture
def judging() -> ModuleType:
    """What reward services do that answer later."""
    return later_judges
