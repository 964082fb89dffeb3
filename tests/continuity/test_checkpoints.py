"""A checkpoint of an earlier version resumes to the weights that version would have given.

A run from the first step ends with them too.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, PrinterCallback

from dar.protocol.checkpoints import Manifest
from dar.protocol.metrics import current_values, is_reproducible
from dar.protocol.samples import ReportedSample
from dar.protocol.spec import JobSpec
from dar.training import DARConfig, DARTrainer, JobInputs, NullControl, NullSink, train_job

STEPS = 6
EARLIER = {"alpha": 0.1, "beta": 0.3}
"""Earlier defaults of a script. A run that is resumed goes on with them by itself."""


class Recording(NullSink):
    """Keeps metrics, completions and checkpoints."""

    def __init__(self) -> None:
        self.reports: dict[int, dict[str, float]] = {}
        self.completions: dict[int, list[str]] = {}
        self.published: list[tuple[Path, Manifest]] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        kept = {n: v for n, v in values.items() if is_reproducible(n) and "time/" not in n}
        self.reports.setdefault(step, {}).update(kept)

    def samples(self, step: int, samples: Sequence[ReportedSample]) -> None:
        self.completions[step] = [row.completion for row in samples[:8]]

    def checkpoint(self, step: int, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:
        self.published.append((folder, manifest))


def share_of_w40(completions: list[str], **_: Any) -> list[float]:
    return [text.split().count("w40") / max(1, len(text.split())) for text in completions]


def digest_of_text(completions: list[str], **_: Any) -> list[float | None]:
    rewards = [
        int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32 for text in completions
    ]
    return [None if int(1e6 * reward) % 9 == 0 else reward for reward in rewards]


def train_script(
    stored: Path, run: dict[str, Any], work: Path, resume: Path | None, sink: Recording
) -> None:
    base = stored / "base"
    rows = [json.loads(line) for line in (stored / run["rows"]).read_text().splitlines()]
    trainer = DARTrainer(
        model=LlamaForCausalLM.from_pretrained(base),
        args=DARConfig(output_dir=str(work), **run["settings"], **({} if resume else EARLIER)),
        train_dataset=rows,
        reward_funcs=[share_of_w40, digest_of_text],
        reward_weights=[1.0, 0.5],
        processing_class=AutoTokenizer.from_pretrained(base),
        sink=sink,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)


def train_from_spec(
    stored: Path, run: dict[str, Any], work: Path, resume: Path | None, sink: Recording
) -> None:
    inputs = JobInputs(
        job_id=run["job_id"],
        spec=JobSpec.model_validate(run["spec"]),
        seed=run["seed"],
        total_steps=STEPS,
        model=stored / "base",
        adapters=(),
        training_file=stored / run["rows"],
        validation_file=stored / "validation.jsonl",
        work_dir=work,
        resume_from=resume,
        reward_secret=None,
        threads=1,
        offline=True,
    )
    assert train_job(inputs, sink, NullControl()) == "finished"


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("start", ["the checkpoint", "the first step"])
@pytest.mark.parametrize("name", ["online", "replay", "adapter", "script"])
def test_a_run_ends_with_the_weights_of_the_earlier_version(
    stored: Path,
    tmp_path: Path,
    same_numbers: Callable[[dict[str, float]], Any],
    differing: Callable[..., list[str]],
    name: str,
    start: str,
) -> None:
    folder = stored / "training" / name
    run, expected = (json.loads((folder / f"{n}.json").read_text()) for n in ("run", "expected"))
    sink, train = Recording(), train_script if name == "script" else train_from_spec
    resume = folder / "step-3" if start == "the checkpoint" else None
    torch.manual_seed(1234)
    train(stored / "training", run, tmp_path, resume, sink)
    resumed = {str(step): values for step, values in sink.reports.items() if step > 3}
    assert resumed.keys() == expected["reports"].keys()
    for step, values in expected["reports"].items():
        # Metrics may be added or renamed, but none is lost or changed.
        present = current_values(values)
        assert {name: resumed[step].get(name) for name in present} == same_numbers(present)
    completions = {str(step): texts for step, texts in sink.completions.items() if step > 3}
    assert completions == expected["completions"]
    published, manifest = sink.published[-1]
    assert (manifest.step, manifest.config_sha256) == (STEPS, expected["config_sha256"])
    [weights] = published.glob("*model.safetensors")
    assert differing(load_file(weights), load_file(folder / "final.safetensors")) == []
