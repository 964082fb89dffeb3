"""The examples as a user starts them: a process of its own, real sockets, signed requests."""

import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dar.protocol.reward_spec import RewardRetry
from dar.rewards.base import RewardContext, RewardResult, RewardSample
from dar.rewards.http import HttpOptions, HttpReward
from dar.settings import environment

ROOT = Path(__file__).parents[2]
SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture
def example(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Callable[..., str]]:
    """Starts an example with options; gives the URL of its reward service once it answers."""
    (tmp_path / "secret").write_text(SECRET)
    running: list[subprocess.Popen[bytes]] = []

    def start(name: str, *options: str) -> str:
        port = free_port()
        command = [sys.executable, str(ROOT / "examples" / name), "--port", str(port)]
        process = subprocess.Popen(
            [*command, "--secret-file", str(tmp_path / "secret"), *options], env=environment()
        )
        running.append(process)
        while process.poll() is None:
            with contextlib.suppress(httpx2.TransportError):
                httpx2.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)
                return f"http://127.0.0.1:{port}/score"
            time.sleep(0.05)
        pytest.fail(f"{name} ended with {process.returncode}")

    yield start
    for process in running:
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture
async def score() -> AsyncIterator[Callable[..., Any]]:
    """Score completions with the service at a URL; each is asked for once."""
    opened: list[HttpReward] = []

    async def ask(
        url: str, completions: list[str], *, signing: str = SECRET, **fields: Any
    ) -> list[RewardResult]:
        options = HttpOptions(retry=RewardRetry(attempts=1))
        opened.append(HttpReward("r", url, secret=signing, options=options))
        given = {"prompt": "p", "messages": None, "finish_reason": "stop", "completion_tokens": 1, **fields}  # fmt: skip
        samples = [
            RewardSample(id=f"s{n}", group_id="g0", index=n, completion=text, **given)
            for n, text in enumerate(completions)
        ]
        return await opened[-1].score(samples, RewardContext(1))

    yield ask
    for source in opened:
        await source.aclose()
