"""`StepTrainer`: how transformers' loop goes through a DAR step, and what is reported of it."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dar.errors import TrainingError
from dar.rewards.scoring.failures import FailureBudget
from dar.training.checkpoint.resume import ResumableTrainer
from dar.training.loss import dar_loss
from dar.training.model.logprobs import forward_batches, logps_and_entropies
from dar.training.model.policy import Policy
from dar.training.report.capacity import Capacity
from dar.training.report.sink import Control, StopKind, StopRequestedError, check
from dar.training.step.metrics import Reporter
from dar.training.step.parts import StepPart
from dar.training.step.pipeline import Pipeline
from dar.training.step.records import ScoredStep, is_streamable

MOST_EMPTY_STEPS = 3
"""Steps in a row without two usable rewards after which training gives up."""
LOG_HISTORY = 1000
"""Reports that `transformers.TrainerState` keeps; it is written into every checkpoint."""


@dataclass(frozen=True, slots=True)
class StepShare:
    """What a process does between two calls of transformers' loop."""

    step: ScoredStep
    parts: Iterator[StepPart]
    """Each comes when it is scored."""
    is_last: bool
    """Whether the optimizer steps after it."""


class StepTrainer(ResumableTrainer):
    """Takes each step from a `Pipeline`, trains on it part by part as the rewards come, and reports it.

    The loss is a mean over the completions that count, whose number is known only when the last reward is: gradients are summed
    over n completions as if all n counted, and multiplied once by n / (those that do) before they are clipped.

    With several processes each trains on the completions of its own prompts. All of them know every part, so each knows without
    asking how many passes the others make; the shorter ones add passes of weight 0, because a pass may hold a collective of
    torch. They stop at the same places, and report the same numbers.
    """

    # Set by `dar.DARTrainer`:
    _control: Control
    _policy: Policy
    _reporter: Reporter

    stopped_by: StopKind | None = None
    """What ended `train` before its time."""
    _pipeline: Pipeline | None = None
    _has_budget: bool = False
    """Whether the rewards have a failure policy; it counts empty steps too."""
    _budget: FailureBudget | None = None
    """Of the main process."""
    _budget_state: dict[str, Any] | None = None
    """Its state at the last step edge: what it has counted since is of a step that is not done."""
    _capacity: Capacity | None = None
    _step: ScoredStep | None = None
    _loss: Tensor | None = None
    """Of the step under way, so far; None before its first pass."""
    _pass_count: int = 0
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
        """Begin a step: its completions are sampled, and come in ``num_batches`` shares as they are scored."""
        assert self._pipeline is not None
        self._leave_if(("cancel", "drain"))
        self._reporter.begin_step()
        begun = self._pipeline.take(self.state.global_step + 1)
        self._step, self._loss, self._pass_count = begun.step, None, 0
        shares = begun.shares(self.ranks, num_batches, is_streamable=self._may_stream)
        return [
            StepShare(begun.step, parts, is_last=i == num_batches - 1)
            for i, parts in enumerate(shares)
        ], None

    @property
    def _may_stream(self) -> bool:
        """Whether a step may be trained on before all of its rewards are known.

        DeepSpeed keeps gradients where they cannot be scaled afterwards, so it has to know how many completions count.
        """
        return is_streamable(self.args) and not self.is_deepspeed_enabled

    def training_step(
        self,
        model: nn.Module,
        inputs: Any,  # noqa: ANN401 - a `StepShare`; transformers hands on what `get_batch_samples` gave
        num_items_in_batch: Tensor | int | None = None,  # noqa: ARG002 - the signature of transformers
    ) -> Tensor:
        """Backward passes of a share, scaled so that all shares of all processes together give the mean over the step.

        Returns:
            The loss of the step, detached, in its last share, and 0 in the others; its mean over the processes is the loss.

        Raises:
            TrainingError: The loss is no number, or a reward is missing and may not be.
            RewardError: No completion of the step could be scored.
            StopRequestedError: The job was cancelled, or is to stop while rewards are waited for.
        """
        share: StepShare = inputs
        for part in share.parts:
            if self._loss is None:
                self._seed(share.step)
                self._loss = torch.zeros((), device=self.args.device)
            model.train()
            passes = self._passes(share.step, part)
            for i, rows in enumerate(passes):
                self._leave_if(("cancel",))
                is_last_pass = part.is_last and i == len(passes) - 1
                with self._gradients(model, share, is_last_pass=is_last_pass):
                    self._loss += self._backward(model, share.step, rows)
        if not share.is_last:
            return torch.zeros((), device=self.args.device)
        self.accelerator.sync_gradients = True  # as the loop had set it: the optimizer is to step
        assert self._loss is not None
        return self._loss * self._scale_gradients(share.step)

    def _seed(self, step: ScoredStep) -> None:
        """Only an adapter's dropout draws from here: another mask in each process, and the same again after a resume."""
        seeds = np.random.SeedSequence([self.args.seed, step.number, self.ranks.index])
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def _passes(self, step: ScoredStep, part: StepPart) -> list[list[int]]:
        """Completions of each pass of this process over a part; as many passes as the longest of all processes has."""
        of_each = [self._passes_of(step, prompts) for prompts in part.prompts]
        longest = max(map(len, of_each))
        if part.is_last and not longest and self._pass_count and self.ranks.count > 1:
            longest = 1  # gradients meet in the last pass, so there has to be one
        self._pass_count += longest
        own = of_each[self.ranks.index]
        return own + [[] for _ in range(longest - len(own))]

    def _passes_of(self, step: ScoredStep, prompts: list[int]) -> list[list[int]]:
        rows = [row for row in step.rows_of(prompts) if step.valid_B[row]]
        batches = forward_batches([step.pairs[row] for row in rows], self._policy.vocabulary)
        return [[rows[place] for place in places] for places in batches]

    def _scale_gradients(self, step: ScoredStep) -> float:
        """From a sum over all completions, divided by their number, to a mean over those that count; returns the factor."""
        if self.is_deepspeed_enabled or step.valid_count in (0, len(step.pairs)):
            return 1.0
        factor = len(step.pairs) / step.valid_count
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return factor

    @contextlib.contextmanager
    def _gradients(
        self, model: nn.Module, share: StepShare, *, is_last_pass: bool
    ) -> Iterator[None]:
        """Have the processes bring their gradients together once in a step: in its very last pass."""
        # transformers does that for all shares but the last
        is_alone = share.is_last and not is_last_pass
        self.accelerator.sync_gradients = is_last_pass
        with self.accelerator.no_sync(model) if is_alone else contextlib.nullcontext():
            yield

    def _backward(self, model: nn.Module, step: ScoredStep, rows: list[int]) -> Tensor:
        """One pass over these completions; over none, one that changes nothing."""
        device = self.args.device
        pairs = [step.pairs[row] for row in rows] or [min(step.pairs, key=lambda p: p.total)]
        batch = {name: tensor.to(device) for name, tensor in self.data_collator(pairs).items()}
        logps_B, entropies_B = logps_and_entropies(model, batch)
        if not rows:
            self.accelerator.backward(0.0 * logps_B.sum())
            return torch.zeros((), device=device)
        loss = dar_loss(step.weights_B[rows].to(device), logps_B)
        # The gradients of the processes are averaged, so each counts its part as often as there are processes.
        # How many completions count may not be known yet: see `_scale_gradients`.
        count = step.valid_count if self.is_deepspeed_enabled else len(step.pairs)
        loss = loss * (len(rows) * self.ranks.count / count)
        if self.ranks.count == 1 and not loss.isfinite():  # else all see it in the gradient's norm
            raise _not_a_number("loss", step.number)
        self.accelerator.backward(loss)
        step.policy_logps_B[rows] = logps_B.detach().to("cpu", step.policy_logps_B.dtype)
        step.entropies_B[rows] = entropies_B.to("cpu", step.entropies_B.dtype)
        return loss.detach()

    def _leave_if(self, reasons: tuple[StopKind, ...]) -> None:
        """Leave if a stop is requested for one of ``reasons``: all processes at the same place, or none."""
        if self.ranks.from_main(self._control.requested) in reasons:
            raise StopRequestedError

    def _look_out(self) -> None:
        """Leave if a stop is requested here, or another process has left: each process on its own, outside of collectives."""
        check(self._control)
        self.ranks.look()

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """Scales the loss in float16."""
        scaler: torch.amp.GradScaler | None = self.accelerator.scaler
        return scaler

    def _clip_grad_norm(self, model: nn.Module) -> Any:  # noqa: ANN401 - as transformers
        if self._has_no_gradient():
            # The scaler cannot step over an optimizer without gradients; this one does not step then. Nor does DeepSpeed.
            self.accelerator.gradient_state._set_sync_gradients(False)  # noqa: SLF001 - as transformers does
            return torch.zeros(())
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]  # transformers is only partly typed

    def _has_no_gradient(self) -> bool:
        """Whether gradients are asked for where they are missed, and a step has none."""
        is_missing = self._step is not None and not self._step.valid_count
        return is_missing and (self._scaler is not None or self.is_deepspeed_enabled)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:  # noqa: ANN401 - as transformers
        if grad_norm is None and self._has_no_gradient():
            return self._clip_grad_norm(model)
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]  # transformers is only partly typed
        if isinstance(norm, DTensor):  # of sharded gradients
            norm = norm.full_tensor()
        # What overflows float16 is stepped over by the scaler, which then scales less; what overflows unscaled has diverged.
        may_overflow = self._scaler is not None and self._scaler.get_scale() >= 1
        if not math.isfinite(float(norm)) and not may_overflow:
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
        assert self._pipeline is not None
        self._step = None
        self._pipeline.end()
        self.state.epoch = step.epoch
        self._bring_policy_values_together(step)
        times = self._reporter.end_step(step, grad_norm=grad_norm, learning_rate=learning_rate)
        if self._capacity is not None:
            self._capacity.end_step(step.number, times)
        self._reporter.tell_of(step, self.sink)
        self._count_empty(step)
        self.stopped_by = self.ranks.from_main(self._control.requested)
        if self.stopped_by == "cancel":
            raise StopRequestedError
        if self.stopped_by == "drain":
            self.control.should_save = self.control.should_training_stop = True
        if self.stopped_by or self.state.global_step >= self.state.max_steps:
            self.control.should_log = True

    def _bring_policy_values_together(self, step: ScoredStep) -> None:
        rows = [row for row in step.valid_rows if not step.policy_logps_B[row].isnan()]
        own: dict[str, Any] = {
            "rows": rows, "logps": step.policy_logps_B[rows], "entropies": step.entropies_B[rows]
        }  # fmt: skip
        for part in self.ranks.gather(own):
            step.policy_logps_B[part["rows"]] = part["logps"]
            step.entropies_B[part["rows"]] = part["entropies"]

    def _count_empty(self, step: ScoredStep) -> None:
        # Rewards that are all equal, and dropped for it, are no failure: later steps may tell more.
        self._empty_steps = 0 if step.group_count else self._empty_steps + 1
        message = next((reward.message for reward in step.rewards if reward.message), None)
        if not step.valid_count:
            self.sink.event(
                "warn",
                f"step {step.number} had no two {'different ' if step.group_count else ''}rewards to compare, so it changed "
                "nothing" + (f"; the reward source says: {message}" if message else ""),
                {"kind": "empty_step", "step": step.number},
            )
        if self._has_budget:
            self._budget_state = self.ranks.from_main(lambda: self._end_budget(step))
        elif self._empty_steps >= MOST_EMPTY_STEPS:
            raise TrainingError(
                f"the last {MOST_EMPTY_STEPS} steps had no usable rewards: nearly every completion was skipped or failed; "
                "check what the reward service answers",
                code="no_rewards",
            )

    def _end_budget(self, step: ScoredStep) -> dict[str, Any]:
        assert self._budget is not None
        self._budget.end_step(step.group_count)
        return self._budget.state()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report to the sink and, with DAR's metrics, to the callbacks of transformers."""
        if self._reporter.is_due:
            values = self._reporter.report(self.sink, self.state.global_step)
            # Trackers put "train/" before every name.
            named = {name.removeprefix("train/"): value for name, value in values.items()}
            logs = logs | named | {"loss": values.get("dar/loss", 0.0)}
        super().log(logs, start_time)
        del self.state.log_history[:-LOG_HISTORY]

    def log_evaluation(self, values: dict[str, float]) -> None:
        """The same for what an evaluation has measured; what is known of training since its last report stays where it is."""
        self.sink.metrics(self.state.global_step, values)
        super().log(values)
        del self.state.log_history[:-LOG_HISTORY]

    # --- what a resume needs of it -----------------------------------------------------------------------------------

    def step_values(self) -> dict[str, float]:
        """The last report."""
        return self._reporter.reported

    def own_state(self) -> dict[str, Any]:
        """Counters, and what has happened since the last report."""
        scaler = None if self._scaler is None else self._scaler.state_dict()
        return {
            "empty_steps": self._empty_steps, "reporter": self._reporter.state(), "scaler": scaler,
            "budget": self._budget_state, "ahead": None if self._pipeline is None else self._pipeline.state(),
        }  # fmt: skip

    def restore_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` gave."""
        self._empty_steps = state["empty_steps"]
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        self._reporter.restore(state["reporter"])
        self._budget_state = state.get("budget")
        if self._budget is not None and self._budget_state is not None:
            self._budget.restore(self._budget_state)
        if self._pipeline is not None:
            self._pipeline.restore(state.get("ahead"))


def _not_a_number(what: str, step: int) -> TrainingError:
    return TrainingError(
        f"the {what} of step {step} is not a finite number: training has diverged; lower learning_rate or dar_wclip, "
        "or raise beta, and start again from an earlier checkpoint",
        code="diverged",
    )
