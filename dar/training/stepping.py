"""`StepTrainer`: how transformers' loop goes through a DAR step, and what is reported of it."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from dar.errors import TrainingError
from dar.training.logprobs import completion_logps, forward_batches
from dar.training.loss import dar_loss
from dar.training.metrics import Reporter
from dar.training.policy import Policy
from dar.training.resumable import ResumableTrainer
from dar.training.sink import Control, Request, StopRequestedError, check
from dar.training.steps import ScoredStep, StepShare, StepSource

MOST_EMPTY_STEPS = 3
"""Steps in a row without two usable rewards after which training gives up."""
LOG_HISTORY = 1000
"""Reports that `transformers.TrainerState` keeps; it is written into every checkpoint."""


class StepTrainer(ResumableTrainer):
    """Takes each step from a `StepSource`, trains on it in shares, and reports it."""

    # Set by `dar.DARTrainer`:
    _control: Control
    _policy: Policy
    _reporter: Reporter

    stopped_by: Request | None = None
    """What ended `train` before its time."""
    _source: StepSource | None = None
    _step: ScoredStep | None = None
    _empty_steps: int = 0

    # --- a step, as transformers' loop goes through it ---------------------------------------------------------------

    def get_train_dataloader(self) -> Any:  # noqa: ANN401 - transformers asks for a DataLoader but only iterates
        """Endless and empty: a step's data come from the step source when the step begins, never earlier."""
        return itertools.repeat(None)

    def get_batch_samples(
        self,
        epoch_iterator: Any,  # noqa: ANN401, ARG002 - the signature of transformers
        num_batches: int,
        device: torch.device,  # noqa: ARG002 - the signature of transformers
    ) -> tuple[list[Any], None]:
        """Begin a step: its completions, sampled and scored, in ``num_batches`` shares."""
        assert self._source is not None
        check(self._control)
        self._reporter.begin_step()
        self._step = self._source(self.state.global_step + 1)
        return list(self._step.shares(num_batches)), None

    def training_step(
        self,
        model: nn.Module,
        inputs: Any,  # noqa: ANN401 - a `StepShare`; transformers hands on what `get_batch_samples` gave
        num_items_in_batch: Tensor | int | None = None,  # noqa: ARG002 - the signature of transformers
    ) -> Tensor:
        """Backward passes of a share, scaled so that all shares together give the mean over the step.

        Returns:
            The share's part of the loss, detached.

        Raises:
            TrainingError: The loss is no number.
            StopRequestedError: The job was cancelled.
        """
        share: StepShare = inputs
        step, device = share.step, self.args.device
        model.train()
        total = torch.zeros((), device=device)
        pairs = [step.pairs[row] for row in share.rows]
        for places in forward_batches(pairs, self._policy.vocabulary):
            if self._control.requested() == "cancel":
                raise StopRequestedError
            rows = [share.rows[place] for place in places]
            batch = self.data_collator([pairs[place] for place in places])
            logps_B = completion_logps(model, {k: v.to(device) for k, v in batch.items()})
            loss = dar_loss(step.weights_B[rows].to(device), logps_B)
            loss = loss * (len(rows) / step.valid_count)
            if not loss.isfinite():
                raise _not_a_number("loss", step.number)
            self.accelerator.backward(loss)
            step.policy_logps_B[rows] = logps_B.detach().cpu()
            total += loss.detach()
        return total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:  # noqa: ANN401 - as transformers
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]  # transformers is only partly typed
        if not math.isfinite(float(norm)):
            raise _not_a_number("gradient", self.state.global_step + 1)
        return norm

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ANN401, ARG002 - the signature of transformers
        """Not counted: the estimate of transformers knows nothing of sampling."""
        return 0

    # --- what is reported of a step ----------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: nn.Module,
        trial: Any,  # noqa: ANN401 - as transformers
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        if self._step is not None:
            self._end_step(self._step, float(grad_norm or 0.0), float(learning_rate or 0.0))
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )

    def _end_step(self, step: ScoredStep, grad_norm: float, learning_rate: float) -> None:
        self._step = None
        self.state.epoch = step.epoch
        self._reporter.end_step(step, grad_norm=grad_norm, learning_rate=learning_rate)
        self._count_empty(step)
        self.stopped_by = self._control.requested()
        if self.stopped_by == "cancel":
            raise StopRequestedError
        if self.stopped_by == "drain":
            self.control.should_save = self.control.should_training_stop = True
        if self.stopped_by or self.state.global_step >= self.state.max_steps:
            self.control.should_log = True

    def _count_empty(self, step: ScoredStep) -> None:
        if step.valid_count:
            self._empty_steps = 0
            return
        self._empty_steps += 1
        message = next((reward.message for reward in step.rewards if reward.message), None)
        self.sink.event(
            "warn",
            f"step {step.number} had no two rewards to compare, so it changed nothing"
            + (f"; the reward source says: {message}" if message else ""),
            {"kind": "empty_step", "step": step.number},
        )
        if self._empty_steps >= MOST_EMPTY_STEPS:
            raise TrainingError(
                f"the last {MOST_EMPTY_STEPS} steps had no usable rewards: nearly every completion was skipped or failed; "
                "check what the reward service answers",
                code="no_rewards",
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report to the sink and, with DAR's metrics, to the callbacks of transformers."""
        if self._reporter.is_due:
            values = self._reporter.report(self.sink, self.state.global_step)
            logs = logs | values | {"loss": values.get("dar/loss", 0.0)}
        super().log(logs, start_time)
        del self.state.log_history[:-LOG_HISTORY]

    # --- what a resume needs of it -----------------------------------------------------------------------------------

    def step_values(self) -> dict[str, float]:
        """The last report."""
        return self._reporter.reported

    def own_state(self) -> dict[str, Any]:
        """Counters, and what has happened since the last report."""
        return {"empty_steps": self._empty_steps, "reporter": self._reporter.state()}

    def restore_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` gave."""
        self._empty_steps = state["empty_steps"]
        self._reporter.restore(state["reporter"])


def _not_a_number(what: str, step: int) -> TrainingError:
    return TrainingError(
        f"the {what} of step {step} is not a finite number: training has diverged; lower learning_rate or dar_wclip, "
        "or raise beta, and start again from an earlier checkpoint",
        code="diverged",
    )
