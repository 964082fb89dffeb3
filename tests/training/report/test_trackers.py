"""Trackers (`report_to`), themselves and not stand-ins: every metric arrives, and an offline run
asks no network.
"""

import json
import socketserver
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from dar.settings import inherited_environment
from fakes import tiny_models

pytestmark = pytest.mark.slow  # each tracker runs in a process of its own, which imports torch

Points = dict[str, dict[int, float]]
"""Name -> step -> value."""

STEPS, LOGGED = 3, (2, 3)
"""Reports come every two steps; the last step has one anyway."""


class CountingServer(socketserver.ThreadingTCPServer):
    """Takes the place of the internet, and counts who wants to go there."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        super().__init__(("127.0.0.1", 0), CountingRequest)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class CountingRequest(socketserver.StreamRequestHandler):
    server: CountingServer

    def handle(self) -> None:
        self.server.asked.append(self.rfile.readline())


@pytest.fixture(scope="module")
def internet() -> Iterator[CountingServer]:
    with CountingServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def write_inputs(folder: Path) -> None:
    tiny_models.save(tiny_models.policy(num_hidden_layers=1), folder / "model")
    rows = [json.dumps({"prompt": f"w{i} w{i + 1}"}) for i in range(4, 10)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "test.jsonl").write_text("\n".join(rows[:2]))
    (folder / "judge.py").write_text(
        "def short(prompts, completions, **columns):\n"
        "    return [-len(text) / 40 for text in completions]\n"
    )
    (folder / "run.yaml").write_text(
        f"""
model_name_or_path: model
dataset_name: .
output_dir: out
reward_function: judge:short
max_steps: {STEPS}
logging_steps: 2
eval_strategy: steps
eval_steps: {STEPS}
max_new_tokens: 4
per_device_train_batch_size: 2
use_cpu: true
save_strategy: "no"
report_to: [tensorboard, wandb, trackio]
project: trial
run_name: first
"""
    )


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    internet: CountingServer,
) -> Path:
    """Of a run from a YAML file, with three trackers."""
    folder = tmp_path_factory.mktemp("trackers")
    write_inputs(folder)
    settings = {
        **inherited_environment(("PATH", "HOME", "LANG", "PYTHONPATH")),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_CONFIG_DIR": str(folder / "wandb-config"),
        "WANDB_CACHE_DIR": str(folder / "wandb-cache"),
        "WANDB_DATA_DIR": str(folder / "wandb-data"),
        "WANDB_BASE_URL": internet.url,
        "TRACKIO_DIR": str(folder / "trackio"),
        "HF_HOME": str(folder / "hf"),
        "DAR_HOME": str(folder / "dar"),
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), internet.url),
    }
    command = [sys.executable, "-m", "dar.training", "--config", "run.yaml"]
    result = subprocess.run(
        command, cwd=folder, env=settings, capture_output=True, text=True, check=False, timeout=150
    )
    assert result.returncode == 0, result.stderr
    return folder


def check(points: Points) -> None:
    for name in (
        "train/dar/rewards_mean", "train/dar/weights_mean", "train/dar/weights_max", "train/dar/kl_ref",
        "train/dar/logps_policy", "train/dar/logps_ref", "train/dar/logps_behavior", "train/dar/loss",
        "train/dar/advantages_std", "train/rewards/short/mean", "train/completions/mean_length",
        "train/learning_rate", "train/grad_norm", "train/epoch", "train/tokens", "train/time/step_seconds",
    ):  # fmt: skip
        assert tuple(points[name]) == LOGGED, name
    for name in ("eval/dar/rewards_mean", "eval/dar/loss", "eval/rewards/short/mean"):
        assert tuple(points[name]) == (STEPS,), name
    assert not any(name.startswith("train/train/dar") for name in points)
    assert points["train/dar/rewards_mean"][STEPS] < 0


def test_tensorboard_gets_every_metric(folder: Path) -> None:
    (run,) = (folder / "out" / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    names = events.Tags()["scalars"]
    check({name: {e.step: e.value for e in events.Scalars(name)} for name in names})


def test_trackio_gets_every_metric(folder: Path) -> None:
    points: Points = {}
    with sqlite3.connect(folder / "trackio" / "trial.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
    database.close()
    for run, metrics in rows:
        assert run == "first"
        collect(points, json.loads(metrics))
    check(points)


def test_wandb_gets_every_metric_offline_and_asks_no_network(
    folder: Path, internet: CountingServer
) -> None:
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    points: Points = {}
    for content in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            collect(
                points, {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            )
    check(points)
    assert internet.asked == []


def collect(points: Points, metrics: dict[str, Any]) -> None:
    step = int(metrics["train/global_step"])
    for name, value in metrics.items():
        points.setdefault(name, {})[step] = value


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a ``.wandb`` file: LevelDB's log format behind a header of 7 bytes."""
    position, block, record = 7, 32768, b""
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += 7
        record += content[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
