"""The DAR training core: it runs alone, from a ten-line script, and knows no service.

Importing this package loads no torch; a name loads its module when it is first used.

trainer: `DARTrainer`, a `transformers.Trainer` made of the parts below.
loss: advantage, weight, clip of the weight and loss, as pure functions.
from_spec: trains a job from its spec and files; a job spec as `DARConfig`.
optimization: optimizers and schedules, whose errors name their arguments.
run_setup: arguments, data and accelerator checked and settled before a run.
argument_kinds: kinds of the arguments of `DARTrainer`.
run_context: what the parts of a run share.
reward_sources: functions, services and models that score completions, opened for a run.
evaluation: the policy is measured on rows of their own, between steps.
merge: ``dar merge``.
offline: the public names of offline training.
config: arguments, their bounds and defaults.
data: data sets and their rows.
sampling: prompts of a step, and completions of the policy.
step: an optimizer step, from prompts to gradients and metrics.
model: policy, reference, tokenizer, reward models, log-probabilities.
parallel: several processes in one run: FSDP, DeepSpeed.
calibration: chooses alpha and beta for ``kl_budget`` before the first step.
checkpoint: checkpoints, resume, the hub.
report: what a trainer reports, its warnings, requests to stop.
script: ``dar train``.
demo: base models and tasks of the demo.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dar.training.config.config import DARConfig
    from dar.training.data.rows import DataCollatorForDAR
    from dar.training.evaluation import Predictions
    from dar.training.from_spec import JobInputs, train_job
    from dar.training.report.sink import Control, NullControl, NullSink, Sink
    from dar.training.trainer import DARTrainer

__all__ = [
    "Control",
    "DARConfig",
    "DARTrainer",
    "DataCollatorForDAR",
    "JobInputs",
    "NullControl",
    "NullSink",
    "Predictions",
    "Sink",
    "train_job",
]

_HOMES = {
    "Control": "dar.training.report.sink",
    "DARConfig": "dar.training.config.config",
    "DARTrainer": "dar.training.trainer",
    "DataCollatorForDAR": "dar.training.data.rows",
    "JobInputs": "dar.training.from_spec",
    "NullControl": "dar.training.report.sink",
    "NullSink": "dar.training.report.sink",
    "Predictions": "dar.training.evaluation",
    "Sink": "dar.training.report.sink",
    "train_job": "dar.training.from_spec",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dar.training' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
