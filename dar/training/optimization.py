"""`OptimizingTrainer`: transformers' trainer, whose optimizers and schedules fail by name.

transformers offers optimizers of many libraries, most of which are not installed, and schedules
with arguments of their own. It finds out when it makes them, just before the first step.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from dar.training.data.load_errors import blame


class OptimizingTrainer(Trainer):
    """Names the argument that is at fault if an optimizer or a schedule cannot be made."""

    args: TrainingArguments

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As transformers does.

        Raises:
            TrainingError: It cannot be made; ``param`` is ``optim``.
        """
        with _naming("optim", self.args.optim, "optim_args", self.args.optim_args):
            made: Optimizer = super().create_optimizer(model)
            return made

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:  # noqa: ANN401 - as transformers
        """As transformers does.

        Raises:
            TrainingError: It cannot be made; ``param`` is ``lr_scheduler_type``.
        """
        name, options = "lr_scheduler_type", "lr_scheduler_kwargs"
        with _naming(
            name, self.args.lr_scheduler_type, options, self.args.lr_scheduler_kwargs or None
        ):
            return super().create_scheduler(num_training_steps, optimizer)


@contextlib.contextmanager
def _naming(param: str, value: object, further: str, options: object) -> Iterator[None]:
    """Name the arguments of the run in an error of what they ask for."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - optimizers of many libraries raise anything
        what = f"{param} {getattr(value, 'value', value)}"
        used = "" if isinstance(error, ImportError) else f" with {further} {options}"
        blame(error, what, f"{what} cannot be used{used}", param=param, is_offline=True)
