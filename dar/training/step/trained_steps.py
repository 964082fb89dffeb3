"""`TrainedSteps`: counts the steps that changed the model. A run without one fails.

A step may end without an error and leave every weight as it was: its rewards could not be used, its
learning rate or its gradient was 0, or its updates were smaller than the weights' rounding. So the
bits of the weights are compared, until one step has changed them.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dar.errors import TrainingError
from dar.training.run_context import RunContext

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by size in bytes."""


class TrainedSteps:
    """Counts the steps of a run that changed the model.

    Args:
        run: The training run.
    """

    def __init__(self, run: RunContext) -> None:
        self.count = 0
        """Steps of the whole run, those before a resume included."""
        self._run = run
        self._untrained: list[int] | None = None
        """Sums of the weights' bits before the first step."""

    def begin_step(self) -> None:
        """Remember the weights, if no step has changed them yet."""
        if not self.count and self._untrained is None:
            self._untrained = self._sums()

    def end_step(
        self, number: int, *, grad_norm: float, learning_rate: float, unusable: str | None
    ) -> None:
        """Count a step, after the optimizer has stepped; all processes must call it together.

        Args:
            number: Of the step, from 1.
            grad_norm: Norm of its gradient.
            learning_rate: With which the optimizer has stepped.
            unusable: Why the optimizer cannot have changed a weight; None: it may have.

        Raises:
            TrainingError: This was the last step, and no step changed the model.
        """
        if self.count:
            self.count += unusable is None
            return
        code = "no_rewards"
        if unusable is None:
            code = "no_update"
            unusable = self._no_update(grad_norm, learning_rate)
        if unusable is None:
            self.count, self._untrained = 1, None
        elif number >= self._run.trainer.state.max_steps:
            steps = "the only step" if number == 1 else f"none of the {number} steps"
            verb = "did not change" if number == 1 else "changed"
            raise TrainingError(f"{steps} {verb} the model: {unusable}", code=code)

    def _no_update(self, grad_norm: float, learning_rate: float) -> str | None:
        """Why no weight has changed; None: some have."""
        if learning_rate == 0:
            return (
                "the learning rate was 0; lower warmup_steps, train for more steps, or use another "
                "lr_scheduler_type"
            )
        if grad_norm == 0:
            return (
                "the gradient was 0, so no trained weight has an effect on the log-probabilities; "
                "look at which weights are trained, and at the options of the adapter"
            )
        sums = self._sums()
        # DeepSpeed keeps the weights that it updates apart from the model's.
        is_changed = self._run.trainer.is_deepspeed_enabled or sums != self._untrained
        if any(self._run.ranks.gather(is_changed)):
            return None
        formats = {str(p.dtype).removeprefix("torch.") for p in self._trained()}
        return (
            f"its updates, at learning rate {learning_rate:g}, are smaller than the rounding of "
            f"weights in {' and '.join(sorted(formats))}; raise learning_rate, or load the model "
            "in float32"
        )

    def _trained(self) -> list[Tensor]:
        return [p.detach() for p in self._run.trainer.model.parameters() if p.requires_grad]

    def _sums(self) -> list[int]:
        """Sum of the bits of each trained weight, or of this process's shard of it."""
        return [_sum_of_bits(weight) for weight in self._trained()]


def _sum_of_bits(weight: Tensor) -> int:
    if isinstance(weight, DTensor):
        weight = weight.to_local()
    if weight.is_complex():
        weight = torch.view_as_real(weight)
    return int(weight.view(_BITS[weight.element_size()]).sum(dtype=torch.int64))
