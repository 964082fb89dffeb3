"""`StepLoop`: the steps of a run, as transformers' training loop goes through them.

The loss is a mean over the completions that count, and how many count is known only when the last
reward has arrived. So gradients are summed over n completions as if all n counted, and multiplied
once by n / (those that count) before they are clipped.

With several processes, each trains on the completions of its own prompts. All of them know every
part of a step, so each knows how many passes the others make. A process with fewer passes adds
passes of weight 0, because a pass may contain a collective of torch. All processes stop at the same
places and report the same numbers.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dar.errors import DARError, TrainingError
from dar.training.loss import control_variates, dar_loss
from dar.training.model.logprobs import forward_batches, logps_and_entropies
from dar.training.report.sink import StopKind, StopRequestedError
from dar.training.run_context import RunContext
from dar.training.step.metrics import Reporter
from dar.training.step.pipeline import BeginningSource, Pipeline
from dar.training.step.records import ScoredStep
from dar.training.step.reward_feed import Scoring, StepPart
from dar.training.step.trained_steps import TrainedSteps

MOST_EMPTY_STEPS = 3
"""Training fails after this many steps in a row without two usable rewards."""


@dataclass(frozen=True, slots=True)
class StepShare:
    """What a process trains on between two calls of transformers' loop."""

    step: ScoredStep
    parts: Iterator[StepPart]
    """Each is returned when it is scored."""
    is_last: bool
    """Whether the optimizer steps after it."""


class StepLoop:
    """Takes each step from a `Pipeline`, trains on its parts as their rewards arrive, reports it.

    Args:
        run: The training run.
        vocabulary: Size of the model's vocabulary.
        reporter: Collects the metrics of the steps.
    """

    def __init__(self, run: RunContext, vocabulary: int, reporter: Reporter) -> None:
        self.step: ScoredStep | None = None
        """The step that is trained on; None between two steps."""
        self._run = run
        self._vocabulary = vocabulary
        self._reporter = reporter
        self._pipeline: Pipeline | None = None
        self._scoring = Scoring()
        self._budget_state: dict[str, Any] | None = None
        """State of the budget after the last finished step; the budget itself may be further on."""
        self._loss: Tensor | None = None
        """Loss of the current step so far; None before its first pass."""
        self._pass_count = 0
        self._empty_steps = 0
        self._trained = TrainedSteps(run)

    def begin(self, source: BeginningSource, scoring: Scoring) -> None:
        """Begin a training run, whose steps come from ``source``."""
        args = self._run.trainer.args
        self._pipeline = Pipeline(source, overlap=args.overlap, last_step=args.max_steps)
        self._scoring = scoring
        self._budget_state = None

    # --- forward and backward ------------------------------------------------------------------

    def begin_step(self, share_count: int) -> list[StepShare]:
        """Sample the next step; its shares are trained on in order, as they are scored.

        Raises:
            StopRequestedError: A stop is requested.
        """
        assert self._pipeline is not None
        self._run.stop_if(("cancel", "drain"))
        self._reporter.begin_step()
        self._trained.begin_step()
        begun = self._pipeline.take(self._run.trainer.state.global_step + 1)
        self.step, self._loss, self._pass_count = begun.step, None, 0
        is_streamable = self._scoring.is_streamable
        shares = begun.shares(self._run.ranks, share_count, is_streamable=is_streamable)
        return [
            StepShare(begun.step, parts, is_last=i == share_count - 1)
            for i, parts in enumerate(shares)
        ]

    def train(self, model: nn.Module, share: StepShare) -> Tensor:
        """Make the backward passes of a share, scaled so that all shares sum to the step's mean.

        Returns:
            The loss of the step, detached, for its last share, and 0 for the others; the mean over
            the processes is the loss.

        Raises:
            TrainingError: The loss is not finite, or a reward is missing with
                ``allow_missing`` off.
            RewardError: No completion of the step could be scored.
            StopRequestedError: A cancellation is requested, or any stop while rewards are awaited.
        """
        trainer = self._run.trainer
        device = trainer.args.device
        for part in share.parts:
            if self._loss is None:
                self._seed(share.step)
                self._loss = torch.zeros((), device=device)
            model.train()
            passes = self._passes(share.step, part)
            for i, rows in enumerate(passes):
                self._run.stop_if(("cancel",))
                is_last_pass = part.is_last and i == len(passes) - 1
                with self._gradients(model, share, is_last_pass=is_last_pass):
                    self._loss += self._backward(model, share.step, rows)
        if not share.is_last:
            return torch.zeros((), device=device)
        trainer.accelerator.sync_gradients = True  # as transformers' loop had set it before
        assert self._loss is not None
        return self._loss * self._scale_gradients(share.step)

    def _seed(self, step: ScoredStep) -> None:
        """Seed an adapter's dropout: different in each process, and the same after a resume."""
        seed, ranks = self._run.trainer.args.seed, self._run.ranks
        seeds = np.random.SeedSequence([seed, step.number, ranks.index])
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def _passes(self, step: ScoredStep, part: StepPart) -> list[list[int]]:
        """Completions of each pass of this process over a part; all processes have equally many."""
        ranks = self._run.ranks
        of_each = [self._passes_of(step, prompts) for prompts in part.prompts]
        longest = max(map(len, of_each))
        if part.is_last and not longest and self._pass_count and ranks.count > 1:
            longest = 1  # gradients are reduced in the last pass, so there must be one
        self._pass_count += longest
        own = of_each[ranks.index]
        return own + [[] for _ in range(longest - len(own))]

    def _passes_of(self, step: ScoredStep, prompts: list[int]) -> list[list[int]]:
        rows = [row for row in step.rows_of(prompts) if step.valid_B[row]]
        batches = forward_batches([step.pairs[row] for row in rows], self._vocabulary)
        return [[rows[place] for place in places] for places in batches]

    def _scale_gradients(self, step: ScoredStep) -> float:
        """Rescale from a mean over all completions to a mean over those that count.

        Returns:
            The factor.
        """
        trainer = self._run.trainer
        if trainer.is_deepspeed_enabled or step.valid_count in (0, len(step.pairs)):
            return 1.0
        factor = len(step.pairs) / step.valid_count
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return factor

    @contextlib.contextmanager
    def _gradients(
        self, model: nn.Module, share: StepShare, *, is_last_pass: bool
    ) -> Iterator[None]:
        """Have gradients reduced over the processes once in a step: in its very last pass."""
        accelerator = self._run.trainer.accelerator
        # in the other shares transformers has entered no_sync already
        is_alone = share.is_last and not is_last_pass
        accelerator.sync_gradients = is_last_pass
        with accelerator.no_sync(model) if is_alone else contextlib.nullcontext():
            yield

    def _backward(self, model: nn.Module, step: ScoredStep, rows: list[int]) -> Tensor:
        """One pass over these completions; without any, a pass that changes nothing."""
        trainer, ranks = self._run.trainer, self._run.ranks
        device = trainer.args.device
        pairs = [step.pairs[row] for row in rows] or [min(step.pairs, key=lambda p: p.total)]
        batch = {name: tensor.to(device) for name, tensor in trainer.data_collator(pairs).items()}
        logps_B, entropies_B = logps_and_entropies(model, batch)
        if not rows:
            trainer.accelerator.backward(0.0 * logps_B.sum())
            return torch.zeros((), device=device)
        loss = dar_loss(self._factors(step, rows, logps_B), logps_B)
        # Gradients are averaged over the processes, so each loss is multiplied by their number.
        # How many completions count may not be known yet: see `_scale_gradients`.
        count = step.valid_count if trainer.is_deepspeed_enabled else len(step.pairs)
        loss = loss * (len(rows) * ranks.count / count)
        if ranks.count == 1 and not loss.isfinite():  # with several, the gradient's norm shows it
            raise self._not_finite("loss", step.number)
        trainer.accelerator.backward(loss)
        step.policy_logps_B[rows] = logps_B.detach().to("cpu", step.policy_logps_B.dtype)
        step.entropies_B[rows] = entropies_B.to("cpu", step.entropies_B.dtype)
        return loss.detach()

    def _factors(self, step: ScoredStep, rows: list[int], logps_B: Tensor) -> Tensor:
        """What multiplies each log-probability: the weights, less their control variates."""
        args = self._run.trainer.args
        weights_B = step.weights_B[rows].to(logps_B.device)
        # read from the data set, completions may be of any distribution, and far from the policy
        if not args.has_control_variate or step.staleness is None:
            return weights_B
        behavior_B = step.behavior_logps_B[rows].to(logps_B.device)
        return weights_B - control_variates(logps_B, behavior_B, clip=args.dar_wclip)

    # --- the gradient's norm -------------------------------------------------------------------

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """Scales the loss in float16."""
        scaler: torch.amp.GradScaler | None = self._run.trainer.accelerator.scaler
        return scaler

    def _lacks_gradient(self) -> bool:
        """Whether the step has no gradient, and a loss scaler or DeepSpeed would fail for it."""
        is_empty = self.step is not None and not self.step.valid_count
        return is_empty and (self._scaler is not None or self._run.trainer.is_deepspeed_enabled)

    def clip(self, clip: Callable[[], Any]) -> Any:  # noqa: ANN401 - transformers' norm: a tensor or a number
        """Clip the gradient by ``clip``; without one, skip the optimizer step.

        Returns:
            The norm before.
        """
        if not self._lacks_gradient():
            return clip()
        state = self._run.trainer.accelerator.gradient_state
        state._set_sync_gradients(False)  # noqa: SLF001 - transformers' loop sets it in the same way
        return torch.zeros(())

    def checked(self, norm: Any) -> Any:  # noqa: ANN401 - transformers' norm: a tensor or a number
        """The norm of the whole gradient.

        Raises:
            TrainingError: It is not finite, and float16 cannot be the cause.
        """
        if isinstance(norm, DTensor):  # of sharded gradients
            norm = norm.full_tensor()
        # The scaler skips a step that overflows float16 and scales less from then on. A gradient
        # that overflows without scaling has diverged.
        may_overflow = self._scaler is not None and self._scaler.get_scale() >= 1
        if not math.isfinite(float(norm)) and not may_overflow:
            raise self._not_finite("gradient", self._run.trainer.state.global_step + 1)
        return norm

    def _not_finite(self, what: str, step: int) -> TrainingError:
        problem = f"the {what} of step {step} is not a finite number"
        if not self._trained.count:  # so the learning rate is not the cause
            return TrainingError(
                f"{problem}, and no step has changed a weight yet; look at the weights of the "
                "model, at the options of its adapter, and at the rewards and log-probabilities of "
                "the data",
                code="not_finite",
            )
        return TrainingError(
            f"{problem}: training has diverged; lower learning_rate or dar_wclip, or raise beta, "
            "and start again from an earlier checkpoint",
            code="diverged",
        )

    # --- the end of a step ---------------------------------------------------------------------

    def end_step(self, step: ScoredStep, grad_norm: float, learning_rate: float) -> StopKind | None:
        """Report a step after the optimizer has stepped.

        Returns:
            The request that ends training after this step.

        Raises:
            StopRequestedError: A cancellation is requested.
            TrainingError: Too many steps in a row had no usable rewards, or all steps of the run.
        """
        assert self._pipeline is not None
        trainer, run = self._run.trainer, self._run
        if self._scoring.scorer is not None:
            self._scoring.scorer.end_step(step.number)
        self.step = None
        self._pipeline.end()
        trainer.state.epoch = step.epoch
        self._gather_policy_values(step)
        times = self._reporter.end_step(step, grad_norm=grad_norm, learning_rate=learning_rate)
        if self._scoring.capacity is not None:
            self._scoring.capacity.end_step(step.number, times)
        self._reporter.warn_of(
            step, run.sink, last_step=trainer.state.max_steps, learning_rate=learning_rate
        )
        self._warn_of_empty(step)
        try:
            self._count_trained(step, grad_norm, learning_rate)
            self._count_empty(step)
        except DARError:
            self.report({})  # its metrics and samples show why
            raise
        stop = run.ranks.from_main(run.control.requested)
        if stop == "cancel":
            raise StopRequestedError
        if stop in {"drain", "stop"}:
            trainer.control.should_save = trainer.control.should_training_stop = True
        if stop or trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_log = True
        return stop

    def _gather_policy_values(self, step: ScoredStep) -> None:
        rows = [row for row in step.valid_rows if not step.policy_logps_B[row].isnan()]
        own: dict[str, Any] = {
            "rows": rows,
            "logps": step.policy_logps_B[rows],
            "entropies": step.entropies_B[rows],
        }
        for part in self._run.ranks.gather(own):
            step.policy_logps_B[part["rows"]] = part["logps"]
            step.entropies_B[part["rows"]] = part["entropies"]

    def _count_trained(self, step: ScoredStep, grad_norm: float, learning_rate: float) -> None:
        is_skipped = self._scaler is not None and (
            self._run.trainer.accelerator.optimizer_step_was_skipped
        )
        unusable = None
        if is_skipped:
            unusable = "every gradient overflowed float16; use bf16"
        elif not step.valid_count:
            unusable = _why_unusable(step)
        self._trained.end_step(
            step.number, grad_norm=grad_norm, learning_rate=learning_rate, unusable=unusable
        )

    def _warn_of_empty(self, step: ScoredStep) -> None:
        message = _first_message(step)
        if not step.valid_count:
            self._run.sink.event(
                "warn",
                f"step {step.number} had no two {'different ' if step.group_count else ''}rewards "
                "to compare, so it changed nothing"
                + (f"; the reward source says: {message}" if message else ""),
                {"kind": "empty_step", "step": step.number},
            )

    def _count_empty(self, step: ScoredStep) -> None:
        # A step whose rewards are all equal, and dropped for that, is not counted as empty.
        self._empty_steps = 0 if step.group_count else self._empty_steps + 1
        if self._scoring.policy is not None:  # the failure policy counts empty steps too
            self._budget_state = self._run.ranks.from_main(lambda: self._end_budget(step))
        elif self._empty_steps >= MOST_EMPTY_STEPS:
            raise TrainingError(
                f"the last {MOST_EMPTY_STEPS} steps had no usable rewards: {_why_unusable(step)}",
                code="no_rewards",
            )

    def _end_budget(self, step: ScoredStep) -> dict[str, Any]:
        assert self._scoring.budget is not None
        self._scoring.budget.end_step(step.group_count)
        return self._scoring.budget.state()

    def report(self, logs: dict[str, float]) -> dict[str, float]:
        """Report to the sink if a step has ended since the last report.

        Returns:
            ``logs`` with DAR's metrics, for the callbacks of transformers.
        """
        if not self._reporter.is_due:
            return logs
        values = self._reporter.report(self._run.sink, self._run.trainer.state.global_step)
        # trackers put "train/" before every name
        named = {name.removeprefix("train/"): value for name, value in values.items()}
        return logs | named | {"loss": values.get("dar/loss", 0.0)}

    # --- resuming ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Counters, what has happened since the last report, and what was sampled ahead."""
        return {
            "empty_steps": self._empty_steps,
            "trained_steps": self._trained.count,
            "reporter": self._reporter.state(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "budget": self._budget_state,
            "capacity": None if self._scoring.capacity is None else self._scoring.capacity.state(),
            "ahead": None if self._pipeline is None else self._pipeline.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._empty_steps = state["empty_steps"]
        # Checkpoints of earlier versions do not say; then a run is not failed for it.
        self._trained.count = state.get("trained_steps", 1)
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        self._reporter.restore(state["reporter"])
        self._budget_state = state.get("budget")
        if self._scoring.budget is not None and self._budget_state is not None:
            self._scoring.budget.restore(self._budget_state)
        if self._scoring.capacity is not None and state.get("capacity") is not None:
            self._scoring.capacity.restore(state["capacity"])
        if self._pipeline is not None:
            self._pipeline.restore(state.get("ahead"))


def _first_message(step: ScoredStep) -> str | None:
    """What a reward source says about a completion of the step; None: nothing."""
    return next((reward.message for reward in step.rewards if reward.message), None)


def _why_unusable(step: ScoredStep) -> str:
    """Why the rewards of a step could not be used, and what to look at."""
    if step.group_count:
        return (
            "the rewards of every prompt were all equal, and drop_ties leaves such prompts out; "
            "look at what the reward depends on"
        )
    if step.staleness is None:  # the data hold the rewards
        return (
            "no two completions that are compared have rewards; look at the column 'rewards' of "
            "the data, where null is a missing reward"
        )
    message = _first_message(step)
    return (
        "nearly every completion was skipped or failed"
        + (f" (the reward source says: {message})" if message else "")
        + "; look at what the reward source returns for the completions, where null (None in "
        "Python) leaves one out"
    )
