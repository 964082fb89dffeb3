"""The tasks of the demo: a model that writes pleased reviews, and one that balances brackets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TaskName = Literal["reviews", "brackets"]

BASE_STEPS = 220
"""Optimizer steps of the base model for reviews, enough for fluent text."""


@dataclass(frozen=True, slots=True)
class DemoTask:
    """A job, and the commands that make its base model."""

    name: TaskName
    introduction: str
    base_command: tuple[str, ...]
    """Arguments of ``python -m dar.training.demo``, which writes ``model/`` and
    ``prompts.jsonl``."""
    base_steps: int
    sources: tuple[str, ...]
    """Files of `dar.training.demo` whose change makes another base model."""
    spec: Mapping[str, Any]
    """The job spec without its reward URL."""
    reward: str
    """Name of the reward component."""
    suffix: str
    seed: int

    @property
    def model(self) -> str:
        """Name of the base model in a job."""
        return f"{self.name}-base"

    @property
    def steps(self) -> int:
        """Optimizer steps of the job."""
        steps: int = self.spec["hyperparameters"]["max_steps"]
        return steps


REVIEWS = DemoTask(
    name="reviews",
    introduction=(
        "A small model learns to write pleased reviews. Its reward comes from a separate service, "
        "over HTTP."
    ),
    base_command=("base", "--steps", str(BASE_STEPS)),
    base_steps=BASE_STEPS,
    sources=("base.py", "languages.py"),
    # alpha + beta of 0.4 suits rewards in [-1, 1]: few weights reach the clip.
    spec={
        "hyperparameters": {
            "alpha": 0.1,
            "beta": 0.3,
            "dar_k": 4,
            "dar_wclip": 20,
            "adv_norm": "none",
            "learning_rate": 3e-4,
            "batch_size": 16,
            "max_steps": 100,
            "warmup_steps": 5,
            "lr_scheduler_type": "linear",
            "max_grad_norm": 10,
            "adam_beta2": 0.95,
        },
        "sampling": {"max_new_tokens": 24},
        "peft": None,
        "checkpointing": {"every_steps": 25, "keep_last": 3},
    },
    reward="positive",
    suffix="positivity",
    seed=7,
)

BRACKETS = DemoTask(
    name="brackets",
    introduction=(
        "A small model learns to balance brackets. There are only 32 completions of each prompt, "
        "so the optimum of its objective is known. Training has to end there, not merely at a "
        "high reward."
    ),
    base_command=("brackets",),
    base_steps=1,
    sources=("base.py", "brackets.py", "languages.py"),
    # The settings of `dar.training.demo.trial`, as a job spec.
    spec={
        "hyperparameters": {
            "alpha": 0.2,
            "beta": 0.2,
            "dar_k": 8,
            "dar_wclip": 20,
            "adv_norm": "none",
            "baseline": "leave_one_out",
            "learning_rate": 3e-3,
            "batch_size": 12,
            "max_steps": 300,
            "lr_scheduler_type": "linear",
        },
        "sampling": {"max_new_tokens": 5},
        "peft": None,
        "checkpointing": {"every_steps": 100, "keep_last": 1},
    },
    reward="balanced",
    suffix="balanced",
    seed=0,
)

TASKS: Mapping[TaskName, DemoTask] = {task.name: task for task in (REVIEWS, BRACKETS)}
