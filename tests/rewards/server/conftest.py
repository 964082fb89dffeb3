"""Hand-made requests to reward servers, and functions that wait until they may answer."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest

from dar.rewards.http.signing import decode_secret, signed_headers
from dar.rewards.server import callbacks, reward_server


@pytest.fixture
def token() -> str:
    return "rwt_" + "t" * 43


def content_of(
    request_id: str = "rwq_1",
    completions: tuple[str, ...] = ("a", "bb"),
    *,
    seconds: float = 60,
    is_async: bool = False,
    callback: dict[str, str] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A request of ``dar.reward.v1``."""
    now = datetime.now(UTC)
    samples = [
        {
            "id": f"s{index}",
            "group_id": "g0",
            "index": index,
            "prompt": "p",
            "messages": None,
            "completion": completion,
            "finish_reason": "stop",
            "completion_tokens": 1,
            "ground_truth": None,
            "columns": {"x": 1, "y": 2**70},
            "metadata": {"policy_version": 2, "truncated": False},
        }
        for index, completion in enumerate(completions)
    ]
    reply = {
        "modes": ["sync", "async"] if is_async else ["sync"],
        "deadline": (now + timedelta(seconds=seconds)).isoformat(),
        **({} if callback is None else {"callback": callback}),
    }
    return {
        "type": "reward.request", "version": "dar.reward.v1", "request_id": request_id, "job_id": "ftjob-1",
        "component": "r", "step": 3, "mode": "train", "created_at": now.isoformat(), "samples": samples, "reply": reply,
        **changes,
    }  # fmt: skip


@pytest.fixture
def content() -> Callable[..., dict[str, Any]]:
    return content_of


class Asking:
    """A client that sends exactly what the test says."""

    def __init__(self, url: str, secret: str | None) -> None:
        self.url = url
        self.client = httpx2.AsyncClient(base_url=url, trust_env=False, timeout=30)
        self._keys = [] if secret is None else [decode_secret(secret)]

    def signed(self, message_id: str, body: bytes) -> dict[str, str]:
        return signed_headers(self._keys, message_id, int(datetime.now(UTC).timestamp()), body)

    async def post(
        self, content: dict[str, Any] | None = None, message_id: str | None = None
    ) -> httpx2.Response:
        content = content or content_of()
        body = json.dumps(content).encode()
        headers = {
            "content-type": "application/json",
            **self.signed(message_id or content["request_id"], body),
        }
        return await self.client.post("/score", content=body, headers=headers)

    async def poll(
        self, request_id: str = "rwq_1", message_id: str | None = None
    ) -> httpx2.Response:
        headers = self.signed(message_id or request_id, b"")
        return await self.client.get(f"/results/{request_id}", headers=headers)

    async def result(self, request_id: str = "rwq_1") -> httpx2.Response:
        while True:
            answer = await self.poll(request_id)
            if answer.status_code != 202:
                return answer
            await asyncio.sleep(0.01)


@pytest.fixture
async def asker() -> AsyncIterator[Callable[..., Asking]]:
    """Gives a client of the server at a URL."""
    made: list[Asking] = []

    def make(url: str, secret: str | None = None) -> Asking:
        made.append(Asking(url, secret))
        return made[-1]

    yield make
    for item in made:
        await item.client.aclose()


@pytest.fixture
def asking(
    serve_app: Callable[..., str], asker: Callable[..., Asking], secret: str
) -> Callable[..., Asking]:
    """Serves a function and gives a client of it."""

    def make(function: Any, secret: str | None = secret, **options: Any) -> Asking:
        return asker(serve_app(reward_server(secret=secret, **options)(function)), secret)

    return make


@dataclass
class Gate:
    """A reward function that waits until it may answer, with the length of each completion."""

    calls: list[list[str]] = field(default_factory=list)
    began: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, prompts: Any, completions: list[str], **_: Any) -> list[float]:
        self.calls.append(completions)
        self.began.set()
        assert self.opened.wait(30)
        return [float(len(text)) for text in completions]


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture(autouse=True)
def quick_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
async def eventually() -> Callable[..., Any]:
    """Waits until a condition holds; the test's own time limit ends it."""

    async def wait(holds: Callable[[], object]) -> None:
        while not holds():  # noqa: ASYNC110 - what is waited for happens in other threads and processes
            await asyncio.sleep(0.01)

    return wait
