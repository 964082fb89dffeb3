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
from dar.training.logprobs import forward_batches, logps_and_entropies
from dar.training.loss import dar_loss
from dar.training.metrics import Reporter
from dar.training.policy import Policy
from dar.training.resumable import ResumableTrainer
from dar.training.sink import Control, Request, StopRequestedError, check
from dar.training.steps import ScoredStep, StepSource

MOST_EMPTY_STEPS = 3
"""Steps in a row without two usable rewards after which training gives up."""
LOG_HISTORY = 1000
"""Reports that `transformers.TrainerState` keeps; it is written into every checkpoint."""


@dataclass(frozen=True, slots=True)
class StepShare:
    """What a process does between two calls of transformers' loop: a micro-batch."""

    step: ScoredStep
    passes: list[list[int]]
    """Completions of each forward and backward pass; none where other processes have more to do than this one."""
    is_last: bool
    """Whether the optimizer steps after it."""


class StepTrainer(ResumableTrainer):
    """Takes each step from a `StepSource`, trains on it in shares, and reports it.

    With several processes each trains on the completions of its own prompts. All of them know the whole step, so each knows
    without asking how many passes the others make; the shorter ones add passes of weight 0, because a pass may hold a
    collective of torch. They stop at the same places, and report the same numbers.
    """

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
        self._leave_if(("cancel", "drain"))
        self._reporter.begin_step()
        step = self._step = self._source(self.state.global_step + 1)
        # Only an adapter's dropout draws from here: another mask in each process, and the same again after a resume.
        seeds = np.random.SeedSequence([self.args.seed, step.number, self.ranks.index])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        return list(self._shares(step, num_batches)), None

    def _shares(self, step: ScoredStep, count: int) -> Iterator[StepShare]:
        """This process's passes in ``count`` shares; the last is filled up to the longest of all processes."""
        shares = self._passes(step, self.ranks.index, count)
        longest = max(
            sum(map(len, self._passes(step, index, count))) for index in range(self.ranks.count)
        )
        shares[-1] += [[] for _ in range(longest - sum(map(len, shares)))]
        for i, passes in enumerate(shares):
            yield StepShare(step, passes, is_last=i == count - 1)

    def _passes(self, step: ScoredStep, index: int, count: int) -> list[list[list[int]]]:
        """Completions of each pass of process ``index``, in ``count`` shares of prompts."""
        ends = list(itertools.accumulate(step.counts, initial=0))
        prompts = self.ranks.slice_of(index, len(step.prompts))
        cuts = [prompts.start + len(prompts) * i // count for i in range(count + 1)]
        shares = []
        for first, last in itertools.pairwise(cuts):
            rows = [row for row in range(ends[first], ends[last]) if step.valid_B[row]]
            batches = forward_batches([step.pairs[row] for row in rows], self._policy.vocabulary)
            shares.append([[rows[place] for place in places] for places in batches])
        return shares

    def training_step(
        self,
        model: nn.Module,
        inputs: Any,  # noqa: ANN401 - a `StepShare`; transformers hands on what `get_batch_samples` gave
        num_items_in_batch: Tensor | int | None = None,  # noqa: ARG002 - the signature of transformers
    ) -> Tensor:
        """Backward passes of a share, scaled so that all shares of all processes together give the mean over the step.

        Returns:
            The share's part of the loss, detached; its mean over the processes is the loss.

        Raises:
            TrainingError: The loss is no number.
            StopRequestedError: The job was cancelled.
        """
        share: StepShare = inputs
        model.train()
        total = torch.zeros((), device=self.args.device)
        for i, rows in enumerate(share.passes):
            self._leave_if(("cancel",))
            is_last_pass = share.is_last and i == len(share.passes) - 1
            with self._gradients(model, share, is_last_pass=is_last_pass):
                total += self._backward(model, share.step, rows)
        return total

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
        loss = loss * (len(rows) * self.ranks.count / step.valid_count)
        if self.ranks.count == 1 and not loss.isfinite():  # else all see it in the gradient's norm
            raise _not_a_number("loss", step.number)
        self.accelerator.backward(loss)
        step.policy_logps_B[rows] = logps_B.detach().to("cpu", step.policy_logps_B.dtype)
        step.entropies_B[rows] = entropies_B.to("cpu", step.entropies_B.dtype)
        return loss.detach()

    def _leave_if(self, reasons: tuple[Request, ...]) -> None:
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
        self._step = None
        self.state.epoch = step.epoch
        self._bring_policy_values_together(step)
        self._reporter.end_step(step, grad_norm=grad_norm, learning_rate=learning_rate)
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
        if step.valid_count:
            self._empty_steps = 0
            return
        # Rewards that are all equal, and dropped for it, are no failure: later steps may tell more.
        self._empty_steps = 0 if step.group_count else self._empty_steps + 1
        message = next((reward.message for reward in step.rewards if reward.message), None)
        self.sink.event(
            "warn",
            f"step {step.number} had no two {'different ' if step.group_count else ''}rewards to compare, so it changed nothing"
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
            "empty_steps": self._empty_steps, "reporter": self._reporter.state(), "scaler": scaler
        }  # fmt: skip

    def restore_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` gave."""
        self._empty_steps = state["empty_steps"]
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        self._reporter.restore(state["reporter"])


def _not_a_number(what: str, step: int) -> TrainingError:
    return TrainingError(
        f"the {what} of step {step} is not a finite number: training has diverged; lower learning_rate or dar_wclip, "
        "or raise beta, and start again from an earlier checkpoint",
        code="diverged",
    )
