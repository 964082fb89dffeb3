"""The Python of README, guide and rewards page runs as it stands, on a small model and with this
installation's addresses.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.processes import answers
from dar.settings import environment
from fakes.installation import Installation

ROOT = Path(__file__).parents[2]
SNIPPETS = {
    f"{document}#{number}": text
    for document in ("README.md", "docs/guide.md", "docs/rewards.md")
    for number, text in enumerate(
        re.findall(
            r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL
        )
    )
}
SERVERS = [name for name, text in SNIPPETS.items() if "serve(" in text]
CLIENTS = [name for name in SNIPPETS if name not in SERVERS]


def adapter_job(installation: Installation, reviews_base: Path) -> str:
    """Id of a job that has trained an adapter."""
    file_id = installation.client.files.create(reviews_base / "prompts.jsonl").id
    spec = installation.spec(
        file_id, hyperparameters={"max_steps": 1}, peft={"type": "lora", "r": 2}
    )
    job = installation.until_done(installation.client.jobs.create(**spec).id)
    assert job.status == "succeeded", job.error
    return job.id


def prepare(name: str, installation: Installation, folder: Path, reviews_base: Path) -> Path:
    """Write a snippet to a file, with a local model, a few steps and this installation's
    addresses.
    """
    secret = (installation.home / "reward_secret").read_text().strip()
    text = SNIPPETS[name]
    if "DARTrainer" in text or "from_pretrained" in text:
        text = text.replace('"my-model"', repr(str(reviews_base / "model")))
    if "ftjob-01…" in text:
        text = text.replace("ftjob-01…", adapter_job(installation, reviews_base))
    for written, used in {
        '"Qwen/Qwen2-0.5B-Instruct"': repr(str(reviews_base / "model")),
        '"my-model"': '"base"',
        "http://127.0.0.1:9000/score": installation.reward_url,
        "https://judge.example/score": installation.reward_url,
        "Bearer …": "Bearer judges-token",
        "~/.local/share/dar": str(installation.home),
        "whsec_…": secret,
        "max_steps=100, save_steps=50": "max_steps=2, save_steps=1",
        '"max_steps": 200': '"max_steps": 2',
        '"batch_size": 16': '"batch_size": 2',
    }.items():
        text = text.replace(written, used)
    (folder / "prompts.jsonl").write_bytes((reviews_base / "prompts.jsonl").read_bytes())
    program = folder / "snippet.py"
    program.write_text(text)
    return program


def test_the_documents_have_snippets() -> None:
    assert len(SERVERS) == 3
    assert len(CLIENTS) == 5


@pytest.mark.slow  # each starts an interpreter with torch, or a job
@pytest.mark.parametrize("name", CLIENTS)
def test_a_snippet_runs(
    name: str, installation: Installation, tmp_path: Path, reviews_base: Path
) -> None:
    program = prepare(name, installation, tmp_path, reviews_base)
    result = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=environment(home=installation.home, port=installation.port),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow  # starts each service of the documents
@pytest.mark.parametrize("name", SERVERS)
def test_a_reward_service_of_the_documents_starts(
    name: str,
    installation: Installation,
    tmp_path: Path,
    reviews_base: Path,
    free_port: Callable[[], int],
    until: Callable[..., Any],
) -> None:
    program = prepare(name, installation, tmp_path, reviews_base)
    port = free_port()
    program.write_text(program.read_text().replace("port=9000", f"port={port}"))
    with subprocess.Popen([sys.executable, str(program)], stderr=subprocess.DEVNULL) as process:
        until(lambda: answers(f"http://127.0.0.1:{port}/healthz"), 30, "the service answers")
        process.terminate()
