"""An answer in very many chunks holds up no other request."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from dar.rewards.base import Scored
from dar.rewards.http.connection import _end_of_chunks
from dar.rewards.http_reward import HttpOptions
from fakes.reward_server import RewardServer, ScoreRequest, result_of

CHUNKS = 60_000
MOST_SECONDS = 0.06
"""CPU time of the event loop between two turns of another task."""


def in_chunks(request: ScoreRequest) -> None:
    """Answer with the first bytes in one chunk, and white space of one byte in each of the rest."""
    body = result_of(request, 1, 2, 3, 4)
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    whole = head + b"%x\r\n%b\r\n" % (len(body), body) + b"1\r\n \r\n" * CHUNKS
    request.send(whole + b"0\r\n\r\n")
    request.keeps = True


async def longest_turn(done: asyncio.Event) -> float:
    """The longest time that other tasks of the loop have computed in a row."""
    longest, before = 0.0, time.thread_time()
    while not done.is_set():
        await asyncio.sleep(0)
        now = time.thread_time()
        longest, before = max(longest, now - before), now
    return longest


async def test_an_answer_in_very_many_chunks_leaves_turns_to_other_requests(
    hostile: Callable[..., RewardServer], ask: Callable[..., Any], fast: HttpOptions
) -> None:
    server = hostile(in_chunks)
    done = asyncio.Event()
    turns = asyncio.create_task(longest_turn(done))
    found = await ask(server.url, options=fast)
    done.set()
    assert await turns < MOST_SECONDS
    assert found == [Scored(1.0), Scored(2.0), Scored(3.0), Scored(4.0)]
    again = await ask(server.url, options=fast)
    assert again == found


def test_the_end_of_few_chunks_is_found_and_many_are_not_counted() -> None:
    few = bytearray(b"1\r\n \r\n" * 900 + b"0\r\n\r\n")
    assert _end_of_chunks(few, 0) == len(few)
    many = bytearray(b"1\r\n \r\n" * 1_500_000 + b"0\r\n\r\n")
    started = time.thread_time()
    try:
        _end_of_chunks(many, 0)
    except ValueError:
        assert time.thread_time() - started < MOST_SECONDS
    else:
        raise AssertionError("all chunks were counted")
