"""Metrics of long jobs: how fast they are stored, and how fast a chart of them is there.

The same points go to this service and to the tracking server of mlflow, which gets a venv of its
own, both with SQLite, in calls of about 1,000 points: one series of many steps, and 50 series of a
fiftieth of them. A chart has 1,000 points of each series. mlflow takes a sample of the points, this
service keeps the least and the greatest value of each bucket.

Arguments: number of points (default 1,000,000), of those for mlflow (default: the same; 0: without
it), and mlflow's version.
"""

import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import orjson
from bench_ingest import NODE, claim_jobs, service
from stack import report, wait_until_up

from dar.processes import free_port
from dar.protocol.metrics import METRICS
from dar.settings import environment, load_settings
from worker.api import WorkerClient

MLFLOW = "3.18.0"
POINTS = 1_000_000
CALL = 1_000
"""Points of a call."""
ROWS = 500
"""Most rows of a batch."""
SERIES = 50
CHART = 1_000
QUERIES = 20
NAMES = [metric.name for metric in METRICS][:SERIES]
Figures = dict[str, float]


def value(step: int) -> float:
    """A noisy value."""
    return (step * 7919 % 10_007) / 10_007 + step / 1e6


def steps_of_calls(points: int, series: int, most: int) -> Iterator[range]:
    """The steps of each call, which have values of all series."""
    steps, size = points // series, min(most, CALL // series)
    for first in range(1, steps + 1, size):
        yield range(first, min(first + size, steps + 1))


def times(call: Callable[[], object], count: int) -> Figures:
    """Milliseconds of a call."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    p95 = statistics.quantiles(seconds, n=20)[-1] if count > 1 else seconds[0]
    return {
        "p50_ms": round(statistics.median(seconds) * 1e3, 1),
        "p95_ms": round(p95 * 1e3, 1),
    }


def measure_service(points: int) -> dict[str, Figures]:
    """The figures of this service."""
    home = Path(tempfile.mkdtemp(prefix="dar-bench-"))
    found: dict[str, Figures] = {}
    try:
        with service(home, None) as url:
            leases = claim_jobs(home, url)
            key = (home / "api_key").read_text().strip()
            http = httpx2.Client(
                base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60
            )
            for series in (1, SERIES):
                lease = next(leases)
                client = WorkerClient(url, lease.token, node=NODE)
                started = time.perf_counter()
                for steps in steps_of_calls(points, series, ROWS):
                    rows = [
                        {
                            "type": "metrics",
                            "seq": step,
                            "at": 1.8e9 + step,
                            "step": step,
                            "values": dict.fromkeys(NAMES[:series], value(step)),
                        }
                        for step in steps
                    ]
                    client.batch(lease.lease_id, lease.attempt, map(orjson.dumps, rows))
                stored = points / (time.perf_counter() - started)
                path = f"/v1/fine_tuning/jobs/{lease.job_id}/metrics?max_points={CHART}"

                def chart(path: str = path, series: int = series) -> None:
                    answer = http.get(path).raise_for_status().json()["series"]
                    assert len(answer) == series
                    least = min(CHART, points // series) / 3
                    assert all(least < len(one["step"]) <= CHART for one in answer.values())

                found[f"series_{series}"] = {
                    "points_per_second": round(stored),
                    **times(chart, QUERIES),
                }
    finally:
        shutil.rmtree(home)
    return found


def mlflow_program(version: str) -> Path:
    """The mlflow program in its venv, which is made the first time."""
    folder = load_settings().cache_home / "dar" / "bench" / f"mlflow-{version}"
    program = folder / "bin" / "mlflow"
    if not program.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [folder / "bin" / "pip", "install", "--quiet", f"mlflow=={version}"], check=True
        )
    return program


@contextlib.contextmanager
def mlflow_server(version: str) -> Iterator[str]:
    """Its tracking server with SQLite and one process; yields its URL."""
    folder = Path(tempfile.mkdtemp(prefix="mlflow-bench-"))
    url = f"http://127.0.0.1:{(port := free_port())}"
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    process = subprocess.Popen(
        [str(mlflow_program(version)), "server", *store, "--port", str(port)],
        env=environment(),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_up(url, 120, "/health")
        yield url
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


def measure_mlflow(points: int, version: str) -> dict[str, Figures]:
    """The figures of mlflow."""
    found: dict[str, Figures] = {}
    with mlflow_server(version) as url:
        http = httpx2.Client(base_url=url, timeout=120, trust_env=False)
        api = "/api/2.0/mlflow"
        made = http.post(f"{api}/experiments/create", json={"name": "bench"}).raise_for_status()
        body = {"experiment_id": made.json()["experiment_id"], "start_time": 0}
        for series in (1, SERIES):
            answer = http.post(f"{api}/runs/create", json=body).raise_for_status()
            run_id = answer.json()["run"]["info"]["run_id"]
            started = time.perf_counter()
            for steps in steps_of_calls(points, series, CALL):
                metrics = [
                    {"key": name, "value": value(step), "step": step, "timestamp": 1_800_000 + step}
                    for step in steps
                    for name in NAMES[:series]
                ]
                call = {"run_id": run_id, "metrics": metrics}
                http.post(f"{api}/runs/log-batch", json=call).raise_for_status()
            stored = points / (time.perf_counter() - started)

            def chart(run_id: str = run_id, series: int = series) -> None:
                for name in NAMES[:series]:
<<<<<<< ours
                    asked: dict[str, str | int] = {
                        "run_ids": run_id,
                        "metric_key": name,
                        "max_results": CHART,
                    }
=======
                    asked: dict[str, str | int] = {"run_ids": run_id, "metric_key": name}
                    asked["max_results"] = CHART
>>>>>>> theirs
                    path = "/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval"
                    found = http.get(path, params=asked).raise_for_status().json()
                    assert len(found["metrics"]) > min(CHART, points // series) / 3

            found[f"series_{series}"] = {"points_per_second": round(stored), **times(chart, 5)}
    return found


def main() -> None:
    """Measure and report."""
    points = int(sys.argv[1]) if len(sys.argv) > 1 else POINTS
    peer_points = int(sys.argv[2]) if len(sys.argv) > 2 else points
    version = sys.argv[3] if len(sys.argv) > 3 else MLFLOW
    figures: dict[str, object] = {"service": measure_service(points)}
    if peer_points:
        found = measure_mlflow(peer_points, version)
        figures |= {"mlflow_version": version, "mlflow_points": peer_points, "mlflow": found}
    report("metrics", points=points, chart_points=CHART, **figures)


if __name__ == "__main__":
    main()
