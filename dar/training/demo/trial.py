"""The brackets task through `dar.DARTrainer`, as it is meant to be and with mistakes planted.

A trainer that makes one of `MISTAKES` still trains, and in half of them the reward rises nicely; only the distance to the known
optimum (`dar.training.demo.brackets`) gives them away.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from dar.training.config.config import DARConfig
from dar.training.data.rows import DataCollatorForDAR, TokenPair
from dar.training.demo.brackets import EOS_ID, Brackets, Standing
from dar.training.demo.judge import NEW_TOKENS, PROMPTS
from dar.training.trainer import DARTrainer

SETTINGS: Mapping[str, Any] = {
    "alpha": 0.2,
    "beta": 0.2,
    "dar_k": 8,
    "dar_wclip": 20.0,
    "adv_norm": "none",
    "baseline": "leave_one_out",
    "per_device_train_batch_size": 12,
    "max_new_tokens": NEW_TOKENS,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "max_steps": 300,
}
"""Arguments of `dar.DARConfig` that bring the policy to its optimum."""
VARIANTS: Mapping[str, tuple[bool, Mapping[str, Any]]] = {
    "plain": (False, {}),
    "end": (True, {"alpha": 0.3, "beta": 0.1}),
    "cold": (False, {"alpha": 0.3, "beta": 0.1, "temperature": 0.7}),
}
"""Name -> whether completions can stop, and what is in place of `SETTINGS`. The two harder variants are pulled harder to the
reference: at alpha = beta = 0.2 they are not at rest after 300 steps (KL to it 0.15 and 0.5)."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """A mistake that could be made in a trainer, planted."""

    meaning: str
    settings: Mapping[str, Any]
    """Arguments of `dar.DARConfig` that amount to it."""
    reward_sign: float = 1.0
    is_end_masked: bool = False


MISTAKES: Mapping[str, Mistake] = {
    "reference_dropped": Mistake(
        "the reference term is missing from the weight", {"alpha": 0.0, "beta": 0.4}
    ),
    "sign_flipped": Mistake("the worse completion gets the larger weight", {}, reward_sign=-1.0),
    "wrong_temperature": Mistake(
        "behavior log-probabilities are those of temperature 1", {"behavior": "policy"}
    ),
    "end_masked": Mistake("the end-of-sequence token counts as padding", {}, is_end_masked=True),
}


class EndMaskingCollator(DataCollatorForDAR):
    """Takes the end-of-sequence token for padding, as masks made from token ids do where both are one token."""

    def __call__(self, features: Sequence[TokenPair | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad, and leave the end out of the log-probability."""
        batch = super().__call__(features)
        mask_BC = batch["completion_mask"]
        is_end_BC = batch["input_ids"][:, -mask_BC.shape[1] :] == EOS_ID
        return batch | {"completion_mask": mask_BC & ~is_end_BC}


@dataclass(frozen=True, slots=True)
class Run:
    """What a training run came to."""

    final: Standing
    curve: dict[int, Standing]
    """Step -> standing, the beginning (0) and the last step included."""
    metrics: dict[str, float]
    """What the trainer reported, the mean over all steps; names: `dar.protocol.metrics`."""


class _Curve(TrainerCallback):
    def __init__(self, note: Callable[[int], None], every: int) -> None:
        self._note = note
        self._every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002 - transformers'
        if state.global_step % self._every == 0:
            self._note(state.global_step)


def train(
    task: Brackets,
    *,
    seed: int,
    mistake: str | None = None,
    every: int = 1_000_000,
    judged_as: Mapping[str, Any] | None = None,
    losing: Callable[[list[float]], Sequence[float | None]] = list,
    **settings: Any,  # noqa: ANN401 - arguments of DARConfig
) -> Run:
    """Train a random model through `dar.DARTrainer` and compare it with what it should be.

    Args:
        task: The task.
        seed: Of the model and of sampling.
        mistake: A key of `MISTAKES`; the result is judged as if it were not made.
        every: Steps between two points of the curve.
        judged_as: Arguments of `dar.DARConfig` that say what the optimum is; default: ``settings``.
        losing: What becomes of the rewards of a step on their way to the trainer.
        settings: Arguments of `dar.DARConfig` in place of `SETTINGS`.
    """
    planted = MISTAKES[mistake] if mistake else Mistake("", {})
    model = task.model(seed)
    ref_PY = task.law(model)
    with tempfile.TemporaryDirectory() as folder:
        process: dict[str, Any] = {
            "output_dir": folder, "seed": seed, "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "use_cpu": True, "log_level": "error",
        }  # fmt: skip
        meant = DARConfig(
            **process | dict(SETTINGS) | dict(settings if judged_as is None else judged_as)
        )
        made = DARConfig(**process | dict(SETTINGS) | settings | dict(planted.settings))

        def reward(prompts: Any, completions: Any, completion_ids: Any) -> Sequence[float | None]:  # noqa: ANN401 - TRL's signature
            values = task.reward(prompts, completions, completion_ids)
            return losing([planted.reward_sign * value for value in values])

        curve = {0: task.standing(model, ref_PY, meant)}

        def note(step: int) -> None:
            curve[step] = task.standing(model.eval(), ref_PY, meant)

        trainer = DARTrainer(
            model,
            made,
            [{"prompt": prompt} for prompt in PROMPTS],
            reward,
            processing_class=task.tokenizer(),
            callbacks=[_Curve(note, every)],
        )
        if planted.is_end_masked:
            trainer.data_collator = EndMaskingCollator()
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    note(trainer.state.global_step)
    return Run(curve[trainer.state.global_step], curve, trainer.reporter.reported)
