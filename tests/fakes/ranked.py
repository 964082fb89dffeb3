"""Training runs of `test_ranks.py` and `test_deepspeed.py`: the same in one process, by import, and
in two, as a program.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # imported objects all stay, and searching them for garbage takes time

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from dar.errors import InvalidRequestError, RewardMisconfiguredError, TrainingError
from dar.protocol.metrics import is_reproducible
from dar.settings import environment
from dar.training import DARConfig, DARTrainer, NullSink
from dar.training.parallel.ranks import Ranks
from dar.training.parallel.sharding import is_sharded
from dar.training.report.sink import StopKind, StopRequestedError
from dar.training.step import reward_feed
from fakes import reward_chaos as chaos
from fakes import tiny_models

TESTS = Path(__file__).parents[1]
OUTPUT_OF_1 = "output-of-1.txt"
"""What process 1 has written to the standard output."""
PATIENCE = 6
"""Seconds that torch lets a process wait inside a collective; a reward may take longer."""
PROMPTS = [
    {"prompt": " ".join(f"w{4 + (7 * i + 3 * j) % 60}" for j in range(1 + i % 5))}
    for i in range(12)
]
COMPLETIONS = [
    {
        "prompt_ids": [2, 10 + i],
        "completion_ids": [
            [4 + (i * k + j) % 60 for j in range(1 + 3 * k)] + [3] for k in range(3)
        ],
        "rewards": [0.1 * i, -0.3 * i, None if i == 4 else 1.0],
    }
    for i in range(10)
]
WHOLE = {"per_device_train_batch_size": 8}
IN_SHARES = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
HALF = {"per_device_train_batch_size": 4}
PASSES = {"max_steps": -1, "num_train_epochs": 10 / 12, "save_steps": 2}
"""Ten of the twelve prompts in steps of eight, so the last step has two."""
SMALL = {"save_steps": 3, "alpha": 0.1, "beta": 0.3}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
CALIBRATED = {"kl_budget": 0.3, "dar_k": 64, "max_steps": 2}
HALF_IN_SHARES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
ZERO2: dict[str, Any] = {"deepspeed": {"zero_optimization": {"stage": 2}}}
ZERO3: dict[str, Any] = {
    "deepspeed": {
        # These models are so small that by default no weight would be cut.
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": "auto",
        },
        "bf16": {"enabled": "auto"},
        "train_batch_size": "auto",
    }
}


def share_of_w40(completions: list[str], **_: Any) -> list[float]:
    return [text.split().count("w40") - len(text.split()) / 8 for text in completions]


def small(completions: list[str], **_: Any) -> list[float]:
    """Rewards that are small for any usual alpha and beta."""
    return [1e-4 * reward for reward in share_of_w40(completions)]


async def late(completions: list[str], **_: Any) -> list[float | None]:
    """Group by group, each after a time of its own; some have no rewards at all."""
    rewards = share_of_w40(completions)
    await asyncio.sleep(0.02 * (len(completions[0]) % 7))
    return [None if len(completions[0]) % 4 == 0 else reward for reward in rewards]


class Kept(NullSink):
    """Metrics without times, completions, and events."""

    def __init__(self) -> None:
        self.metrics_of: dict[str, dict[str, float]] = {}
        self.completions_of: dict[str, list[str]] = {}
        self.events: list[str] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        kept = {k: v for k, v in values.items() if is_reproducible(k) and "time/" not in k}
        self.metrics_of.setdefault(str(step), {}).update(kept)

    def samples(self, step: int, samples: Any) -> None:
        self.completions_of[str(step)] = [sample.completion for sample in samples]

    def event(self, level: str, message: str, data: Any = None) -> None:
        self.events.append(message)


class AfterStep:
    """A control that requests something once a step is done."""

    def __init__(self, request: StopKind, sink: Kept, step: str) -> None:
        self._request: StopKind = request
        self._sink = sink
        self._step = step

    def requested(self) -> StopKind | None:
        return self._request if self._step in self._sink.metrics_of else None


def make_config() -> LlamaConfig:
    # With LoRA's rank, 63 makes weights that two processes cannot share evenly.
    return tiny_models.config(intermediate_size=63, initializer_range=0.2)


def make_model(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(make_config()).to(dtype)


def make_judge() -> LlamaForSequenceClassification:
    torch.manual_seed(1)
    config = make_config()
    config.num_labels = 1
    return LlamaForSequenceClassification(config).to(torch.float64)


class Idle(LlamaForCausalLM):
    """A model with a weight that text does not reach."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.for_images = torch.nn.Linear(3, 3)


def train(
    folder: Path,
    name: str,
    settings: Mapping[str, Any],
    *,
    is_lora: bool = False,
    is_offline: bool = False,
    is_judged: bool = False,
    model: LlamaForCausalLM | None = None,
    resume: Path | None = None,
    reward: Any = share_of_w40,
    stop: tuple[StopKind, str] | None = None,
    dtype: torch.dtype = torch.float64,
) -> DARTrainer:
    """Train; the last checkpoint and what was said lie in ``folder / name`` afterwards."""
    lora = LoraConfig(r=3, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    sink = Kept()
    values: dict[str, Any] = {
        "output_dir": str(folder / name),
        "dar_k": 3,
        "max_new_tokens": 8,
        "max_steps": 3,
        "learning_rate": 3e-3,
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "error",
        "report_to": "none",
        "ddp_timeout": PATIENCE,
    }
    if "alpha" not in settings:
        values["kl_budget"] = None
    trainer = DARTrainer(
        make_model(dtype) if model is None else model,
        DARConfig(**values | dict(settings)),
        COMPLETIONS if is_offline else PROMPTS,
        None if is_offline or is_judged else reward,
        reward_model=make_judge() if is_judged else None,
        eval_dataset={"few": PROMPTS[:5], "one": PROMPTS[5:6]} if is_judged else None,
        reward_processing_class=tiny_models.tokenizer() if is_judged else None,
        processing_class=tiny_models.tokenizer(),
        peft_config=lora if is_lora else None,
        sink=sink,
        control=None if stop is None else AfterStep(stop[0], sink, stop[1]),
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.ranks.is_main:
        told = {
            "metrics": sink.metrics_of,
            "completions": sink.completions_of,
            "events": sink.events,
        }
        (folder / name / "told.json").write_text(json.dumps(told))
    return trainer


def stream(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Train in many parts, whose rewards come late."""
    usual, reward_feed.LEAST_ROWS = reward_feed.LEAST_ROWS, 4
    train(folder, name, {"max_steps": 3, **settings}, reward=late)
    reward_feed.LEAST_ROWS = usual


def refill(
    folder: Path, name: str, settings: Mapping[str, Any], dtype: torch.dtype = torch.float64
) -> None:
    """Train with a reward service that at first cannot score some prompts.

    It runs beside the main process.
    """
    prompts = tuple(row["prompt"] for row in PROMPTS[::3])
    failing = chaos.Failing(prompts=prompts, indices=(0, 1), count=8)
    with chaos.service(failing) as service:
        rewards = chaos.rewards_of(service.url, failure={"refill": 2, "max_failed_fraction": 1})
        train(folder, name, settings, reward=rewards, dtype=dtype)


# --- what the two processes do --------------------------------------------------------------------


def talk(ranks: Ranks) -> dict[str, Any]:
    """Everything that a channel is for."""
    heard: dict[str, Any] = {
        "gathered": ranks.gather({"index": ranks.index, "number": float("inf")}),
        "tensors": [t.tolist() for t in ranks.gather(torch.full((2,), float(ranks.index)))],
        "from_main": ranks.from_main(lambda: ["only", ranks.index]),
        "large": [len(text) for text in ranks.gather("x" * 9_000_000)],
        "slices": ranks.gather(list(ranks.slice(5))),
    }

    def refuse() -> None:
        raise RewardMisconfiguredError("a wrong path", param="rewards")

    try:
        ranks.from_main(refuse)
    except RewardMisconfiguredError as error:
        heard["misconfigured"] = [error.message, error.param]
    errors = (TrainingError("of one", code="diverged"), StopRequestedError("now"), KeyError("odd"))
    for error in errors:
        try:
            with ranks.together():
                if ranks.index == 1:
                    raise error  # noqa: TRY301 - one process fails, and all are to hear of it
                ranks.from_main(lambda: time.sleep(0.2))
                ranks.gather(0)
        except Exception as raised:  # noqa: BLE001 - which one is the question
            heard[type(error).__name__] = [type(raised).__name__, str(raised)]
    return heard | {"afterwards": ranks.gather(ranks.index)}


def slow(completions: list[str], **_: Any) -> list[float]:
    """A judge that takes longer than a collective of torch may."""
    time.sleep(PATIENCE + 1)
    return share_of_w40(completions)


def broken(completions: list[str], **_: Any) -> list[float]:
    raise RewardMisconfiguredError("the judge is gone")


def write(heard: Mapping[str, Any], folder: Path, index: int) -> None:
    (folder / f"heard-{index}.json").write_text(json.dumps(heard))


def passes(folder: Path) -> None:
    """What must hold before anything else does."""
    torch.set_num_threads(1)
    train(folder, "ddp passes", HALF | PASSES)
    train(folder, "fsdp passes", HALF | PASSES | {"fsdp": True})
    torch.distributed.barrier()  # the main process must not leave while the other still listens


def brief(folder: Path) -> None:
    """Training and talk of two processes that nothing has failed in."""
    torch.set_num_threads(1)
    ranks = train(folder, "ddp", HALF).ranks
    train(folder, "fsdp", HALF | {"fsdp": True, "save_steps": 3})
    train(folder, "ddp small", HALF | SMALL, reward=small)
    checkpoint = folder / "whole" / "checkpoints" / "step-2"
    train(folder, "fsdp resumed", HALF | {"fsdp": True}, resume=checkpoint)
    write(talk(ranks), folder, ranks.index)
    torch.distributed.barrier()  # the main process must not leave while the other still listens


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    settled = train(folder, "ddp", HALF)
    heard: dict[str, Any] = {}
    train(folder, "ddp in shares", HALF_IN_SHARES)
    stream(folder, "ddp streamed", HALF | {"order": "completion"})
    stream(folder, "ddp ahead", HALF | {"overlap": "one_step"})
    stream(folder, "fsdp ahead", HALF_IN_SHARES | {"overlap": "one_step", "fsdp": True})
    refill(folder, "ddp refilled", HALF)
    refill(folder, "fsdp refilled", HALF | {"fsdp": True})
    train(folder, "ddp offline", HALF, is_offline=True)
    train(folder, "ddp calibrated", HALF | CALIBRATED)
    train(folder, "fsdp calibrated", HALF | CALIBRATED | {"fsdp": True})
    adapted = train(folder, "ddp lora", HALF, is_lora=True)
    judged = train(folder, "ddp judged", HALF | EVALUATED, is_judged=True)
    heard["judge bytes"] = judged.ranks.gather(judged.memory().get("reward models", 0))
    torch.manual_seed(0)
    model = Idle(make_config()).to(torch.float64)
    idle = train(folder, "idle", HALF | {"max_steps": 2}, model=model)
    trainers = {"whole": settled, "lora": adapted, "idle": idle}
    heard["looks for unused"] = {
        name: trainer.accelerator.ddp_handler.find_unused_parameters
        for name, trainer in trainers.items()
    }
    checkpoint = folder / "whole" / "checkpoints" / "step-2"
    train(folder, "ddp resumed", HALF, resume=checkpoint)
    train(folder, "fsdp", HALF_IN_SHARES | {"fsdp": True})
    train(folder, "fsdp lora", HALF | {"fsdp": True}, is_lora=True)
    train(folder, "fsdp resumed", HALF | {"fsdp": True}, resume=checkpoint)
    train(folder, "slow", HALF | {"max_steps": 1}, reward=slow)
    stopped = train(
        folder, "drained", HALF | {"save_strategy": "no", "logging_steps": 1}, stop=("drain", "1")
    )
    heard["drained"] = [stopped.stopped_by, stopped.state.global_step, stopped.published_step]
    try:
        train(folder, "broken", HALF, reward=broken)
    except Exception as raised:  # noqa: BLE001 - which one is the question here too
        heard["broken"] = [type(raised).__name__, str(raised)]
    write(heard, folder, settled.ranks.index)


def equal_at_first(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    """Rewards that differ in the third step alone."""
    return [0.5 if trainer_state.global_step < 2 else float(i) for i in range(len(completions))]


def zero(folder: Path) -> None:
    """The same with DeepSpeed, which trains in float32."""
    torch.set_num_threads(1)
    heard: dict[str, Any] = {}
    single: dict[str, Any] = {"dtype": torch.float32}
    bf16 = train(folder, "ddp bf16", HALF | {"bf16": True}, **single)
    for name, stage in (("zero2", ZERO2), ("zero3", ZERO3)):
        trainer = train(folder, name, HALF_IN_SHARES | stage, **single)
        trainer.save_model(str(folder / name / "model"))
        heard[f"{name} is sharded"] = is_sharded(trainer.model)
        heard[f"{name} held"] = sum(p.numel() for p in trainer.model.parameters())
        train(folder, f"{name} lora", HALF | stage, is_lora=True, **single)
        whole = folder / "whole" / "checkpoints" / "step-2"
        train(folder, f"{name} resumed", HALF | stage, resume=whole, **single)
        own = folder / f"{name} lora" / "checkpoints" / "step-2"
        train(folder, f"{name} lora resumed", HALF | stage, is_lora=True, resume=own, **single)
    ahead = {"overlap": "one_step"}
    refill(folder, "zero2 refilled", HALF_IN_SHARES | ZERO2 | ahead, **single)
    train(folder, "zero3 offline", HALF | ZERO3, is_offline=True, **single)
    train(folder, "zero3 bf16", HALF | ZERO3 | {"bf16": True}, **single)
    train(folder, "zero3 calibrated", HALF | ZERO3 | CALIBRATED | {"max_steps": 3}, **single)
    ties = {"drop_ties": True}
    train(folder, "zero2 empty", HALF | ZERO2 | ties, reward=equal_at_first, **single)
    try:
        too_fast = {"learning_rate": 1e30, "save_strategy": "no"}
        train(folder, "zero2 fast", HALF | ZERO2 | too_fast, is_offline=True, **single)
    except TrainingError as raised:
        heard["fast"] = raised.message
    asked = HALF | ZERO3 | {"save_strategy": "no", "logging_steps": 1}
    stopped = train(folder, "zero3 drained", asked, stop=("drain", "1"), **single)
    heard["drained"] = [stopped.stopped_by, stopped.state.global_step, stopped.published_step]
    try:
        stopped.train()
    except InvalidRequestError as raised:
        heard["again"] = raised.message
    after = train(folder, "ddp", HALF | {"max_steps": 1}, **single)
    heard["afterwards"] = after.is_deepspeed_enabled
    write(heard, folder, bf16.ranks.index)


def start(folder: Path, part: str) -> list[str]:
    """Run `passes`, `brief`, `main` or `zero` in two processes, as any launcher would.

    Returns what they have written to the standard output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [sys.executable, __file__, str(folder), part],
        env=environment() | common | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = [process.stdout, (folder / OUTPUT_OF_1).read_text()]
    assert process.returncode == 0, "\n".join([*said, process.stderr])
    return said


def split(folder: Path) -> int | None:
    """Become two processes, which have imported everything once.

    Returns:
        The process id of process 1 in process 0; None in process 1.
    """
    other = os.fork()
    rank = "0" if other else "1"
    os.environ.update(RANK=rank, LOCAL_RANK=rank)  # noqa: TID251 - a launcher's variables
    if other:
        return other
    with (folder / OUTPUT_OF_1).open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
    return None


if __name__ == "__main__":
    gc.freeze()  # each of the many runs below collects garbage more than once
    gc.enable()
    process_1 = split(Path(sys.argv[1]))
    {"passes": passes, "brief": brief, "main": main, "zero": zero}[sys.argv[2]](Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0 if process_1 is None else min(1, os.waitpid(process_1, 0)[1]))
