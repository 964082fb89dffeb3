"""The brackets task trained through `dar.DARTrainer`, correctly and with deliberate mistakes.

A trainer that makes one of `MISTAKES` still trains, and in half of them the reward still rises;
only the distance to the known optimum (`dar.training.demo.brackets`) shows the mistake.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from dar.training.config.config import DARConfig
from dar.training.data.rows import DataCollatorForDAR, TokenPair
from dar.training.demo.brackets import EOS_ID, Brackets, ExactMetrics
from dar.training.demo.languages import NEW_TOKENS, PROMPTS
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
"""Name -> whether completions can stop, and changes to `SETTINGS`. The two harder variants have a
stronger pull towards the reference: at alpha = beta = 0.2 they have not converged after 300 steps
(KL to the optimum 0.15 and 0.5)."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """A mistake that a trainer could make."""

    meaning: str
    settings: Mapping[str, Any]
    """Arguments of `dar.DARConfig` that have the same effect."""
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
    """Treats the end-of-sequence token as padding, as a mask by token ids may do."""

    def __call__(self, features: Sequence[TokenPair | Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(features)
        mask_BC = batch["completion_mask"]
        is_end_BC = batch["input_ids"][:, -mask_BC.shape[1] :] == EOS_ID
        return batch | {"completion_mask": mask_BC & ~is_end_BC}


@dataclass(frozen=True, slots=True)
class Run:
    """Result of a training run."""

    final: ExactMetrics
    curve: dict[int, ExactMetrics]
    """By step, from 0 to the last."""
    metrics: dict[str, float]
    """The trainer's metrics, as means over all steps; names: `dar.protocol.metrics`."""


class _Curve(TrainerCallback):
    def __init__(self, note: Callable[[int], None], every: int) -> None:
        self._note = note
        self._every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002 - transformers'
        if state.global_step % self._every == 0:
            self._note(state.global_step)


def quiet_config(folder: str, seed: int, settings: Mapping[str, Any]) -> DARConfig:
    """Arguments of a run on the CPU that writes and reports nothing."""
    return DARConfig(
        output_dir=folder,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        log_level="error",
        **settings,
    )


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
    """Train a random model through `dar.DARTrainer` and compare it with the optimum.

    Args:
        task: The task.
        seed: Of the model and of sampling.
        mistake: A key of `MISTAKES`; the optimum is that without the mistake.
        every: Steps between two points of the curve.
        judged_as: Arguments of `dar.DARConfig` that define the optimum; default: ``settings``.
        losing: Changes the rewards of a step before the trainer gets them.
        settings: Arguments of `dar.DARConfig` in place of `SETTINGS`.
    """
    planted = MISTAKES[mistake] if mistake else Mistake("", {})
    model = task.model(seed)
    ref_PY = task.distribution(model)
    with tempfile.TemporaryDirectory() as folder:
        judged = settings if judged_as is None else judged_as
        meant = quiet_config(folder, seed, {**SETTINGS, **judged})
        made = quiet_config(folder, seed, {**SETTINGS, **settings, **planted.settings})

        def reward(prompts: Any, completions: Any, completion_ids: Any) -> Sequence[float | None]:  # noqa: ANN401 - TRL's signature
            values = task.reward(prompts, completions, completion_ids)
            return losing([planted.reward_sign * value for value in values])

        curve = {0: task.evaluate(model, ref_PY, meant)}

        def note(step: int) -> None:
            curve[step] = task.evaluate(model.eval(), ref_PY, meant)

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
