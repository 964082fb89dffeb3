"""What a checkpoint of 1 GiB costs on its way to a bucket and back, with a real S3 server.

A worker's uploader sends it and the SDK fetches it, as in production. The service only signs and
verifies, so its CPU and memory should not notice. In turn with them obstore alone moves the same
bytes, which is what the disk, the server and this machine's cores allow.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import obstore
import psutil
from obstore.store import S3Store
from stack import report, wait_until_up

from dar.client import Client
from dar.processes import answers, free_port
from dar.protocol.checkpoints import Manifest, ManifestFile
from dar.protocol.worker import Claim, Lease, NewCheckpointRow
from dar.settings import environment
from worker.api import WorkerClient
from worker.folders import AttemptRecord, SlotFolder
from worker.supervisor.checkpoints import CheckpointUploader
from worker.supervisor.state import AttemptState

SIZE = 1024**3
BLOCK = 16 * 1024**2
ROUNDS = 3
BUCKET, KEY, SECRET, REGION = "dar", "bench-key", "bench-secret", "us-east-1"
NODE = "bench"
WEIGHTS = "model.safetensors"


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """An S3 server with an empty bucket; yields its URL."""
    folder.mkdir()
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    identity = {"name": "bench", "credentials": credentials, "actions": ["Admin"]}
    (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
    names = ("master", "volume", "filer", "s3", "admin")
    ports = {f"{name}.port{kind}": free_port() for name in names for kind in ("", ".grpc")}
    options = [
        *("-dir", str(folder), "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}"),
        *(f"-{name}={port}" for name, port in ports.items()),
        *(f"-s3.config={folder / 'identities.json'}", "-master.volumeSizeLimitMB=1024"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false"),
        "-master.telemetry=false",
    ]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("weed"), "mini", *options],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        until = time.monotonic() + 60
        while True:
            try:
                obstore.put(bucket(url), "ready", b"")
            except Exception:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
            else:
                break
        yield url
    finally:
        process.kill()
        process.wait()


def bucket(url: str) -> S3Store:
    """The bucket, as obstore alone uses it."""
    return S3Store(
        BUCKET,
        endpoint=url,
        access_key_id=KEY,
        secret_access_key=SECRET,
        region=REGION,
        client_options={"allow_http": True, "timeout": timedelta(minutes=10)},
    )


@contextlib.contextmanager
def service(home: Path, s3_url: str) -> Iterator[tuple[str, psutil.Process]]:
    """A service on the bucket; yields its URL and its process."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve", "--port", str(port)],
        env=environment(
            home=home,
            egress_allow_cidrs="127.0.0.0/8",
            egress_allow_http="127.0.0.1",
            lease_ttl_seconds=3600,  # nobody renews it
            storage_url=f"s3://{BUCKET}/dar",
            s3_endpoint=s3_url,
            s3_region=REGION,
            s3_access_key_id=KEY,
            s3_secret_access_key=SECRET,
        ),
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(url)
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def claim(home: Path, url: str, client: Client) -> Lease:
    """A running job that no trainer trains."""
    folder = home / "models" / "nothing"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    component = {"name": "none", "url": "http://127.0.0.1:61999/score"}
    dar = {"rewards": {"components": [component]}, "hyperparameters": {"max_steps": 10**6}}
    file_id = client.files.create(b'{"prompt": "Once"}\n', filename="one.jsonl").id
    client.jobs.create(model="nothing", training_file=file_id, method={"type": "dar", "dar": dar})
    with contextlib.closing(
        WorkerClient(url, (home / "worker_key").read_text().strip(), node=NODE)
    ) as worker:
        lease = worker.claim(Claim(node=NODE, slot="0", incarnation="one", boot_id="one"))
    assert lease is not None
    return lease


class Bench:
    """One job's checkpoints, sent and fetched; and the same bytes by obstore alone."""

    def __init__(self, folder: Path, s3_url: str, url: str, client: Client, lease: Lease) -> None:
        self._folder, self._client, self._lease = folder, client, lease
        self._store, self._url = bucket(s3_url), url
        attempt = SlotFolder.of(folder, "bench").attempt(lease.lease_id)
        attempt.create(AttemptRecord(lease_id=lease.lease_id, job_id=lease.job_id, attempt=1))
        self._state = AttemptState(lease, attempt, threading.Event())
        self._checkpoints = attempt.work / "checkpoints"
        self._content = folder / WEIGHTS
        digest = hashlib.sha256()
        with self._content.open("wb") as file:
            for _ in range(SIZE // BLOCK):
                block = os.urandom(BLOCK)
                digest.update(block)
                file.write(block)
        self._file = ManifestFile(name=WEIGHTS, bytes=SIZE, sha256=digest.hexdigest())

    def _publish(self, step: int) -> NewCheckpointRow:
        folder = self._checkpoints / f"step-{step}"
        folder.mkdir(parents=True)
        os.link(self._content, folder / WEIGHTS)
        manifest = Manifest(step=step, kind="full", config_sha256="0" * 64, files=[self._file])
        content = manifest.model_dump_json(indent=1).encode()
        (folder / "MANIFEST.json").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        return NewCheckpointRow(
            type="checkpoint",
            seq=step,
            at=1.8e9,
            step=step,
            folder=folder.name,
            manifest_sha256=sha256,
        )

    def send(self, step: int) -> str:
        """Upload a checkpoint as a worker does; returns its id."""
        with contextlib.closing(WorkerClient(self._url, self._lease.token, node=NODE)) as worker:
            uploader = CheckpointUploader(self._state, worker, keep_last=3)
            uploader.take(self._publish(step))
            uploader.finish()
            uploader.run()
        return uploader.committed[step]

    def fetch(self, checkpoint_id: str) -> None:
        """Download it as a user does, verified."""
        target = self._folder / "fetched"
        self._client.checkpoints.download(self._lease.job_id, checkpoint_id, target)
        assert (target / WEIGHTS).stat().st_size == SIZE
        shutil.rmtree(target)

    def send_alone(self) -> None:
        """The same bytes by obstore."""
        obstore.put(self._store, "alone", self._content)

    def fetch_alone(self) -> None:
        """The same bytes by obstore."""
        target = self._folder / "alone"
        with target.open("wb") as file:
            for chunk in obstore.get(self._store, "alone").stream(min_chunk_size=1024**2):
                file.write(chunk)
        assert target.stat().st_size == SIZE
        target.unlink()


def mib_per_second(call: Callable[[], object]) -> float:
    """Rate of a call that moves the checkpoint."""
    started = time.perf_counter()
    call()
    return SIZE / 1024**2 / (time.perf_counter() - started)


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time that a process has used."""
    used = process.cpu_times()
    return used.user + used.system


def measure(bench: Bench, process: psutil.Process) -> dict[str, object]:
    """Rates of all four ways, in turn, and what the service used for two of them."""
    rates: dict[str, list[float]] = {"send": [], "alone": [], "fetch": [], "fetch_alone": []}
    cpu, grown = [], []
    for step in range(1, ROUNDS + 1):
        rates["alone"].append(mib_per_second(bench.send_alone))
        used, memory = cpu_seconds(process), process.memory_info().rss
        made: list[str] = []
        rates["send"].append(mib_per_second(lambda: made.append(bench.send(step))))  # noqa: B023 - called at once
        rates["fetch"].append(mib_per_second(lambda: bench.fetch(made[0])))  # noqa: B023 - called at once
        cpu.append(cpu_seconds(process) - used)
        grown.append((process.memory_info().rss - memory) / 1024**2)
        rates["fetch_alone"].append(mib_per_second(bench.fetch_alone))
    median = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "upload_mib_per_second": round(median["send"]),
        "obstore_put_mib_per_second": round(median["alone"]),
        "upload_share": round(median["send"] / median["alone"], 2),
        "download_mib_per_second": round(median["fetch"]),
        "obstore_get_mib_per_second": round(median["fetch_alone"]),
        "download_share": round(median["fetch"] / median["fetch_alone"], 2),
        "service_cpu_seconds": round(max(cpu), 2),
        "service_rss_growth_mib": round(sum(grown), 1),
        "rounds": ROUNDS,
    }


def main() -> None:
    """Measure and report."""
    folder = Path(tempfile.mkdtemp(prefix="dar-bench-"))
    try:
        with (
            seaweedfs(folder / "seaweed") as s3_url,
            service(folder / "home", s3_url) as (url, process),
        ):
            assert answers(f"{url}/readyz")
            key = (folder / "home" / "api_key").read_text().strip()
            with Client(api_key=key, base_url=url) as client:
                lease = claim(folder / "home", url, client)
                bench = Bench(folder, s3_url, url, client, lease)
                report("storage", bytes=SIZE, **measure(bench, process))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
