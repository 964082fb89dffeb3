"""The real trainer under the real supervisor: torch, a tiny model, a reward service over HTTP."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, TokenizersBackend

SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
PROMPTS = b"".join(b'{"prompt": "w%d w%d"}\n' % (10 + n, 20 + n) for n in range(8))
STEPS = 8


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    words = [*SPECIAL.values(), *(f"w{number}" for number in range(4, 64))]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    TokenizersBackend(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def reward_url(own: Any, unused_port: Callable[[], int]) -> Iterator[str]:
    port = unused_port()
    own.start_service()
    script = Path(__file__).with_name("reward_service.py")
    secret = own.home / "reward_secret"
    with subprocess.Popen([sys.executable, str(script), str(port), str(secret)]) as process:
        yield f"http://127.0.0.1:{port}/score"
        process.terminate()


def submit(own: Any, reward_url: str) -> str:
    dar = {
        "hyperparameters": {
            "max_steps": STEPS,
            "batch_size": 2,
            "dar_k": 2,
            "learning_rate": 1e-2,
        },
        "sampling": {"max_new_tokens": 4},
        "checkpointing": {"every_steps": 2},
        "rewards": {"components": [{"name": "even", "url": reward_url}]},
    }
    return str(own.submit_spec(PROMPTS, dar))


@pytest.mark.slow  # three trainers start, and each imports torch and transformers for about six CPU seconds
def test_a_killed_worker_changes_neither_weights_nor_metrics(own: Any, reward_url: str) -> None:
    make_model(own.home / "models" / "tiny")
    undisturbed = submit(own, reward_url)
    own.start_worker(real=True)
    own.wait(undisturbed, "succeeded", "failed", seconds=90)
    own.stop_worker(own.workers[-1])

    killed = submit(own, reward_url)
    worker = own.start_worker(real=True)
    own.until(lambda: own.checkpoints(killed), seconds=60)
    worker.kill()
    worker.wait()
    own.start_worker(real=True)
    job = own.wait(killed, "succeeded", "failed", seconds=90)
    assert (job["status"], job["attempt"]) == ("succeeded", 2), job

    assert own.steps(killed) == list(range(1, STEPS + 1))
    assert final_files(own, killed) == final_files(own, undisturbed)
    assert series(own, killed) == series(own, undisturbed)


def final_files(own: Any, job_id: str) -> dict[str, str]:
    newest = own.checkpoints(job_id)[0]
    assert newest["step_number"] == STEPS
    digests = {file["name"]: file["sha256"] for file in newest["files"]}
    return {name: digests[name] for name in ("model.safetensors", "resume/optimizer.safetensors")}


def series(own: Any, job_id: str) -> dict[str, Any]:
    found = own.api("GET", f"/fine_tuning/jobs/{job_id}/metrics")["series"]
    return {
        name: (values["step"], values["value"])
        for name, values in found.items()
        if not name.startswith("time/")
    }
