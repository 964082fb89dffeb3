"""Reward services of both kinds: real ones made by the decorator, and hostile ones on bare
sockets.
"""

import asyncio
import contextlib
import ctypes
import gc
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
from starlette.applications import Starlette

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_spec import RewardBatching, RewardLimits, RewardRetry, RewardTimeouts
from dar.rewards.base import RewardContext, RewardResult, RewardSample
from dar.rewards.http import async_results
from dar.rewards.http_reward import HttpOptions, HttpReward
from fakes.hostile_manners import hostile_server
from fakes.loopback import serving
from fakes.observer import Seen
from fakes.reward_server import RewardServer
from fakes.reward_types import MakeSamples

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
def make_samples() -> MakeSamples:
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
        yield lambda app: stack.enter_context(serving(app))


@pytest.fixture
def hostile() -> Iterator[Callable[..., RewardServer]]:
    """Starts reward services with manners."""
    with contextlib.ExitStack() as stack:
        yield lambda *manners: stack.enter_context(RewardServer(*manners))


@pytest.fixture
async def ask(
    fast: HttpOptions, make_samples: MakeSamples, context: RewardContext
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
    await asyncio.sleep(0)  # in which their connections end


@pytest.fixture
def server() -> Iterator[RewardServer]:
    """A server whose paths misbehave, each in its own way."""
    with hostile_server() as running:
        yield running


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
    make_samples: MakeSamples,
    context: RewardContext,
    seen: Seen,
    caplog: pytest.LogCaptureFixture,
) -> AsyncIterator[Callable[..., Any]]:
    """Score samples with the service at a URL, with all credentials.

    Afterwards nothing may be left running, no secret may have been said anywhere, and the process
    may not have grown.
    """
    caplog.set_level(logging.DEBUG)
    opened: list[HttpReward] = []
    said: list[str] = []
    memory = psutil.Process().memory_info
    gc.collect()  # what other tests of this process have left
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
    gc.collect()
    if memory().rss - before >= GROWTH_BYTES:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is no growth
    assert memory().rss - before < GROWTH_BYTES
    logged = [
        record.getMessage()
        for phase in ("call", "teardown")
        for record in caplog.get_records(phase)
    ]
    everything = "\n".join([*logged, *said, *seen.messages, *map(repr, seen.records)])
    for hidden in (SECRET, SECRET.removeprefix("whsec_"), TOKEN, KEY):
        assert hidden[:12] not in everything


# --- results that come later ----------------------------------------------------------------------


@pytest.fixture
def later(fast: HttpOptions) -> HttpOptions:
    return replace(fast, allow_async=True)


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_results, "FIRST_POLL_SECONDS", 0.02)
    monkeypatch.setattr(async_results, "SHORTEST_POLL_SECONDS", 0.01)
