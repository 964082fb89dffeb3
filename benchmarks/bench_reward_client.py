"""Throughput and latency of the reward client with a service that does nothing.

The service is another process on bare sockets, so that its own work is as small as it can be and
the client's shows.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
from stack import report

from dar.protocol.reward_spec import RewardBatching, RewardLimits
from dar.rewards.base import RewardContext, RewardSample, Scored
from dar.rewards.http_reward import HttpOptions, HttpReward

RUNS = 7
SAMPLES = 4
SAMPLE_CHARS = 1024
THROUGHPUT_SLOTS, THROUGHPUT_REQUESTS = 32, 1500
LATENCY_SLOTS, LATENCY_REQUESTS = 4, 600
SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class NoOp(asyncio.Protocol):
    """Answers every POST on a connection with a reward of 0.5 for each sample."""

    def __init__(self) -> None:
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer what is complete."""
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            start = head.index(b"content-length: ") + 16
            length = int(head[start:].split(b"\r\n", 1)[0])
            if len(self._data) < end + 4 + length:
                return
            request = orjson.loads(self._data[end + 4 : end + 4 + length])
            self._data = self._data[end + 4 + length :]
            body = orjson.dumps(
                {"request_id": request["request_id"], "rewards": [0.5] * len(request["samples"])}
            )
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (len(body), body)
            )


async def serve() -> None:
    """Serve until killed; says where on stdout."""
    server = await asyncio.get_running_loop().create_server(NoOp, "127.0.0.1", 0)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()


@contextmanager
def service() -> Iterator[str]:
    """The service in a process of its own; gives its URL."""
    process = subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        port = json.loads(process.stdout.readline())["port"]
        yield f"http://127.0.0.1:{port}/score"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def group(number: int) -> list[RewardSample]:
    """The completions of one prompt."""
    return [
        RewardSample(
            id=f"s{number}.{index}",
            group_id=f"g{number}",
            index=index,
            prompt="The soup was",
            messages=None,
            completion="x" * SAMPLE_CHARS,
            finish_reason="stop",
            completion_tokens=200,
        )
        for index in range(SAMPLES)
    ]


async def seconds_of(url: str, slots: int, requests: int) -> tuple[float, list[float]]:
    """Seconds of all requests and of each; ``slots`` callers each wait for their answer."""
    source = HttpReward(
        "noop",
        url,
        secret=SECRET,
        options=HttpOptions(
            batch=RewardBatching(max_samples=SAMPLES), limits=RewardLimits(concurrency=slots)
        ),
    )
    context = RewardContext(step=1, job_id="ftjob-bench")
    groups = [group(number) for number in range(requests)]
    each: list[float] = []

    async def caller() -> None:
        while groups:
            samples = groups.pop()
            started = time.perf_counter()
            results = await source.score(samples, context)
            each.append(time.perf_counter() - started)
            assert results == [Scored(0.5)] * SAMPLES

    await asyncio.gather(*[source.score(group(10**6 + n), context) for n in range(slots)])
    started = time.perf_counter()
    await asyncio.gather(*[caller() for _ in range(slots)])
    total = time.perf_counter() - started
    await source.aclose()
    return total, each


def main() -> None:
    """Measure and report."""
    rates, p50s, p99s = [], [], []
    with service() as url:
        for _ in range(RUNS):
            total, _ = asyncio.run(seconds_of(url, THROUGHPUT_SLOTS, THROUGHPUT_REQUESTS))
            rates.append(THROUGHPUT_REQUESTS / total)
            _, each = asyncio.run(seconds_of(url, LATENCY_SLOTS, LATENCY_REQUESTS))
            p50s.append(statistics.median(each))
            p99s.append(statistics.quantiles(each, n=100)[-1])
    report(
        "reward_client",
        requests_per_second=round(statistics.median(rates)),
        p50_ms=round(statistics.median(p50s) * 1e3, 2),
        p99_ms=round(statistics.median(p99s) * 1e3, 2),
        in_flight_for_rate=THROUGHPUT_SLOTS,
        in_flight_for_latency=LATENCY_SLOTS,
        runs=RUNS,
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        asyncio.run(serve())
    else:
        main()
