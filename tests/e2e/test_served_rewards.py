"""``dar reward serve`` beside a real installation: results come by signed callbacks, also through a
restart of the server.

The test is slow because it runs real jobs, whose trainers spend some six CPU seconds on importing
torch.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from safetensors.numpy import load_file

from dar.settings import environment
from fakes.installation import Installation

STEPS = 6
MODULE = '''
import time

def letters(prompts, completions, **columns):
    """Share of the letter e."""
    time.sleep(0.1)
    return [text.count("e") / max(1, len(text)) for text in completions]
'''


class Served:
    """The command, at one port whenever it runs."""

    def __init__(self, folder: Path, home: Path, port: int) -> None:
        self.folder, self.home, self.port = folder, home, port
        self.component: dict[str, Any] = {}
        self.errors = ""
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "dar.cli", "reward", "serve", "my_rewards:letters"]
        self._process = subprocess.Popen(
            [*command, "--asynchronous", "--max-calls", "4", "--port", str(self.port)],
            cwd=self.folder,
            env=environment(home=self.home),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.component = json.loads(self._process.stdout.readline())

    def stop(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        self.errors += errors
        return process.returncode


@pytest.fixture
def served(
    installation: Installation, tmp_path: Path, free_port: Callable[[], int]
) -> Iterator[Served]:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    served = Served(tmp_path, installation.home, free_port())
    served.start()
    yield served
    served.stop()


def weights(
    installation: Installation, reviews_base: Path, folder: Path, component: Any, during: Any
) -> Any:
    """The weights at the end of a job with one component."""
    file_id = installation.client.files.create(reviews_base / "prompts.jsonl").id
    # A restart takes as long as the machine is busy; none of it may cost a sample.
    patience = {"retry": {"attempts": 20, "base": 1, "cap": 2}, "batch": {"max_samples": 4}}
    component = {**patience, **component, "name": "letters"}
    spec = installation.spec(
        file_id,
        hyperparameters={"max_steps": STEPS, "batch_size": 3},
        rewards={"components": [component]},
        checkpointing={"every_steps": 2, "keep_last": 2},
    )
    job_id = installation.client.jobs.create(**spec).id
    during(job_id)
    job = installation.until_done(job_id)
    assert job.status == "succeeded", job.error
    checkpoint = next(iter(installation.client.checkpoints.list(job_id)))
    installation.client.checkpoints.download(job_id, checkpoint.id, folder)
    return dict(load_file(folder / "model.safetensors"))


def callbacks_taken(installation: Installation) -> float:
    headers = {"authorization": f"Bearer {(installation.home / 'api_key').read_text().strip()}"}
    page = httpx2.get(
        f"{installation.url}/metrics", headers=headers, trust_env=False, verify=False
    ).text
    found = re.search(r'^dar_reward_callback_total\{status="accepted"\} (\S+)$', page, re.MULTILINE)
    assert found is not None, page
    return float(found[1])


@pytest.mark.slow  # whole jobs are trained
@pytest.mark.timeout(300)
def test_signed_callbacks_through_a_restart_give_the_weights_that_answers_at_once_give(
    installation: Installation, reviews_base: Path, served: Served, tmp_path: Path
) -> None:
    def restart(job_id: str) -> None:
        installation.until_step(job_id, 2)
        assert served.stop() == 0
        served.start()

    inline = {"url": installation.reward_url}
    expected = weights(installation, reviews_base, tmp_path / "sync", inline, lambda _: None)
    before = callbacks_taken(installation)
    later = {**served.component, "require_signed_responses": True}
    assert later["reply"] == "either"
    found = weights(installation, reviews_base, tmp_path / "later", later, restart)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)
    assert (
        callbacks_taken(installation) - before >= 3 * STEPS / 2
    )  # of a request, the poll may be first
    assert served.stop() == 0
    assert "Traceback" not in served.errors
    assert "not taken" not in served.errors
