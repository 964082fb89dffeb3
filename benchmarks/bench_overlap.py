"""Idle time of a trainer with slow rewards, by overlap: two hours of training in seven minutes.

The trainer, its steps, the reward client and a reward server in a process of its own are the real
ones; sampling and the passes of training are slept, at a twentieth of what they take a mid-sized
model: 32 prompts in 19.2 s, training in 12 s, and a judge whose latency is lognormal with a median
of 5 s and sigma 0.7, one prompt a request, 16 at once. The designs take turns, and all of them see
the same latencies.
"""

import asyncio
import json
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stack import report
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PrinterCallback
from transformers.utils import logging as transformers_logging

from dar.protocol.reward_spec import Rewards
from dar.training import DARConfig, DARTrainer, NullSink
from dar.training.sampling.sampler import Completion

SCALE = 1 / 20
GROUPS, K, CONCURRENCY = 32, 4, 16
GENERATION, TRAINING, MEDIAN, SIGMA = 19.2 * SCALE, 12 * SCALE, 5 * SCALE, 0.7
"""Seconds of a step, and of a request."""
STEPS, ROUNDS = 8, 5
"""Of each run, of which the first and the last do not count: they begin and end the pipeline. And
runs of each design."""
DESIGNS: dict[str, dict[str, Any]] = {
    "none": {"overlap": "none", "order": "fixed"},
    "stream": {"overlap": "stream", "order": "completion"},
    "stream, fixed order": {"overlap": "stream", "order": "fixed"},
    "one_step": {"overlap": "one_step", "order": "completion"},
}
TOKENIZER = Path(__file__).parent.parent / "tests" / "training" / "golden" / "tokenizer"


# --- the judge ------------------------------------------------------------------------------------


def serve(ready: Connection, seed: int) -> None:
    """Answer ``dar.reward.v1`` requests, each group after a time set by seed, step and group."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _head(reader):
            content = json.loads(await reader.readexactly(head))
            samples = content["samples"]
            draw = np.random.default_rng([seed, content["step"], int(samples[0]["group_id"][1:])])
            await asyncio.sleep(MEDIAN * float(np.exp(SIGMA * draw.standard_normal())))
            rewards = [draw.random() for _ in samples]
            body = json.dumps({"request_id": content["request_id"], "rewards": rewards}).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                % len(body)
            )
            writer.write(body)
            await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


async def _head(reader: asyncio.StreamReader) -> int:
    """Length of the body that follows; 0 at the end."""
    length = 0
    while (line := (await reader.readline()).strip()) or not length:
        if not line:
            return 0
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return length


# --- the trainer ----------------------------------------------------------------------------------


class PacedSampler:
    """Gives a prompt's completions every 0.6 s, scaled."""

    def sample(
        self,
        _model: object,
        prompts: Sequence[Sequence[int]],
        *,
        step: int,
        numbers: Sequence[int],
        before_each: Callable[[], None],
        on_group: Callable[[int, list[Completion]], None],
    ) -> list[Completion]:
        """As `dar.training.sampling.sampler.Sampler`."""
        started, found = time.monotonic(), []
        for i, number in enumerate(numbers):
            before_each()
            draw = np.random.default_rng([step, number])
            group = [Completion([*draw.integers(4, 64, 7).tolist(), 3], -30.0, "stop")] * K
            until = started + GENERATION * (i + 1) / len(prompts)
            time.sleep(max(0.0, until - time.monotonic()))
            on_group(number, group)
            found += group
        return found


class PacedTrainer(DARTrainer):
    """Trains in the time of a larger model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as DARTrainer
        super().__init__(*args, **kwargs)
        backward = self._loop._backward  # noqa: SLF001 - the seam that this is for

        def paced(model: Any, step: Any, rows: list[int]) -> Any:  # noqa: ANN401 - as StepLoop
            until = time.monotonic() + TRAINING * len(rows) / (GROUPS * K)
            loss = backward(model, step, rows)
            time.sleep(max(0.0, until - time.monotonic()))
            return loss

        self._loop._backward = paced  # type: ignore[method-assign]  # noqa: SLF001 - the seam that this is for

    def _source_of(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as DARTrainer
        source: Any = super()._source_of(*args, **kwargs)
        source._sampler = PacedSampler()  # noqa: SLF001 - the seam that this is for
        return source


class Times(NullSink):
    """Keeps the times of each step."""

    def __init__(self) -> None:
        self.of_step: dict[int, Mapping[str, float]] = {}

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Keep them."""
        self.of_step[step] = values


def run(url: str, design: Mapping[str, Any]) -> dict[str, float]:
    """Idle seconds and seconds of a step, in the mean over a run."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        )
    )
    component = {
        "name": "judge",
        "url": url,
        "batch": {"max_samples": K, "linger_ms": 0},
        "limits": {"concurrency": CONCURRENCY},
    }
    sink = Times()
    with tempfile.TemporaryDirectory() as folder:
        config = DARConfig(
            output_dir=folder,
            per_device_train_batch_size=GROUPS,
            dar_k=K,
            max_new_tokens=8,
            max_steps=STEPS,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            log_level="error",
            **design,
        )
        rows = [{"prompt": f"w{4 + i} w{5 + i}"} for i in range(GROUPS)]
        trainer = PacedTrainer(
            model,
            config,
            rows,
            Rewards.model_validate({"components": [component]}),
            processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
            sink=sink,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    counted = [sink.of_step[step] for step in range(2, STEPS)]
    idle = statistics.mean(values["time/idle_seconds"] for values in counted)
    return {"idle": idle, "step": statistics.mean(v["time/step_seconds"] for v in counted)}


def main() -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    context = multiprocessing.get_context("spawn")
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in DESIGNS}
    for number in range(ROUNDS):
        ours, theirs = context.Pipe()
        judge = context.Process(target=serve, args=(theirs, number), daemon=True)
        judge.start()
        url = f"http://127.0.0.1:{ours.recv()}/score"
        for name, design in DESIGNS.items():
            measured[name].append(run(url, design))
            print(
                f"{name:<22} idle {measured[name][-1]['idle']:.3f} s of {measured[name][-1]['step']:.3f} s",
                flush=True,
            )
        judge.terminate()
        judge.join()
    barrier = measured["none"]
    report(
        "overlap",
        groups=GROUPS,
        concurrency=CONCURRENCY,
        generation_seconds=GENERATION,
        training_seconds=round(TRAINING, 3),
        latency_median_seconds=MEDIAN,
        rounds=ROUNDS,
        steps=STEPS - 2,
        **{
            name.replace(", ", "_").replace(" ", "_"): {
                "idle_seconds": round(statistics.median(one["idle"] for one in runs), 4),
                "step_seconds": round(statistics.median(one["step"] for one in runs), 4),
                "idle_of_step": round(
                    statistics.median(one["idle"] / one["step"] for one in runs), 4
                ),
                "idle_of_barrier": round(
                    statistics.median(
                        one["idle"] / other["idle"]
                        for one, other in zip(runs, barrier, strict=True)
                    ),
                    4,
                ),
            }
            for name, runs in measured.items()
        },
    )


if __name__ == "__main__":
    main()
