"""How soon 1,000 readers of a job's stream have an event, and what idle streams cost others.

One worker reports a step five times a second. A reader is a connection with the stream of that job;
all are in one process, which only notes when bytes arrive. Half of the readers are cut off at some
time and come back with the id of the last frame that they have.
"""

import asyncio
import random
import re
import resource
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import orjson
import psutil
from bench_ingest import NAMES, NODE, claim_jobs, service
from stack import report

from dar.client import Client
from dar.protocol.worker import Lease
from worker.api import WorkerClient

FILES = 4096
READERS = 1000
IDLE = 1500
EVENTS = 150
PAUSE_SECONDS = 0.2
FIRST_EVENTS = 2
"""Those of a job that was submitted and claimed."""
CALLS = 200
FRAME = re.compile(rb"id: (\d+)\nevent: \w+\ndata: [^\n]*\n\n")


@dataclass
class StreamReader(asyncio.Protocol):
    """One connection after the other of one reader."""

    request: bytes
    frames: list[tuple[int, float]] = field(default_factory=list)
    """Number and arrival of each frame."""
    rest: bytes = b""
    transport: asyncio.Transport | None = None
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the first frames have arrived."""

    async def open(self, host: str, port: int) -> None:
        self.rest = b""
        last = f"last-event-id: {self.frames[-1][0] if self.frames else 0}\r\n\r\n".encode()
        loop = asyncio.get_running_loop()
        self.transport, _ = await loop.create_connection(lambda: self, host, port)
        self.transport.write(self.request + last)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self.rest += data
        end = 0
        for found in FRAME.finditer(self.rest):
            self.frames.append((int(found[1]), now))
            end = found.end()
        self.rest = self.rest[end:]
        if len(self.frames) >= FIRST_EVENTS:
            self.is_ready.set()


def request_of(url: str, key: str, job_id: str) -> tuple[str, int, bytes]:
    """Host, port and all but the end of the request for a stream."""
    where = urlsplit(url)
    assert where.hostname is not None
    assert where.port is not None
    head = (
        f"GET /v1/fine_tuning/jobs/{job_id}/stream HTTP/1.1\r\nhost: bench\r\n"
        f"authorization: Bearer {key}\r\n"
    )
    return where.hostname, where.port, head.encode()


async def open_all(readers: list[StreamReader], host: str, port: int) -> None:
    for first in range(0, len(readers), 50):
        some = readers[first : first + 50]
        await asyncio.gather(*(reader.open(host, port) for reader in some))
        await asyncio.gather(*(reader.is_ready.wait() for reader in some))


def write(url: str, lease: Lease, sent: dict[int, float]) -> None:
    """Report steps, and note when each was sent."""
    client = WorkerClient(url, lease.token, node=NODE)
    for seq in range(1, EVENTS + 1):
        values = {name: seq / (3 + place) for place, name in enumerate(NAMES)}
        row = {"type": "metrics", "seq": seq, "at": 1.8e9, "step": seq, "values": values}
        started = time.monotonic()
        sent[FIRST_EVENTS + seq] = started
        client.batch(lease.lease_id, lease.attempt, [orjson.dumps(row)])
        time.sleep(max(0.0, started + PAUSE_SECONDS - time.monotonic()))


async def follow(url: str, key: str, lease: Lease, process: psutil.Process) -> dict[str, object]:
    """Delays of all frames, and whether each reader has each event once."""
    host, port, head = request_of(url, key, lease.job_id)
    readers = [StreamReader(head) for _ in range(READERS)]
    await open_all(readers, host, port)
    sent: dict[int, float] = {}
    process.cpu_percent()
    writer = threading.Thread(target=write, args=(url, lease, sent))
    writer.start()
    unlucky = readers[: READERS // 2]
    came_back: set[tuple[int, int]] = set()
    while writer.is_alive():
        await asyncio.sleep(EVENTS * PAUSE_SECONDS / len(unlucky) / 2)
        if unlucky:
            reader = unlucky.pop(random.randrange(len(unlucky)))
            assert reader.transport is not None
            reader.transport.abort()
            came_back.add((id(reader), reader.frames[-1][0]))
            await reader.open(host, port)
    cpu = process.cpu_percent()
    await asyncio.sleep(2)
    whole = list(range(1, FIRST_EVENTS + EVENTS + 1))
    wrong = sum([seq for seq, _ in reader.frames] != whole for reader in readers)
    delays = sorted(
        (at - sent[seq]) * 1e3 for reader in readers for seq, at in reader.frames if seq in sent
    )
    for reader in readers:
        assert reader.transport is not None
        reader.transport.abort()
    return {
        "p50_ms": round(statistics.median(delays), 1),
        "p95_ms": round(delays[int(len(delays) * 0.95)], 1),
        "p99_ms": round(delays[int(len(delays) * 0.99)], 1),
        "reconnects": len(came_back),
        "readers_with_a_lost_or_repeated_event": wrong,
        "service_cpu_percent": round(cpu),
        "service_rss_mb": round(process.memory_info().rss / 2**20),
    }


def calls(client: Client, job_id: str) -> float:
    """Median milliseconds of a GET of a job."""
    seconds = []
    for _ in range(CALLS):
        started = time.perf_counter()
        client.jobs.retrieve(job_id)
        seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds) * 1e3, 2)


async def idle(url: str, key: str, lease: Lease, process: psutil.Process) -> dict[str, object]:
    """What a GET takes without and with idle streams."""
    host, port, head = request_of(url, key, lease.job_id)
    readers = [StreamReader(head) for _ in range(IDLE)]
    with Client(api_key=key, base_url=url) as client:
        alone = await asyncio.to_thread(calls, client, lease.job_id)
        await open_all(readers, host, port)
        process.cpu_percent()
        await asyncio.sleep(10)
        cpu = process.cpu_percent()
        beside = await asyncio.to_thread(calls, client, lease.job_id)
    for reader in readers:
        assert reader.transport is not None
        reader.transport.abort()
    return {"get_p50_ms": alone, "get_p50_ms_beside": beside, "service_cpu_percent": round(cpu, 1)}


def main() -> None:
    """Measure and report."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    home = Path(tempfile.mkdtemp(prefix="dar-bench-"))
    try:
        with service(home, None) as url:
            leases = claim_jobs(home, url)
            key = (home / "api_key").read_text().strip()
            process = next(
                one
                for one in psutil.Process().children(recursive=True)
                if any("service" in part or part == "serve" for part in one.cmdline())
                and not one.children()
            )
            busy = asyncio.run(follow(url, key, next(leases), process))
            quiet = asyncio.run(idle(url, key, next(leases), process))
    finally:
        shutil.rmtree(home)
    report("stream", readers=READERS, events=EVENTS, **busy, idle_streams=IDLE, idle=quiet)


if __name__ == "__main__":
    main()
